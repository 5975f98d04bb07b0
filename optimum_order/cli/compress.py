"""`optimum-order compress`: compress a model and save it, or save a compressed one anew."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command, launched
from optimum_order.cli.convert import convert, located
from optimum_order.cli.parser import group_of, listed, one_of
from optimum_order.cli.results import Stopwatch, saved, show_saved
from optimum_order.cli.search import show_selection
from optimum_order.cli.tables import arrows, console
from optimum_order.errors import FormatError, HubError, ModelError, OrderError
from optimum_order.files import check_room, duration, size
from optimum_order.order import Order, Stage, parse_stages

if TYPE_CHECKING:
    from optimum_order.calibration.ranks import Ranks
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
    "max_shard_size",
    "num_threads",
    *("config", "json", "quiet", "verbose", "no_progress", "debug"),
}
"""The arguments that mean something without an order."""


class CompressCommand(Command):
    """Measures, compresses, measures again and saves; writes OUTPUT only if all of it went well."""

    name = "compress"
    aliases = ("export",)
    summary = "compress a model and save it"
    description = """\
Compress MODEL by the stages of an order, first to last, and save it to
OUTPUT: a folder that transformers loads by itself, without optimum-order.
"""
    epilog = """\
how an order is written:
  stage > stage > ...       quote it: the shell would take '>' for itself;
                            '->', '+' and '→' mean the same
  a stage is  method:value       wanda:0.5 (remove half), gptq:4 (4 bit)
              method(key=value)  gptq(bits=4, group_size=64)
              method             with its options at their defaults
  'optimum-order methods' lists the methods with all their options.

examples:
  optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4"
  optimum-order compress tiny-resnet out --order "gptq:4 > sparsegpt:0.5" \\
      --evaluate builtin
  optimum-order compress tiny-llama out --order auto \\
      --stages "wanda:0.5, gptq:4"
  optimum-order compress tiny-llama out --budget "2.5 bits"
  optimum-order compress ./my-model out --order "rtn:8" \\
      --format compressed-tensors
  optimum-order compress some/model out \\
      --order "gptq(bits=4, group_size=64) > wanda:0.3" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt
  optimum-order compress again --config out/recipe.yaml

A run that is cut off leaves its finished blocks in OUTPUT.work. The same
command with --resume continues from there, and OUTPUT is then, byte for byte,
that of a run that was never cut off.

Several processes share the work, and OUTPUT is that of the first:
  torchrun --nproc-per-node 2 -m optimum_order compress MODEL OUTPUT ...
