"""`optimum-order plan`: the best order of some stages for a model, and how certain it is."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.tables import arrows, console
from optimum_order.order import parse_stages


class PlanCommand(Command):
    """Prints the recommended order, its expected gain, and the cost of the answer."""

    name = "plan"
    summary = "find the order of some stages that hurts a model least"
    description = """\
Rank every order of two to five stages for MODEL, without saving anything.
"""
    epilog = """\
strategies:
  auto     every order on a few layers, each with a small calibration draw of its own, then on more,
           until one is surely ahead; whole models on a few samples where layers alone do not say
  measure  every order in full, with --draws calibration draws; an order is only called decisively
           better with two or more, unless no stage looks at calibration data
  pih      weaker first, stronger later, by the loss of each stage alone
  proxy    by the layers' output errors on inputs of the original model

examples:
  optimum-order plan tiny-llama --stages "wanda:0.5, gptq:4"
  optimum-order plan ./my-model --stages "magnitude:0.4, wanda:0.5, gptq(bits=4, group_size=64)" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt --json
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.model(parser)
        arguments.stages(parser, "the stages to order", required=True)
        parser.add_argument(
            "--strategy", default="auto", help="auto (default), measure, pih or proxy: see below"
        )
        arguments.calibration(parser)
        arguments.measuring(
            parser,
            draws=1,
            draws_help="'measure' runs them all; with one, its interval covers samples only",
        )
        arguments.loading(parser)

    def work(self) -> dict[str, Any]:
        arguments.quiet_libraries()
        stages = parse_stages(self.args.stages)
        compressor = arguments.compressor(self.args)
        plan = compressor.plan(stages, self.args.strategy, **arguments.measurement(self.args))
        return plan.as_dict()

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        table = Table()
        table.add_column("order, best first", overflow="fold")
        table.add_column(result["scored_by"], justify="right")
        for row in result["ranking"]:
            score = "not measured" if row["score"] is None else f"{row['score']:.4g}"
            table.add_row(arrows(row["order"]), score)
        screen = console()
        screen.print(table)
        if gap := result["difference"]:
            unit = "log-perplexity" if result["metric"] == "perplexity" else result["metric"]
            screen.print(
                f"{unit} gained over the next: {gap['mean']:+.4f}, {gap['confidence']:.0%} "
                f"interval over {gap['over']} {gap['low']:+.4f} to {gap['high']:+.4f}"
            )
        verdict = "Decisive" if result["decisive"] else "Not decisive"
        screen.print(f"{verdict}: {result['reason']}", soft_wrap=True)
        screen.print(f"It took {result['cost']['seconds']:.1f} seconds.")
