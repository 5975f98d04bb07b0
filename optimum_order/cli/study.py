"""`optimum-order study`: run many orders of a model and report what the order is worth."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.parser import group_of
from optimum_order.cli.tables import console
from optimum_order.errors import ModelError, OptimumOrderError, OrderError, OutputError
from optimum_order.order import Order, parse_stages

if TYPE_CHECKING:
    from optimum_order.compressor import JointCompressor
    from optimum_order.estimate.forecast import Forecast

logger = logging.getLogger(__name__)

GRID = {
    "pruners": "magnitude,wanda,sparsegpt",
    "sparsities": "0.3,0.5,0.65",
    "quantizers": "rtn,gptq",
    "bits": "2,3,4",
}
_MOST_BYTES = 10**6
_MANY = 100
"""Orders times draws from which a study first says how long it takes; to know that takes seconds
itself."""

Number = TypeVar("Number", int, float)


class StudyCommand(Command):
    """Runs a study, or continues one, and reports."""

    name = "study"
    summary = "run many orders of a model and report what the order is worth"
    description = """\
Run both orders of every pair of a pruning and a quantizing stage on MODEL,
each stage alone, and any other orders, and write the results to OUTPUT:
report.html to read, summary.json, trials.csv and plots. Trials are stored as
they finish: stopped and started again, a study continues.
"""
    epilog = """\
the grid, where none of its options and no --orders is given:
  --pruners magnitude,wanda,sparsegpt --sparsities 0.3,0.5,0.65
  --quantizers rtn,gptq --bits 2,3,4
  which is 54 pairs

an --orders file has one order in a line; what follows a # is a comment:
  wanda:0.4 > gptq:4 > magnitude:0.55
  wanda:0.3 > gptq:4 > wanda:0.5      # P > Q > P

