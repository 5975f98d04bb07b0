"""`optimum-order study`: run many orders of a model and write down what the order is worth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.errors import ModelError, OrderError, OutputError
from optimum_order.order import Order, parse_stages

DESCRIPTION = """\
Run both orders of every pair of a pruning and a quantising stage on MODEL, each stage alone, and any
other orders, and write what came of it to DIR: report.html to read, summary.json, trials.csv and plots.
Trials are stored as they finish: stopped and started again, a study goes on where it was.
"""

EPILOG = """\
the grid, where none of its options and no --orders is given:
  --pruners magnitude,wanda,sparsegpt --sparsities 0.3,0.5,0.65 --quantizers rtn,gptq --bits 2,3,4
  which is 54 pairs

an --orders file has one order in a line; what follows a # is a comment:
  wanda:0.4 > gptq:4 > magnitude:0.55
  wanda:0.3 > gptq:4 > wanda:0.5      # P > Q > P

examples:
  optimum-order study tiny-llama -o study
  optimum-order study tiny-vit --sparsities 0.4,0.6 --bits 3,4 --quantizers "gptq(group_size=16)" -o study
  optimum-order study some/model --calibration my-text.txt --evaluate held-out.txt --orders orders.txt -o study
  optimum-order study --report-only -o study
"""

GRID = {
    "pruners": "magnitude,wanda,sparsegpt",
    "sparsities": "0.3,0.5,0.65",
    "quantizers": "rtn,gptq",
    "bits": "2,3,4",
}
_LONGEST_FILE = 10**6

Number = TypeVar("Number", int, float)


class StudyCommand(Command):
    """Runs a study, or goes on with one, and reports."""

    @staticmethod
    def parse_args(parser):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.epilog = EPILOG
        arguments.model(parser, required=False)
        parser.add_argument(
            "-o", "--output", metavar="DIR", required=True, help="the folder of the study"
        )
        parser.add_argument(
            "--pruners",
            metavar="STAGES",
            help="pruning methods of the grid, without their sparsity",
        )
        parser.add_argument(
            "--sparsities", metavar="LIST", help="fractions to remove, each in [0, 1)"
        )
        parser.add_argument(
            "--quantizers", metavar="STAGES", help="quantising methods, without their bits"
        )
        parser.add_argument("--bits", metavar="LIST", help="bit widths")
        parser.add_argument(
            "--orders",
            metavar="FILE",
            help="orders of any number of stages, one in a line; with options of the grid besides it, in place of it "
            "otherwise",
        )
        parser.add_argument(
            "--simulate",
            action="store_true",
            help="let pruning after quantising leave the grid, as papers do; such models cannot be saved quantised",
        )
        parser.add_argument(
            "--draws",
            metavar="N",
            type=int,
            default=3,
            help="run everything with so many calibration draws that share no sample (default %(default)s): which "
            "order is better may depend on the draw",
        )
        arguments.metric(parser)
        parser.add_argument(
            "--evaluate",
            metavar="SRC",
            default="builtin",
            help="what to measure on (default %(default)s)",
        )
        parser.add_argument(
            "--evaluation-samples",
            metavar="N",
            type=int,
            help="how many windows from all over that text (default 64), or images (default 1000)",
        )
        arguments.calibration(parser)
        arguments.loading(parser)
        parser.add_argument(
            "--prefix-limit",
            metavar="GB",
            type=float,
            default=16.0,
            help="disk that beginnings which orders share may take while it runs (default %(default)g)",
        )
        parser.add_argument(
            "--report-only",
            action="store_true",
            help="run nothing: write the report of the trials that DIR has",
        )
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else"
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.study import report
        from optimum_order.study.trials import Trials, check_folder

        arguments.hush_libraries()
        args, folder = self.args, Path(self.args.output)
        if args.report_only:
            trials = Trials.open(folder)
            studied = trials.settings.get("model")
            if args.model and studied not in (args.model, Path(args.model).resolve().name):
                raise OutputError(
                    f"'{folder}' holds a study of '{studied}', not of '{args.model}'. Leave MODEL out."
                )
            summary = report.write(trials, folder)
        elif args.model is None:
            raise ModelError("Say which MODEL to study: a folder, a Hub id or 'tiny-llama'.")
        else:
            orders = (
                self._orders()
            )  # what can be refused at once is refused before anything is read or computed
            check_folder(folder)
            summary = arguments.compressor(args).study(
                orders,
                folder,
                draws=args.draws,
                metric=args.metric,
                evaluation=args.evaluate,
                evaluation_samples=args.evaluation_samples,
                prefix_limit=args.prefix_limit,
            )
        return {"output": str(folder), "report": str(folder / report.REPORT), "summary": summary}

    def _orders(self) -> list[Order]:
        from optimum_order.engine.recipe import canonical
        from optimum_order.study.grid import grid, off_grid

        args, orders = self.args, []
        given = {name: getattr(args, name) for name in GRID if getattr(args, name) is not None}
        if given or not args.orders:
            chosen = GRID | given
            orders += grid(
                parse_stages(chosen["pruners"]),
                _numbers("sparsities", chosen["sparsities"], float),
                parse_stages(chosen["quantizers"]),
                _numbers("bits", chosen["bits"], int),
            )
        if args.orders:
            orders += read_orders(Path(args.orders))
        return [off_grid(order) if args.simulate else canonical(order) for order in orders]

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        from optimum_order.study import report

        summary = result["summary"]
        console = Console(markup=False, highlight=False)
        rows = report.table(summary, short=True)
        if len(rows) > 1:
            table = Table(
                caption="right in decisive pairs: always pruning first, always the weaker method first"
            )
            for at, heading in enumerate(rows[0]):
                table.add_column(heading, justify="right" if at else "left", no_wrap=not at)
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
        for question, answer in report.findings(summary):
            console.print(f"{question} {answer}", soft_wrap=True)
        missing = len(summary["trials"]["missing"])
        if missing:
            console.print(
                f"{missing} trials are missing; without --report-only the study goes on with them."
            )
        console.print(f"Report: {result['report']}", soft_wrap=True)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a list such as 2,3,4."""
    what = "whole numbers" if kind is int else "numbers"
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise OrderError(
            f"--{option} takes {what} with commas between them, such as {GRID[option]}, got {text!r}."
        ) from None


def read_orders(file: Path) -> list[Order]:
    """The orders of a file, one in each line.

    Raises:
        OrderError: If it cannot be read, or a line is no order; it says which.
    """
    from optimum_order.engine.recipe import canonical

    try:
        if file.stat().st_size > _LONGEST_FILE:
            raise OrderError(
                f"'{file}' is too long for a list of orders: {_LONGEST_FILE} bytes are allowed."
            )
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise OrderError(f"The orders in '{file}' cannot be read: {reason}.") from error
    orders = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        try:
            orders += [canonical(Order.parse(text))] if text else []
        except OrderError as error:
            raise OrderError(f"Line {number} of '{file}': {error}") from error
    if not orders:
        raise OrderError(
            f"'{file}' has no order. Write one in each line, such as 'wanda:0.5 > gptq:4'."
        )
    return orders
