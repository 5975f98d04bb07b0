"""`optimum-order export`: compress a model in the order that is asked for, or convert one that is, and save it."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command, size
from optimum_order.errors import FormatError, HubError, ModelError, OrderError, unknown
from optimum_order.order import Order, Stage, parse_stages

DESCRIPTION = """\
Compress MODEL by the stages of an order, first to last, and save it to OUTPUT: a folder that
transformers loads by itself, without optimum-order. Without an order, MODEL is one that was
saved so, and is saved again with the same values in another format.
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
  optimum-order export tiny-resnet out --order "gptq:4 > sparsegpt:0.5" --evaluate builtin
  optimum-order export tiny-llama out --order auto --stages "wanda:0.5, gptq:4"
  optimum-order export ./my-model out --order "rtn:8" --format compressed-tensors
  optimum-order export some/model out --order "sparsegpt(sparsity=0.5, pattern=2:4) > gptq:4" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt
  optimum-order export out elsewhere --format sparse

A run that is cut off keeps what it has finished in OUTPUT.work; the same command with --resume goes
on from there, and OUTPUT is then, byte for byte, what it would have been.
"""


_CONVERTING = (
    "model",
    "revision",
    "output",
    "order",
    "format",
    "overwrite",
    "push_to_hub",
    "private",
    "create_pr",
    "json",
)
"""What may be said where there is no order."""


class ExportCommand(Command):
    """Measures before, compresses, measures after, saves; OUTPUT is not written unless all of it went well."""

    _began = False

    @staticmethod
    def parse_args(parser):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.epilog = EPILOG
        arguments.model(parser)
        parser.add_argument(
            "output", metavar="OUTPUT", help="the folder to write; refused if it is not empty"
        )
        parser.add_argument(
            "--order",
            help='the stages, first to last, such as "wanda:0.5 > gptq:4"; or auto, for the best of --stages',
        )
        parser.add_argument(
            "--stages",
            help="with --order auto: what to put into the order that 'optimum-order plan' recommends, separated by "
            'commas, such as "wanda:0.5, gptq:4"',
        )
        parser.add_argument(
            "--format",
            default="auto",
            help="how to store it; auto (default) takes the smallest format that holds every layer exactly and needs "
            "nothing but transformers to load; 'optimum-order backends' lists them",
        )
        arguments.calibration(parser)
        parser.add_argument(
            "--schedule",
            default="stage",
            help="stage (default): each stage walks the whole model before the next begins; block: all stages on one "
            "block before the next block, which is faster",
        )
        parser.add_argument(
            "--evaluate",
            metavar="SRC",
            help="measure the model on this before and after; all of it is used",
        )
        arguments.metric(parser)
        arguments.loading(parser)
        parser.add_argument(
            "--push-to-hub",
            metavar="ID",
            help="then upload OUTPUT to namespace/name on the Hub, with a model card",
        )
        parser.add_argument(
            "--private", action="store_true", help="make that repository private, if it is new"
        )
        parser.add_argument(
            "--create-pr",
            action="store_true",
            help="open a pull request there in place of committing",
        )
        parser.add_argument(
            "--work-dir",
            metavar="DIR",
            help="keeps what is finished, block by block, until OUTPUT is written (default: OUTPUT.work)",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="go on from what the work dir of a run that was cut off holds; all else must be as it was",
        )
        parser.add_argument(
            "--low-memory",
            action="store_true",
            help="hold no more than a block of the model in memory; needs room on the disk for two copies of it",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace OUTPUT if it is not empty"
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="read no weights and write nothing: say how long compressing would take, how much memory, and how "
            "large OUTPUT would be",
        )
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else"
        )

    def work(self) -> dict[str, Any]:
        from optimum_order import evaluation, formats
        from optimum_order.artifact import folder as artifact
        from optimum_order.artifact import hub
        from optimum_order.engine import workdir

        arguments.hush_libraries()
        args, output = self.args, Path(self.args.output)
        # What can be refused at once is refused before anything is read or computed.
        order, stages = self._order()
        if args.format not in (allowed := ["auto", *formats.available()]):
            raise FormatError(unknown("format", args.format, allowed))
        if args.metric not in (allowed := ["auto", *evaluation.available()]):
            raise ModelError(unknown("metric", args.metric, allowed))
        overwrite = args.overwrite or (args.resume and self._is_there(output))
        artifact.check_output(output, overwrite=overwrite)
        if args.push_to_hub:
            hub.check(args.push_to_hub)
        if order is None:
            return self._convert(output)
        workdir.check(self._work_dir, resume=args.resume)
        if args.low_memory and args.evaluate:
            raise ModelError(
                "'--evaluate' needs the whole model in memory, which '--low-memory' is there to avoid: measure OUTPUT "
                "where there is room for it."
            )
        compressor = arguments.compressor(args)
        if args.dry_run:
            return compressor.estimate(order, args.schedule, format=args.format).as_dict()
        seconds = {}
        begin = last = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            seconds[name], last = round(time.perf_counter() - last, 2), time.perf_counter()

        if args.evaluate:
            compressor.evaluate(args.evaluate, args.metric)
            lap("evaluate_before")
        self._began = True
        compressed = compressor.compress(
            order,
            args.schedule,
            stages=stages,
            work_dir=self._work_dir,
            resume=args.resume,
            low_memory=args.low_memory,
        )
        lap("compress")
        if args.evaluate:
            compressed.evaluate(args.evaluate, args.metric, format=args.format)
            lap("evaluate_after")
        chosen = compressed.save_pretrained(output, format=args.format, overwrite=overwrite)
        stated = compressed.manifest | {"format": chosen}
        compressed.close()
        workdir.remove(self._work_dir)
        lap("save")
        pushed = {"url": self._push(output)} if args.push_to_hub else {}
        seconds["total"] = round(time.perf_counter() - begin, 2)
        return self._result(stated, seconds) | pushed

    def _order(self) -> tuple[Order | str | None, list[Stage] | None]:
        """What `compress` is to be given: an order, "auto" with its stages, or nothing."""
        from optimum_order.engine.recipe import canonical
        from optimum_order.search.planner import permutations

        args = self.args
        if (args.order == "auto") != (args.stages is not None):
            raise OrderError(
                "'--order auto' and '--stages' need each other: give both, such as --order auto --stages "
                '"wanda:0.5, gptq:4", or an order alone.'
            )
        if args.stages is None:
            return (None if args.order is None else canonical(Order.parse(args.order))), None
        for option in ("dry_run", "low_memory"):
            if getattr(args, option):
                raise OrderError(
                    f"'--order auto' runs the whole model to plan, which '--{option.replace('_', '-')}' is there to "
                    "avoid: plan first, with 'optimum-order plan', and give the order."
                )
        stages = parse_stages(args.stages)
        for order in permutations(stages):
            canonical(order)
        return "auto", stages

    @property
    def _work_dir(self) -> Path:
        output = Path(self.args.output)
        return (
            output.with_name(f"{output.name}.work")
            if self.args.work_dir is None
            else Path(self.args.work_dir)
        )

    def _is_there(self, output: Path) -> bool:
        """Whether the run that is to go on was stopped when it had written OUTPUT already."""
        from optimum_order.artifact import manifest
        from optimum_order.engine import workdir

        return (output / manifest.FILE).is_file() and workdir.led_to(
            self._work_dir, manifest.load(output)
        )

    def advice(self) -> str:
        from optimum_order.engine import workdir

        if not self._began or not workdir.is_ours(self._work_dir):
            return ""
        given = getattr(self.args, "argv", None)
        command = ["optimum-cli", *sys.argv[1:]] if given is None else ["optimum-order", *given]
        if "--resume" not in command:
            command.append("--resume")
        return f"what was finished is kept in '{self._work_dir}'; to go on: {shlex.join(command)}"

    def _convert(self, output: Path) -> dict[str, Any]:
        from optimum_order.artifact import hub, manifest
        from optimum_order.artifact.convert import convert

        args = self.args
        given = (
            hub.locate(args.model, revision=args.revision)
            if "/" in args.model
            else Path(args.model)
        )
        if not (given / manifest.FILE).is_file():
            raise OrderError(
                f"'--order' must say what is to be done to '{args.model}'. Without it only a model that optimum-order "
                "has saved can be exported, to save it in another format."
            )
        parser = argparse.ArgumentParser()
        self.parse_args(parser)
        default = vars(parser.parse_args([args.model, args.output]))
        for name in default.keys() - _CONVERTING:
            if getattr(args, name) != default[name]:
                option = name.replace("_", "-")
                raise OrderError(
                    f"'--{option}' means nothing without '--order': '{args.model}' is only stored anew."
                )
        begin = time.perf_counter()
        converted = convert(given, output, args.format, overwrite=args.overwrite)
        seconds = {"total": round(time.perf_counter() - begin, 2)}
        return self._result(converted, seconds) | (
            {"url": self._push(output)} if args.push_to_hub else {}
        )

    def _result(self, manifest: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        return {
            "output": str(Path(self.args.output)),
            "order": manifest["order"],
            "format": manifest["format"],
            "schedule": manifest["schedule"],
            "seconds": seconds,
            "bytes": manifest["bytes"],
            "sparsity": manifest["sparsity"],
            "metrics": {
                name: {when: measured and measured["value"] for when, measured in both.items()}
                for name, both in manifest["metrics"].items()
            },
        } | ({"plan": manifest["plan"]} if "plan" in manifest else {})

    def _push(self, output: Path) -> str:
        from optimum_order.artifact import hub

        repo_id = self.args.push_to_hub
        try:
            return hub.push(
                output, repo_id, private=self.args.private, create_pr=self.args.create_pr
            )
        except HubError as error:
            raise HubError(
                f"{error} The model is saved in '{output}': 'optimum-order push {output} {repo_id}' tries again."
            ) from error

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        if self.args.dry_run:
            _show_estimate(result)
            return
        table = Table(show_header=False)
        table.add_row("order", result["order"].replace(" > ", " → "))
        if "plan" in result:
            table.add_row("why", result["plan"]["reason"])
        for name, values in result["metrics"].items():
            before = "not measured" if values["before"] is None else f"{values['before']:.4g}"
            table.add_row(name, f"{before} → {values['after']:.4g}")
        table.add_row(
            "weights on disk",
            f"{size(result['bytes']['before'])} → {size(result['bytes']['after'])}",
        )
        table.add_row("bits per compressed weight", f"{result['bytes']['per_weight_bits']:.2f}")
        table.add_row("sparsity", f"{result['sparsity']:.1%}")
        table.add_row("format", result["format"])
        table.add_row(
            "seconds", ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items())
        )
        console = Console(markup=False, highlight=False)
        console.print(table)
        console.print(
            f"Saved to {result['output']}; transformers loads it from there {_how(result)}.",
            soft_wrap=True,
        )
        if "url" in result:
            console.print(f"Uploaded: {result['url']}", soft_wrap=True)


def _show_estimate(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("step", overflow="fold")
    for column in ("seconds", "peak memory", "in low memory", "tokens", "on disk"):
        table.add_column(column, justify="right")
    table.add_row("load", f"{result['loading']:.1f}", "", "", "", size(result["before"]))
    total = result["total"] | {"stages": "in all"}
    for step in [*result["steps"], total]:
        if step is total:
            table.add_section()
        table.add_row(
            step["stages"].replace(" > ", " → "),
            f"{step['seconds']:.1f}",
            size(step["memory"]),
            size(step["low_memory"]),
            f"{step['tokens']:,}" if step["tokens"] else "none",
            ("" if step["exact"] else "about ") + size(step["bytes"]),
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        f"Nothing was compressed. As {result['format']}; measuring the model and saving it come on top. The time is "
        "this machine's, as it is now.",
        soft_wrap=True,
    )


def _how(result: dict[str, Any]) -> str:
    """What transformers needs to load the result, as the end of a sentence."""
    from optimum_order import formats

    format = formats.available()[result["format"]]
    if format.import_first:
        return f"after 'import {format.import_first}'"
    return "by itself" if format.stock else f"where {', '.join(format.packages)} are installed"
