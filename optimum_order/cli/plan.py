"""`optimum-order plan`: which order of some stages is best for a model, and how sure that is."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.order import parse_stages

DESCRIPTION = """\
Rank every order of two to five stages for MODEL, without saving anything.
"""

EPILOG = """\
strategies:
  auto     every order on a few layers, each with a small calibration draw of its own, then on more, until one is
           surely ahead; whole models on a few samples where layers alone do not say
  measure  every order in full, with --draws calibration draws; an order is only called decisively better with two
           or more, unless no stage looks at calibration data
  pih      weaker first, stronger later, by what each stage costs alone
  proxy    by the layers' output errors on inputs of the original model

examples:
  optimum-order plan tiny-llama --stages "wanda:0.5, gptq:4"
  optimum-order plan ./my-model --stages "magnitude:0.4, wanda:0.5, gptq(bits=4, group_size=64)" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt --json
"""


class PlanCommand(Command):
    """Prints the recommended order, what is expected of it, and what it cost to know."""

    @staticmethod
    def parse_args(parser):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.epilog = EPILOG
        arguments.model(parser)
        parser.add_argument(
            "--stages",
            required=True,
            help='what to order, separated by commas, such as "wanda:0.5, gptq:4"',
        )
        parser.add_argument(
            "--strategy", default="auto", help="auto (default), measure, pih or proxy: see below"
        )
        arguments.calibration(parser)
        parser.add_argument(
            "--evaluate",
            metavar="SRC",
            default="builtin",
            help=f"what orders are scored on: {arguments.SOURCE}; default: builtin",
        )
        parser.add_argument(
            "--evaluation-samples",
            metavar="N",
            type=int,
            help="how many windows from all over that text, or images (default: 64 or 1000); auto uses few of them",
        )
        arguments.metric(parser)
        parser.add_argument(
            "--draws",
            metavar="N",
            type=int,
            default=1,
            help="how many disjoint calibration draws 'measure' runs (default %(default)s, whose interval then covers "
            "samples only)",
        )
        arguments.loading(parser)
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else"
        )

    def work(self) -> dict[str, Any]:
        arguments.hush_libraries()
        stages = parse_stages(self.args.stages)
        found = arguments.compressor(self.args).plan(
            stages,
            self.args.strategy,
            metric=self.args.metric,
            evaluation=self.args.evaluate,
            evaluation_samples=self.args.evaluation_samples,
            draws=self.args.draws,
        )
        return found.as_dict()

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("order, best first", overflow="fold")
        table.add_column(result["scored_by"], justify="right")
        for row in result["ranking"]:
            score = "not measured" if row["score"] is None else f"{row['score']:.4g}"
            table.add_row(row["order"].replace(" > ", " → "), score)
        console = Console(markup=False, highlight=False)
        console.print(table)
        unit = "log-perplexity" if result["metric"] == "perplexity" else result["metric"]
        if result["difference"]:
            gap = result["difference"]
            console.print(
                f"{unit} gained over the next: {gap['mean']:+.4f}, "
                f"{gap['confidence']:.0%} interval over {gap['over']} {gap['low']:+.4f} to {gap['high']:+.4f}"
            )
        console.print(
            f"{'Decisive' if result['decisive'] else 'Not decisive'}: {result['reason']}",
            soft_wrap=True,
        )
        console.print(f"It took {result['cost']['seconds']:.1f} seconds.")