"""

    shares = True
    _began = False
    _refused = False
    _ranks: Ranks | None = None
    """The processes that share the work; None for this one alone."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group_of(parser, "what is done")  # above all others in the help
        arguments.model(parser)
        arguments.output(parser, "the folder to write; refused if it is not empty")
        arguments.config(parser)
        group = group_of(parser, "what is done")
        group.add_argument(
            "--order",
            help='the stages, first to last, such as "wanda:0.5 > gptq:4"; or auto, for the best '
            "order of --stages",
        )
        arguments.stages(parser, "with --order auto: the stages that 'optimum-order plan' orders")
        arguments.budget(parser, "in place of --order: ")
        group.add_argument(
            "--schedule",
            default="stage",
            type=one_of("schedule", arguments.SCHEDULES),
            metavar=listed(arguments.SCHEDULES),
            help="stage (default): each stage walks the whole model before the next begins; block: "
            "all stages on one block before the next block, which is faster",
        )
        arguments.pause(parser)
        arguments.loading(parser)
        arguments.calibration(parser)
        arguments.metric(parser)
        group_of(parser, "evaluation").add_argument(
            "--evaluate",
            metavar="SRC",
            help="measure the model on this before and after; all of it is used",
        )
        arguments.evaluation(parser)
        arguments.format(
            parser,
            "auto (default) takes the smallest format that holds every layer exactly, needs "
            "nothing but transformers to load and is proven to load for the architecture",
        )
        arguments.engine(parser)
        arguments.writing(parser)
        group_of(parser, "the Hub").add_argument(
            "--push-to-hub",
            metavar="ID",
            help="then upload OUTPUT to namespace/name on the Hub, with a model card",
        )
        arguments.upload(parser)
        group = group_of(parser, "long runs")
        group.add_argument(
            "--work-dir",
            metavar="DIR",
            help="holds the finished blocks until OUTPUT is written (default: OUTPUT.work)",
        )
        group.add_argument(
            "--resume",
            action="store_true",
            help="continue from the work dir of a run that was cut off; every other argument must "
            "be the same",
        )
        group.add_argument(
            "--low-memory",
            action="store_true",
            help="hold no more than a block of the model in memory; needs room on the disk for two "
            "copies of it",
        )
        group.add_argument(
            "--dry-run",
            action="store_true",
            help="read no weights and write nothing: say how long compressing would take, how much "
            "memory, and how large OUTPUT would be",
        )

    def work(self) -> dict[str, Any]:
        arguments.quiet_libraries()
        if launched()[1] == 1:
            return self._work()
        from optimum_order.calibration.ranks import Ranks

        with Ranks.joined() as ranks:
            self._ranks = ranks
            self._refuse_alone()
            self.args.device = ranks.device(self.args.device)
            result = self._work()
        if not self._leads:
            sys.exit(0)
        return result

    def speaks(self) -> bool:
        return super().speaks() if self._ranks is None else self._ranks.first_to_fail()

    @property
    def _leads(self) -> bool:
        """True in the process that owns the work dir and OUTPUT."""
        return self._ranks is None or self._ranks.rank == 0

    def _refuse_alone(self) -> None:
        """Refuse what several processes cannot share."""
        args = self.args
        alone = {
            "order auto": args.order == "auto",
            "budget": args.budget is not None,
            "max-loss": args.max_loss is not None,
            "dry-run": args.dry_run,
        }
        for option, is_given in alone.items():
            if is_given:
                raise OrderError(
                    f"'--{option}' is for one process: start it without torchrun, and share the "
                    "work of an order."
                )
        if args.order is None:
            raise OrderError("Several processes share the work of an order: give '--order'.")

    def _work(self) -> dict[str, Any]:
        from optimum_order.artifact import folder, hub
        from optimum_order.engine import workdir

        args = self.args
        # errors that need no computation come first
        searching = self._searches()
        order, stages = (None, None) if searching else self._order()
        arguments.check_names(args)
        arguments.apply_protocol(args)
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
        if order != "auto" and not args.resume:  # what is finished already is not thrown away
            predicted = compressor.result_bytes(order, format)
            if predicted is not None:
                check_room(Path(self._output), predicted)
        watch = Stopwatch()
        if args.evaluate and self._leads:
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
            ranks=self._ranks,
            **choice,
        )
        watch.lap("compress")
        if not self._leads:
            compressed.close()
            return {}
        try:
            if args.evaluate:
                compressed.evaluate(args.evaluate, args.metric, format=args.format, **choice)
                watch.lap("evaluate_after")
            format = compressed.save_pretrained(
                self._output,
                format=args.format,
                overwrite=overwrite,
                max_shard_size=args.max_shard_size,
                **choice,
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
        watch = Stopwatch()
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
        format = compressed.save_pretrained(
            self._output, overwrite=overwrite, max_shard_size=args.max_shard_size, **choice
        )
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
        if self.args.dry_run:
            _show_estimate(result)
            return
        if "search" in result:
            show_selection(result["search"])
        show_saved(result)

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
        from optimum_order.search.plan import runnable

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
        arguments.refuse_redirection(args.stages, "--stages")
        stages = parse_stages(args.stages)
        runnable(stages, canonical)
        return "auto", stages

    def _is_written(self) -> bool:
        """Return whether the run to resume was cut off when OUTPUT was already written."""
        from optimum_order.artifact import manifest
        from optimum_order.engine import workdir

        if not (self._output / manifest.FILE).is_file():
            return False
        saved = manifest.load(self._output)
        return any(workdir.led_to(folder, saved) for folder in self._work_dirs)

    def _convert(self) -> dict[str, Any]:
        from optimum_order.artifact import manifest

        args = self.args
        source = located(args.model, args.revision)
        if not (source / manifest.FILE).is_file():
            raise OrderError(
                f"'--order' must say what is to be done to '{args.model}', such as --order "
                "'wanda:0.5 > gptq:4', or '--budget 60MB' what it may take. Without these only a "
                "model that optimum-order has saved is taken, to save it in another format."
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
        watch = Stopwatch()
        return self._finish(convert(source, self._output, args), watch)

    def _finish(self, manifest: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        """Upload OUTPUT if asked for, and return the result."""
        result = saved(manifest, self._output, watch)
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


def _show_estimate(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("step", overflow="fold")
    for column in ("time", "peak memory", "in low memory", "tokens", "on disk"):
        table.add_column(column, justify="right")
    table.add_row("load", duration(result["loading"]), "", "", "", size(result["before"]))
    for step in (*result["steps"], result["total"] | {"stages": "in all"}):
        if step["stages"] == "in all":
            table.add_section()
        table.add_row(
            arrows(step["stages"]),
            duration(step["seconds"]),
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
