"""`optimum-order evaluate`: measure a model, compressed or not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.parser import group_of
from optimum_order.cli.tables import console
from optimum_order.errors import ModelError

if TYPE_CHECKING:
    from optimum_order.compressor import JointCompressor
    from optimum_order.evaluation import Measurement

_NO_FIGURE = (
    *("model", "original", "name", "value", "standard_error_of_mean_score"),
    *("digest", "source", "samples", "tokens"),
    *("against", "difference", "flips"),
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
  optimum-order evaluate out --metric lm_eval:arc_easy --against some/model
  optimum-order evaluate some/model-7b --dry-run

With --against, both models are measured on the same samples; fidelity and
embedding say how far MODEL is from ORIGINAL. Where a sample is right or
wrong, flips are those that one model gets right and the other wrong; p is how
probable so uneven numbers were if both models were equally good (McNemar's
exact test).
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.model(parser)
        arguments.config(parser)
        arguments.evaluated(parser)
        arguments.metric(parser)
        group_of(parser, "evaluation").add_argument(
            "--against",
            metavar="ORIGINAL",
            help="measure this model too, on the same samples, and compare: such as the model "
            "before compression",
        )
        group_of(parser, "evaluation").add_argument(
            "--dry-run",
            action="store_true",
            help="read no weight and measure nothing: say how long measuring would take, and in "
            "how much memory",
        )
        arguments.evaluation(parser)
        arguments.hardware(parser)

    def work(self) -> dict[str, Any]:
        arguments.quiet_libraries()
        from optimum_order.evaluation import choose
        from optimum_order.evaluation.comparison import Comparison

        args = self.args
        arguments.check_names(args)
        arguments.apply_protocol(args)
        compressor = arguments.compressor(args)
        original = None
        if args.against is not None:
            changed = {"model": args.against, "revision": None, "base": None}
            original = arguments.compressor(argparse.Namespace(**vars(args) | changed))
        # the class of the model says which metric is usual: no weight is needed
        metric = choose(compressor.outline or compressor.source.load(), args.metric)
        if metric.needs_reference and original is None:
            raise ModelError(
                f"'{metric.name}' says how far '{args.model}' is from its original: name the "
                "original with --against."
            )

        if args.dry_run:
            forecasts = [
                one.forecast_evaluation(args.evaluate, args.metric, samples=args.evaluation_samples)
                for one in (compressor, None if metric.needs_reference else original)
                if one is not None
            ]
            return {"model": args.model, "forecasts": [one.as_dict() for one in forecasts]}

        def measured(model: JointCompressor, **options: Any) -> Measurement:
            return model.evaluate(
                args.evaluate, args.metric, samples=args.evaluation_samples, **options
            )

        if metric.needs_reference:
            figures = measured(compressor, reference=original)
            return {"model": args.model, "original": args.against, **figures.as_dict()}
        figures = measured(compressor)
        result = {"model": args.model, **figures.as_dict()}
        if original is None:
            return result
        other = measured(original)
        compared = Comparison.of(figures, other).as_dict()
        return result | {"against": {"model": args.against, **other.as_dict()}} | compared

    def show(self, result: dict[str, Any]) -> None:
        if "forecasts" in result:
            names = [self.args.model, self.args.against]
            for name, forecast in zip(names, result["forecasts"], strict=False):
                console().print(f"{name}: {forecast['summary']}.", soft_wrap=True)
            console().print("Nothing was measured. Loading comes on top.", soft_wrap=True)
            return
        from rich.table import Table

        other = result.get("against")
        models = [result] if other is None else [result, other]
        table = Table(show_header=other is not None)
        table.add_column("", no_wrap=True)
        for model in models:
            table.add_column(str(model["model"]), overflow="fold")
        if "original" in result:
            table.add_row("compared with", result["original"])
        table.add_row(result["name"], *(f"{model['value']:.6g}" for model in models))
        errors = [model["standard_error_of_mean_score"] for model in models]
        if errors[0] is not None:
            table.add_row("standard error of the mean score", *(f"{e:.3g}" for e in errors))
        for name in result:
            if name not in _NO_FIGURE:
                figures = (f"{model[name]:.6g}" for model in models)
                table.add_row(name.replace("_", " "), *figures)
        samples = f"{result['samples']:,} samples"
        if "tokens" in result:
            samples += f", {result['tokens']:,} tokens"
        table.add_row("measured on", f"{result['source']}: {samples}")
        console().print(table)
        if other is not None:
            for line in _compared(result):
                console().print(line, soft_wrap=True)


def _compared(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that say how far two models are apart."""
    difference = result["difference"]
    interval = f"{difference['low']:.4g} to {difference['high']:.4g}"
    sure = "decisive" if difference["decisive"] else "not decisive"
    lines = [f"Difference in M: {difference['mean']:.4g}, 95 % interval {interval} ({sure})."]
    if (flips := result["flips"]) is not None:
        counts = f"{len(flips['to_right'])} to right, {len(flips['to_wrong'])} to wrong"
        lines.append(f"Flips: {counts}, p = {flips['p']:.3g}.")
    return lines
