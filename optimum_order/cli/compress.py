"""`optimum-order compress`: compress a model and save it, or save a compressed one anew."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.search import show_selection
from optimum_order.cli.tables import arrows, console, metric_values, outcome_rows
from optimum_order.errors import FormatError, HubError, ModelError, OrderError, unknown
from optimum_order.files import size
from optimum_order.order import Order, Stage, parse_stages

if TYPE_CHECKING:
    from optimum_order.search.recipes import Carrying

_WITHOUT_ORDER = {
    "model",
    "revision",
    "output",
    "order",
    "format",
    "engine",
    "unproven",
    "overwrite",
    "push_to_hub",
    "private",
    "create_pr",
    "json",
}
"""The arguments that mean something without an order."""


class CompressCommand(Command):
    """Measures, compresses, measures again and saves; writes OUTPUT only if all of it went well."""

    name = "compress"
    aliases = ("export",)
    summary = "compress a model and save it"
    description = """\
Compress MODEL by the stages of an order, first to last, and save it to OUTPUT: a folder that
transformers loads by itself, without optimum-order. Without an order, MODEL is one that was
saved so, and is saved again with the same values in another format.
"""
    epilog = """\
how an order is written:
  stage > stage > ...              quote it: the shell would take '>' for itself
  a stage is  method:value         such as  wanda:0.5 (remove half) or gptq:4 (4 bit)
              method(key=value)    such as  gptq(bits=4, group_size=64)
              method               with its options at their defaults
  'optimum-order methods' lists the methods with all their options.

examples:
  optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4" --evaluate builtin
  optimum-order compress tiny-resnet out --order "gptq:4 > sparsegpt:0.5" --evaluate builtin
  optimum-order compress tiny-llama out --order auto --stages "wanda:0.5, gptq:4"
  optimum-order compress tiny-llama out --budget "2.5 bits"
  optimum-order compress ./my-model out --order "rtn:8" --format compressed-tensors
  optimum-order compress some/model out --order "sparsegpt(sparsity=0.5, pattern=2:4) > gptq:4" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt
  optimum-order compress out elsewhere --format sparse