examples:
  optimum-order study tiny-llama study
  optimum-order study tiny-vit study --sparsities 0.4,0.6 --bits 3,4 \\
      --quantizers "gptq(group_size=16)"
  optimum-order study some/model study --orders orders.txt \\
      --calibration my-text.txt --evaluate held-out.txt
  optimum-order study study --report-only
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group_of(parser, "what is done")  # above all others in the help
        arguments.model(parser, required=False)
        arguments.output(parser, "the folder of the study", required=False)
        arguments.config(parser)
        parser.add_argument("-o", "--output", dest="place", help=argparse.SUPPRESS)  # of 0.1.0
        group = group_of(parser, "what is done")
        for option, values, help in [
            ("pruners", "STAGES", "pruning methods of the grid, without their sparsity"),
            ("sparsities", "LIST", "fractions to remove, each in [0, 1)"),
            ("quantizers", "STAGES", "quantizing methods, without their bits"),
            ("bits", "LIST", "bit widths"),
        ]:
            group.add_argument(f"--{option}", metavar=values, help=help)
        group.add_argument(
            "--orders",
            metavar="FILE",
            help="orders of any number of stages, one in a line; with options of the grid, besides "
            "it, and in place of it otherwise",
        )
        group.add_argument(
            "--simulate",
            action="store_true",
            help="let pruning after quantizing leave the grid, as papers do; such models cannot be "
            "saved quantized",
        )
        arguments.pause(parser)
        arguments.loading(parser)
        arguments.calibration(parser)
        arguments.measuring(
            parser,
            draws=3,
            draws_help="everything runs with each, for the better order may depend on the draw",
        )
        group = group_of(parser, "long runs")
        group.add_argument(
            "--prefix-limit",
            metavar="GB",
            type=float,
            default=16.0,
            help="disk for the beginnings that orders share, while it runs (default %(default)g)",
        )
        group.add_argument(
            "--workers",
            metavar="N",
            type=int,
            default=1,
            help="processes that run trials, each with a copy of the model (default %(default)s)",
        )
        group.add_argument(
            "--cluster",
            metavar="ADDRESS",
            help="run the workers on this Ray cluster, or auto for the one of this machine",
        )
        group.add_argument(
            "--dry-run",
            action="store_true",
            help="run nothing and read no weight: say how many trials there are, how long they "
            "take and in how much memory",
        )
        group.add_argument(
            "--report-only",
            action="store_true",
            help="run nothing: write the report of the trials in OUTPUT; MODEL may be left out",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.study import report

        arguments.quiet_libraries()
        self._place()
        if self.args.dry_run:
            return self._run()
        summary = self._read() if self.args.report_only else self._run()
        folder = self._folder
        return {"output": str(folder), "report": str(folder / report.REPORT), "summary": summary}

    def _place(self) -> None:
        """Tell MODEL from OUTPUT: a report alone needs no model, and 0.1.0 had -o.

        Raises:
            OutputError: If there is no OUTPUT.
        """
        args = self.args
        if args.place is None and args.output is None and args.report_only:
            args.model, args.output = None, args.model
        args.output = args.place or args.output
        if args.output is None:
            raise OutputError(
                "Say where to write: 'optimum-order study MODEL OUTPUT', with a folder for OUTPUT."
            )

    @property
    def _folder(self) -> Path:
        return Path(self.args.output)

    def _read(self) -> dict[str, Any]:
        """Return the summary of the trials in the folder, after writing its report."""
        from optimum_order.study import report
        from optimum_order.study.trials import Trials

        model = self.args.model
        trials = Trials.open(self._folder)
        studied = trials.settings.get("model")
        if model and studied not in (model, Path(model).resolve().name):
            raise OutputError(
                f"'{self._folder}' holds a study of '{studied}', not of '{model}'. Leave MODEL out."
            )
        return report.write(trials, self._folder)

    def _run(self) -> dict[str, Any]:
        """Return the summary of a study, after running it."""
        from optimum_order.study.trials import check_folder

        if self.args.model is None:
            raise ModelError("Say which MODEL to study: a folder, a Hub id or 'tiny-llama'.")
        # errors that need no computation come first
        arguments.check_names(self.args)
        orders = self._orders()
        if not self.args.dry_run:
            check_folder(self._folder)
        compressor = arguments.compressor(self.args)
        if self.args.dry_run:
            return {"forecast": self._forecast(compressor, orders).as_dict()}
        if len(orders) * self.args.draws >= _MANY:
            # what cannot be studied is refused by the study itself, in its own words
            with contextlib.suppress(OptimumOrderError):
                logger.info("The study has %s", self._forecast(compressor, orders))
        return compressor.study(
            orders,
            self._folder,
            pause=self.args.pause,
            prefix_limit=self.args.prefix_limit,
            workers=self.args.workers,
            cluster=self.args.cluster,
            command=arguments.typed(),
            **arguments.measurement(self.args),
        )

    def _forecast(self, compressor: JointCompressor, orders: list[Order]) -> Forecast:
        """Return what the study would take."""
        from optimum_order.study.grid import references, with_parts

        return compressor.forecast(
            with_parts([*orders, *references()]),
            draws=self.args.draws,
            evaluation_samples=self.args.evaluation_samples,
        )

    def _orders(self) -> list[Order]:
        from optimum_order.engine.recipe import canonical
        from optimum_order.study.grid import grid, off_grid

        args = self.args
        orders: list[Order] = []
        options = {name: getattr(args, name) for name in GRID if getattr(args, name) is not None}
        if options or not args.orders:
            values = GRID | options
            orders += grid(
                parse_stages(values["pruners"]),
                _numbers("sparsities", values["sparsities"], float),
                parse_stages(values["quantizers"]),
                _numbers("bits", values["bits"], int),
            )
        if args.orders:
            orders += read_orders(Path(args.orders))
        return [off_grid(order) if args.simulate else canonical(order) for order in orders]

    def show(self, result: dict[str, Any]) -> None:
        if "forecast" in result:
            console().print(f"Nothing was run. {result['forecast']['summary']}.", soft_wrap=True)
            return
        from rich.table import Table

        from optimum_order.study import report

        summary = result["summary"]
        screen = console()
        heading, *rows = report.table(summary, short=True)
        if rows:
            caption = (
                "right in decisive pairs: always pruning first, always the weaker method first"
            )
            table = Table(caption=caption)
            for index, text in enumerate(heading):
                table.add_column(text, justify="right" if index else "left", no_wrap=not index)
            for row in rows:
                table.add_row(*row)
            screen.print(table)
        for question, answer in report.findings(summary):
            screen.print(f"{question} {answer}", soft_wrap=True)
        if missing := len(summary["trials"]["missing"]):
            screen.print(
                f"{missing} trials are missing; without --report-only the study runs them."
            )
        screen.print(f"Report: {result['report']}", soft_wrap=True)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers of a list such as 2,3,4."""
    wanted = "whole numbers" if kind is int else "numbers"
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise OrderError(
            f"--{option} takes {wanted} with commas between them, such as {GRID[option]}, got "
            f"{text!r}."
        ) from None


def read_orders(file: Path) -> list[Order]:
    """Return the orders of a file, one in each line.

    Raises:
        OrderError: If the file cannot be read, or a line is no order; the message names the line.
    """
    from optimum_order.engine.recipe import canonical

    try:
        if file.stat().st_size > _MOST_BYTES:
            raise OrderError(
                f"'{file}' is too long for a list of orders: {_MOST_BYTES} bytes are allowed. "
                "Split it."
            )
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise OrderError(f"The orders in '{file}' cannot be read: {reason}.") from error
    orders: list[Order] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        try:
            orders.append(canonical(Order.parse(text)))
        except OrderError as error:
            raise OrderError(f"Line {number} of '{file}': {error}") from error
    if not orders:
        raise OrderError(
            f"'{file}' has no order. Write one in each line, such as 'wanda:0.5 > gptq:4'."
        )
    return orders
