"""`optimum-order evaluate`: measure a model, compressed or not."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.tables import console

_NO_FIGURE = (
    *("model", "name", "value", "standard_error_of_mean_score"),
    *("digest", "source", "samples", "tokens"),
)
"""Keys of the result that are no further figures of the metric."""


class EvaluateCommand(Command):
    """Measures one model by one metric, and saves nothing."""

    name = "evaluate"
    summary = "measure a model, compressed or not"
    description = """\
Measure MODEL by a metric, without changing it. A compressed model is measured
on the values that its layers have.
"""
    epilog = """\
examples:
  optimum-order evaluate tiny-llama
  optimum-order evaluate out --evaluate my-held-out-text.txt
  optimum-order evaluate some/model --protocol literature
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.model(parser)
        arguments.config(parser)
        arguments.evaluated(parser)
        arguments.metric(parser)
        arguments.evaluation(parser)
        arguments.hardware(parser)

    def work(self) -> dict[str, Any]:
        arguments.quiet_libraries()
        args = self.args
        arguments.check_names(args)
        arguments.apply_protocol(args)
        compressor = arguments.compressor(args)
        measured = compressor.evaluate(args.evaluate, args.metric, samples=args.evaluation_samples)
        return {"model": args.model, **measured.as_dict()}

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        table = Table(show_header=False)
        error = result["standard_error_of_mean_score"]
        table.add_row(result["name"], f"{result['value']:.6g}")
        if error is not None:
            table.add_row("standard error of the mean score", f"{error:.3g}")
        for name in result:
            if name not in _NO_FIGURE:
                table.add_row(name.replace("_", " "), f"{result[name]:.6g}")
        samples = f"{result['samples']:,} samples"
        if "tokens" in result:
            samples += f", {result['tokens']:,} tokens"
        table.add_row("measured on", f"{result['source']}: {samples}")
        console().print(table)
