"""Metrics of a model. One metric is one file here, or an entry point of `optimum_order.metrics`."""

import functools
import sys

from transformers import PreTrainedModel

from optimum_order.data.samples import Images, Samples, Windows
from optimum_order.errors import ModelError, unknown
from optimum_order.evaluation.base import Measurement, Metric
from optimum_order.registry import discover

__all__ = ["Images", "Measurement", "Metric", "Samples", "Windows", "available", "choose", "named"]


@functools.cache
def available() -> dict[str, type[Metric]]:
    """Return every metric by name."""
    return discover(sys.modules[__name__], Metric, "optimum_order.metrics")


def choose(model: PreTrainedModel, name: str = "auto") -> type[Metric]:
    """Return the metric to measure a model by.

    Args:
        model: The model.
        name: A metric, or "auto" for the usual one of the model's kind.

    Raises:
        ModelError: If there is no such metric, or not exactly one is usual for the model.
    """
    metrics = available()
    if name == "auto":
        usual = [metric for metric in metrics.values() if metric.is_usual(model)]
        if len(usual) == 1:
            return usual[0]
        problem = "Several metrics are" if usual else "No metric is"
        raise ModelError(
            f"{problem} the usual one for {type(model).__name__}. Name one as 'metric' (--metric): "
            f"{', '.join(metric.name for metric in usual or metrics.values())}."
        )
    return named(name)


def named(name: str) -> type[Metric]:
    """Return the metric that a user names.

    Args:
        name: Its name, and what it is to measure after a colon, where it takes that.

    Raises:
        ModelError: If there is no such metric.
    """
    kind, colon, rest = name.partition(":")
    if kind not in available():
        raise ModelError(unknown("metric", kind, ["auto", *available()]))
    metric = available()[kind]
    return metric.of(rest) if colon else metric
