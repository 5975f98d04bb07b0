"""`optimum-order export`: compress a model in the order that is asked for, and save it."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

from optimum_order.cli.base import Command, size
from optimum_order.errors import FormatError, unknown
from optimum_order.order import Order

DESCRIPTION = """\
Compress MODEL by the stages of an order, first to last, and save it to OUTPUT: a folder that
transformers loads by itself, without optimum-order.
"""

EPILOG = """\
how an order is written:
  stage > stage > ...              quote it: the shell would take '>' for itself
  a stage is  method:value         such as  wanda:0.5 (remove half) or gptq:4 (4 bit)
              method(key=value)    such as  gptq(bits=4, group_size=64)
              method               with its options as they are by default
  'optimum-order backends' lists the methods with all their options.

examples:
  optimum-order export tiny-llama out --order "wanda:0.5 > gptq:4" --evaluate builtin
  optimum-order export ./my-model out --order "rtn:8" --format compressed-tensors
  optimum-order export some/model out --order "sparsegpt(sparsity=0.5, pattern=2:4) > gptq:4" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt
"""

SOURCE = (
    "a .txt, .jsonl or .parquet file, a Hub dataset as id[:config][:split][:column], or 'builtin' (Python's own "
    "documentation, no network)"
)


class ExportCommand(Command):
    """Measures before, compresses, measures after, saves; nothing is written unless all of it went well."""

    @staticmethod
    def parse_args(parser):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.epilog = EPILOG
        parser.add_argument(
            "model", metavar="MODEL", help="a folder, a Hub id, or 'tiny-llama', the small model that comes with us"
        )
        parser.add_argument("output", metavar="OUTPUT", help="the folder to write; refused if it is not empty")
        parser.add_argument("--order", required=True, help='the stages, first to last, such as "wanda:0.5 > gptq:4"')
        parser.add_argument(
            "--format",
            default="auto",
            help="how to store it; auto (default) takes the smallest format that holds every layer exactly",
        )
        parser.add_argument(
            "--calibration",
            metavar="SRC",
            help=f"text for the methods that look at a layer's inputs: {SOURCE}; default: builtin for tiny-llama, "
            "otherwise required by every method but magnitude, rtn and bitsandbytes",
        )
        parser.add_argument(
            "--calibration-samples",
            metavar="N",
            type=int,
            default=128,
            help="how many windows of that text (default %(default)s)",
        )
        parser.add_argument(
            "--sequence-length",
            metavar="N",
            type=int,
            default=512,
            help="tokens in a window, in calibration and evaluation (default %(default)s)",
        )
        parser.add_argument(
            "--schedule",
            default="stage",
            help="stage (default): each stage walks the whole model before the next begins; block: all stages on one "
            "block before the next block, which is faster",
        )
        parser.add_argument(
            "--evaluate", metavar="SRC", help="measure perplexity on this text before and after (all of it is used)"
        )
        parser.add_argument(
            "--seed", metavar="N", type=int, default=0, help="which windows are drawn (default %(default)s)"
        )
        parser.add_argument(
            "--device", default="auto", help="auto (default) takes a GPU where there is one; or cpu, cuda, cuda:N"
        )
        parser.add_argument(
            "--dtype", default="auto", help="auto (default) keeps the checkpoint's; or float32, bfloat16, float16"
        )
        parser.add_argument(
            "--targets",
            metavar="PATTERN",
            nargs="+",
            help="compress only these layers: a shell pattern on the full name such as '*.q_proj', or 're:' and a "
            "regular expression; by default every layer inside the model's blocks",
        )
        parser.add_argument(
            "--ignore", metavar="PATTERN", nargs="+", help="leave these layers alone; wins over --targets"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is not empty")
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")

    def work(self) -> dict[str, Any]:
        from optimum_order import artifact, formats
        from optimum_order.backends import canonical
        from optimum_order.compressor import JointCompressor

        _hush_libraries()
        args, output = self.args, Path(self.args.output)
        # What can be refused at once is refused before anything is read or computed.
        order = canonical(Order.parse(args.order))
        if args.format not in (allowed := ["auto", *formats.available()]):
            raise FormatError(unknown("format", args.format, allowed))
        artifact.check_output(output, overwrite=args.overwrite)
        compressor = JointCompressor.from_pretrained(
            args.model,
            calibration=args.calibration,
            calibration_samples=args.calibration_samples,
            sequence_length=args.sequence_length,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            targets=args.targets,
            ignore=args.ignore,
        )
        seconds = {}
        begin = last = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            seconds[name], last = round(time.perf_counter() - last, 2), time.perf_counter()

        if args.evaluate:
            compressor.evaluate(args.evaluate)
            lap("evaluate_before")
        compressed = compressor.compress(order, args.schedule)
        lap("compress")
        if args.evaluate:
            compressed.evaluate(args.evaluate, format=args.format)
            lap("evaluate_after")
        chosen = compressed.save_pretrained(output, format=args.format, overwrite=args.overwrite)
        lap("save")
        manifest = compressed.manifest
        return {
            "output": str(output),
            "order": manifest["order"],
            "format": chosen,
            "schedule": manifest["schedule"],
            "seconds": seconds | {"total": round(time.perf_counter() - begin, 2)},
            "bytes": manifest["bytes"],
            "sparsity": manifest["sparsity"],
            "metrics": {
                name: {when: measured["value"] for when, measured in both.items()}
                for name, both in manifest["metrics"].items()
            },
        }

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False)
        table.add_row("order", result["order"].replace(" > ", " → "))
        for name, values in result["metrics"].items():
            table.add_row(name, f"{values['before']:.4g} → {values['after']:.4g}")
        table.add_row("weights on disk", f"{size(result['bytes']['before'])} → {size(result['bytes']['after'])}")
        table.add_row("bits per compressed weight", f"{result['bytes']['per_weight_bits']:.2f}")
        table.add_row("sparsity", f"{result['sparsity']:.1%}")
        table.add_row("format", result["format"])
        table.add_row("seconds", ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items()))
        console = Console(markup=False, highlight=False)
        console.print(table)
        console.print(f"Saved to {result['output']}; transformers loads it from there by itself.", soft_wrap=True)


def _hush_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen, unless their users asked to see them."""
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends optional kernels on every CPU