A run that is cut off leaves its finished blocks in OUTPUT.work. The same command with --resume
continues from there, and OUTPUT is then, byte for byte, that of a run that was never cut off.
"""

    _began = False
    _refused = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.model(parser)
        parser.add_argument(
            "output", metavar="OUTPUT", help="the folder to write; refused if it is not empty"
        )
        parser.add_argument(
            "--order",
            help='the stages, first to last, such as "wanda:0.5 > gptq:4"; or auto, for the best '
            "order of --stages",
        )
        arguments.stages(parser, "with --order auto: the stages that 'optimum-order plan' orders")
        arguments.budget(parser, "in place of --order: ")
        parser.add_argument(
            "--format",
            default="auto",
            help="how to store it; auto (default) takes the smallest format that holds every layer "
            "exactly, needs nothing but transformers to load and is proven to load for the "
            "architecture; 'optimum-order methods' lists all",
        )
        arguments.engine(parser)
        parser.add_argument(
            "--unproven",
            action="store_true",
            help="take the --format even if it is not proven to load for the architecture",
        )
        arguments.calibration(parser)
        parser.add_argument(
            "--schedule",
            default="stage",
            help="stage (default): each stage walks the whole model before the next begins; block: "
            "all stages on one block before the next block, which is faster",
        )
        parser.add_argument(
            "--pause",
            default="auto",
            help="block: compress the layers of a block together; group: compress the layers that "
            "share an input when the forward reaches them, which is faster and takes more memory; "
            "auto (default) takes group where the activations fit",
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
        arguments.upload(parser)
        parser.add_argument(
            "--work-dir",
            metavar="DIR",
            help="holds the finished blocks until OUTPUT is written (default: OUTPUT.work)",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="continue from the work dir of a run that was cut off; every other argument must "
            "be the same",
        )
        parser.add_argument(
            "--low-memory",
            action="store_true",
            help="hold no more than a block of the model in memory; needs room on the disk for two "
            "copies of it",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace OUTPUT if it is not empty"
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="read no weights and write nothing: say how long compressing would take, how much "
            "memory, and how large OUTPUT would be",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import folder, hub
        from optimum_order.engine import workdir

        arguments.quiet_libraries()
        args = self.args
        # errors that need no computation come first
        searching = self._searches()
        order, stages = (None, None) if searching else self._order()
        self._check_names()
        overwrite = args.overwrite or (args.resume and self._is_written())
        folder.check_output(self._output, overwrite=overwrite)
        if args.push_to_hub:
            hub.check(args.push_to_hub)
        if searching:
            return self._search(overwrite)
        if order is None:
            return self._convert()
        workdir.check(self._work_dir, resume=args.resume)
        if args.low_memory and args.evaluate:
            raise ModelError(
                "'--evaluate' needs the whole model in memory, which '--low-memory' avoids: "
                "measure OUTPUT where there is room for it."
            )
        compressor = arguments.compressor(args)
        choice = {"unproven": args.unproven, "engine": args.engine}
        format = compressor.check_format(order, args.format, stages=stages, **choice)
        if args.dry_run:
            return compressor.estimate(
                order,
                args.schedule,
                pause="block" if args.low_memory else args.pause,
                format=format,
            ).as_dict()
        watch = _Stopwatch()
        if args.evaluate:
            compressor.evaluate(args.evaluate, args.metric)
            watch.lap("evaluate_before")
        self._began = True
        compressed = compressor.compress(
            order,
            args.schedule,
            stages=stages,
            pause=args.pause,
            work_dir=self._work_dir,
            resume=args.resume,
            low_memory=args.low_memory,
            format=args.format,
            **choice,
        )
        watch.lap("compress")
        try:
            if args.evaluate:
                compressed.evaluate(args.evaluate, args.metric, format=args.format, **choice)
                watch.lap("evaluate_after")
            format = compressed.save_pretrained(
                self._output, format=args.format, overwrite=overwrite, **choice
            )
        except FormatError:
            self._refused = True  # by the values of a layer, which nobody knew before
            raise
        manifest = compressed.manifest | {"format": format}
        compressed.close()
        workdir.remove(self._work_dir)
        watch.lap("save")
        return self._finish(manifest, watch)

    def _searches(self) -> bool:
        """Return whether a budget or a loss is given in place of an order."""
        from optimum_order.search.budget import limits

        args = self.args
        if args.budget is None and args.max_loss is None:
            return False
        limits(args.budget, args.max_loss)
        refused = {
            "order": args.order is not None,
            "stages": args.stages is not None,
            "schedule": args.schedule != "stage",
            "low-memory": args.low_memory,
            "dry-run": args.dry_run,
            "unproven": args.unproven,
        }
        for option, is_given in refused.items():
            if is_given:
                raise OrderError(
                    "'--budget' and '--max-loss' are given in place of an order, and the recipe is "
                    f"searched for: leave '--{option}' out, or leave these out and give an order."
                )
        return True

    def _search(self, overwrite: bool) -> dict[str, Any]:
        """Compress by the recipe of a search."""
        from optimum_order.engine import workdir

        args = self.args
        self._carrying.check()
        compressor = arguments.compressor(args)
        watch = _Stopwatch()
        if args.evaluate:
            compressor.evaluate(args.evaluate, args.metric)
            watch.lap("evaluate_before")
        self._began = True
        compressed = compressor.compress(
            budget=args.budget,
            max_loss=args.max_loss,
            pause=args.pause,
            work_dir=self._work_dir,
            resume=args.resume,
            format=args.format,
            engine=args.engine,
        )
        watch.lap("compress")
        choice = {"format": compressed.manifest["search"]["format"], "engine": args.engine}
        if args.evaluate:
            compressed.evaluate(args.evaluate, args.metric, **choice)
            watch.lap("evaluate_after")
        format = compressed.save_pretrained(self._output, overwrite=overwrite, **choice)
        manifest = compressed.manifest | {"format": format}
        for folder in self._carrying.folders():
            workdir.remove(folder)
        watch.lap("save")
        return self._finish(manifest, watch)

    @property
    def _carrying(self) -> Carrying:
        """How the recipes of a search are carried out."""
        from optimum_order.search.recipes import Carrying

        return Carrying(self.args.pause, self._work_dir, self.args.resume)

    @property
    def _work_dirs(self) -> list[Path]:
        """The work dirs that may be there."""
        if self.args.budget is None and self.args.max_loss is None:
            return [self._work_dir]
        return self._carrying.folders()

    def advice(self) -> str:
        from optimum_order.engine import workdir

        ours = [folder for folder in self._work_dirs if workdir.is_ours(folder)]
        if not self._began or not ours:
            return ""
        words = getattr(self.args, "argv", None)
        command = ["optimum-cli", *sys.argv[1:]] if words is None else ["optimum-order", *words]
        if "--resume" not in command:
            command.append("--resume")
        if self._refused:
            command += ["--format", "auto"]  # the last of several counts
        return f"the finished blocks are in '{ours[-1]}'; to resume: {shlex.join(command)}"

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        if self.args.dry_run:
            _show_estimate(result)
            return
        table = Table(show_header=False)
        table.add_row("order", arrows(result["order"]))
        for how in ("plan", "search"):
            if how in result:
                table.add_row("why", result[how]["reason"])
        for row in outcome_rows(result):
            table.add_row(*row)
        table.add_row("format", result["format"])
        seconds = ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items())
        table.add_row("seconds", seconds)
        screen = console()
        if "search" in result:
            show_selection(result["search"])
        screen.print(table)
        screen.print(
            f"Saved to {result['output']}; transformers loads it from there {_needs(result)}.",
            soft_wrap=True,
        )
        if "url" in result:
            screen.print(f"Uploaded: {result['url']}", soft_wrap=True)

    @property
    def _output(self) -> Path:
        return Path(self.args.output)

    @property
    def _work_dir(self) -> Path:
        if self.args.work_dir is None:
            return self._output.with_name(f"{self._output.name}.work")
        return Path(self.args.work_dir)

    def _order(self) -> tuple[Order | str | None, list[Stage] | None]:
        """Return the arguments of `compress`: an order, or "auto" and its stages; or neither."""
        from optimum_order.engine.recipe import canonical
        from optimum_order.search.plan import permutations

        args = self.args
        if (args.order == "auto") != (args.stages is not None):
            raise OrderError(
                "'--order auto' and '--stages' need each other: give both, such as --order auto "
                '--stages "wanda:0.5, gptq:4", or an order alone.'
            )
        if args.order is None:
            return None, None
        arguments.refuse_redirection(args.order)
        if args.stages is None:
            return canonical(Order.parse(args.order)), None
        for option in ("dry_run", "low_memory"):
            if getattr(args, option):
                raise OrderError(
                    "'--order auto' runs the whole model to plan, which "
                    f"'--{option.replace('_', '-')}' avoids: plan first, with 'optimum-order "
                    "plan', and give the order."
                )
        stages = parse_stages(args.stages)
        for order in permutations(stages):
            canonical(order)
        return "auto", stages

    def _check_names(self) -> None:
        from optimum_order import evaluation, formats
        from optimum_order.formats import engines

        args = self.args
        if args.engine is not None:
            engines.engine(args.engine)
        if args.format not in (names := ["auto", *formats.available()]):
            raise FormatError(unknown("format", args.format, names))
        if args.metric not in (names := ["auto", *evaluation.available()]):
            raise ModelError(unknown("metric", args.metric, names))

    def _is_written(self) -> bool:
        """Return whether the run to resume was cut off when OUTPUT was already written."""
        from optimum_order.artifact import manifest
        from optimum_order.engine import workdir

        if not (self._output / manifest.FILE).is_file():
            return False
        saved = manifest.load(self._output)
        return any(workdir.led_to(folder, saved) for folder in self._work_dirs)

    def _convert(self) -> dict[str, Any]:
        from optimum_order.artifact import hub, manifest
        from optimum_order.artifact.convert import convert

        args = self.args
        source = Path(args.model)
        if "/" in args.model:
            source = hub.locate(args.model, revision=args.revision)
        if not (source / manifest.FILE).is_file():
            raise OrderError(
                f"'--order' must say what is to be done to '{args.model}'. Without it only a model "
                "that optimum-order has saved can be compressed, to save it in another format."
            )
        parser = argparse.ArgumentParser()
        self.parse_args(parser)
        defaults = vars(parser.parse_args([args.model, args.output]))
        for name in defaults.keys() - _WITHOUT_ORDER:
            if getattr(args, name) != defaults[name]:
                raise OrderError(
                    f"'--{name.replace('_', '-')}' means nothing without '--order': '{args.model}' "
                    "is only stored anew."
                )
        watch = _Stopwatch()
        converted = convert(
            source,
            self._output,
            args.format,
            overwrite=args.overwrite,
            unproven=args.unproven,
            engine=args.engine,
        )
        return self._finish(converted, watch)

    def _finish(self, manifest: dict[str, Any], watch: _Stopwatch) -> dict[str, Any]:
        """Upload OUTPUT if asked for, and return the result."""
        watch.stop()
        result = {
            "output": str(self._output),
            "order": manifest["order"],
            "format": manifest["format"],
            "schedule": manifest["schedule"],
            "seconds": watch.seconds,
            "bytes": manifest["bytes"],
            "sparsity": manifest["sparsity"],
            "metrics": metric_values(manifest["metrics"]),
        }
        fields = ("plan", "search", "coverage", "unloaded")
        result |= {field: manifest[field] for field in fields if field in manifest}
        if self.args.push_to_hub:
            result["url"] = self._push()
        return result

    def _push(self) -> str:
        from optimum_order.artifact import hub

        args = self.args
        repo_id = args.push_to_hub
        try:
            return hub.push(self._output, repo_id, private=args.private, create_pr=args.create_pr)
        except HubError as error:
            raise HubError(
                f"{error} The model is saved in '{self._output}': 'optimum-order push "
                f"{self._output} {repo_id}' tries again."
            ) from error


class _Stopwatch:
    """The seconds of each step of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Record the seconds since the last step as those of this one."""
        now = time.perf_counter()
        self.seconds[step] = round(now - self._last, 2)
        self._last = now

    def stop(self) -> None:
        """Record the seconds of all steps together."""
        self.seconds["total"] = round(time.perf_counter() - self._begin, 2)


def _show_estimate(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("step", overflow="fold")
    for column in ("seconds", "peak memory", "in low memory", "tokens", "on disk"):
        table.add_column(column, justify="right")
    table.add_row("load", f"{result['loading']:.1f}", "", "", "", size(result["before"]))
    for step in (*result["steps"], result["total"] | {"stages": "in all"}):
        if step["stages"] == "in all":
            table.add_section()
        table.add_row(
            arrows(step["stages"]),
            f"{step['seconds']:.1f}",
            size(step["memory"]),
            size(step["low_memory"]),
            f"{step['tokens']:,}" if step["tokens"] else "none",
            ("" if step["exact"] else "about ") + size(step["bytes"]),
        )
    screen = console()
    screen.print(table)
    screen.print(
        f"Nothing was compressed. As {result['format']}; measuring the model and saving it come on "
        "top. The time is this machine's, under its load of this moment.",
        soft_wrap=True,
    )


def _needs(result: dict[str, Any]) -> str:
    """Return what transformers needs to load the result, as the end of a sentence."""
    from optimum_order import formats

    format = formats.available()[result["format"]]
    if format.import_first:
        return f"after 'import {format.import_first}'"
    if format.stock:
        return "by itself"
    told = f"with gguf_file='{format.gguf_file}', " if format.gguf_file else ""
    return f"{told}where {', '.join(format.packages)} are installed"
