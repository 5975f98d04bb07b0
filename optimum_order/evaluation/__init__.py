"""How good a model is. One metric is one file here, or a class in the entry-point group `optimum_order.metrics`."""

import functools
import sys

from transformers import PreTrainedModel

from optimum_order.data.samples import Images, Samples, Windows
from optimum_order.errors import ModelError, unknown
from optimum_order.evaluation.accuracy import classifies_images
from optimum_order.evaluation.base import Measurement, Metric
from optimum_order.registry import discover

__all__ = ["Images", "Measurement", "Metric", "Samples", "Windows", "available", "choose"]


@functools.cache
def available() -> dict[str, type[Metric]]:
    """Every metric by name."""
    return discover(sys.modules[__name__], Metric, "optimum_order.metrics")


def choose(model: PreTrainedModel, name: str = "auto") -> type[Metric]:
    """The metric to measure a model by.

    Args:
        model: The model.
        name: A metric, or "auto" for the usual one of its kind: perplexity of a causal language model, accuracy of an
            image classifier.

    Raises:
        ModelError: If there is no such metric, or none is usual for the model.
    """
    if name != "auto":
        if name not in available():
            raise ModelError(unknown("metric", name, ["auto", *available()]))
        return available()[name]
    if model.can_generate() and not model.config.is_encoder_decoder:
        return available()["perplexity"]
    if classifies_images(model):
        return available()["accuracy"]
    raise ModelError(
        f"No metric is the usual one for {type(model).__name__}: perplexity is for causal language models, accuracy "
        f"for image classifiers. Name one as 'metric' (--metric): {', '.join(available())}."
    )
