"""How good a model is. One metric is one file here, or a class in the entry-point group `optimum_order.metrics`."""

import functools
import sys

from optimum_order.evaluation.base import Measurement, Metric
from optimum_order.evaluation.samples import Images, Samples, Windows
from optimum_order.registry import discover

__all__ = ["Images", "Measurement", "Metric", "Samples", "Windows", "available"]


@functools.cache
def available() -> dict[str, type[Metric]]:
    """Every metric by name."""
    return discover(sys.modules[__name__], Metric, "optimum_order.metrics")
