"""`optimum-order plan`: the best order of some stages for a model, and how certain it is."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.parser import group_of, listed, one_of
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
  auto     every order on a few layers, each with a small calibration draw of
           its own, then on more, until one is surely ahead; whole models on a
           few samples where layers alone do not say
  measure  every order in full, with --draws calibration draws; an order is
           only called decisively better with two or more, unless no stage
           looks at calibration data
  pih      weaker first, stronger later, by the loss of each stage alone
  proxy    by the layers' output errors on inputs of the original model

examples:
  optimum-order plan tiny-llama --stages "wanda:0.5, gptq:4"
  optimum-order plan ./my-model --stages "magnitude:0.4, wanda:0.5, gptq:4" \\
      --calibration my-text.txt --evaluate my-held-out-text.txt --json
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group_of(parser, "what is done")  # above all others in the help
        arguments.model(parser)
        arguments.config(parser)
        arguments.stages(parser, "the stages to order", required=True)
        group_of(parser, "what is done").add_argument(
            "--strategy",
            default="auto",
            type=one_of("strategy", arguments.STRATEGIES),
            metavar=listed(arguments.STRATEGIES),
            help="how orders are compared (default auto): see below",
        )
        group_of(parser, "what is done").add_argument(
            "--dry-run",
            action="store_true",
            help="run nothing and read no weight: say how long every order in full would take, "
            "and in how much memory",
        )
        arguments.pause(parser)
        arguments.calibration(parser)
        arguments.measuring(
            parser,
            draws=1,
            draws_help="'measure' runs them all; with one, its interval covers samples only",
        )
        arguments.loading(parser)

    def work(self) -> dict[str, Any]:
        from optimum_order.engine.recipe import canonical
        from optimum_order.search.plan import runnable

        arguments.quiet_libraries()
        args = self.args
        arguments.check_names(args)
        stages = parse_stages(args.stages)
        arguments.refuse_redirection(args.stages, "--stages")
        orders, _ = runnable(stages, canonical)
        compressor = arguments.compressor(args)
        if args.dry_run:
            forecast = compressor.forecast(
                orders,
                draws=args.draws,
                evaluation_samples=args.evaluation_samples,
            )
            return {"forecast": forecast.as_dict()}
        plan = compressor.plan(
            stages, args.strategy, pause=args.pause, **arguments.measurement(args)
        )
        return plan.as_dict() | {"command": arguments.reproducing(args, str(plan.order), "auto")}

    def show(self, result: dict[str, Any]) -> None:
        if "forecast" in result:
            text = f"Nothing was run. Every order in full: {result['forecast']['summary']}."
            console().print(f"{text} Other strategies take less.", soft_wrap=True)
            return
        from rich.table import Table

        table = Table()
        table.add_column("order, best first", overflow="fold")
        scored_by = result["scored_by"]
        title = "minus log-perplexity" if scored_by == "perplexity" else scored_by
        table.add_column(title, justify="right")
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
        if left_out := result["left_out"]:
            count = len(left_out) + len(result["ranking"])
            order, why = next(iter(left_out.items()))
            screen.print(
                f"{len(left_out)} of {count} orders cannot be run, such as {arrows(order)}: {why}",
                soft_wrap=True,
            )
        screen.print(f"It took {result['cost']['seconds']:.1f} seconds.")
        screen.print(f"To compress so: {result['command']}", soft_wrap=True)
