"""Our metrics behind the interface of the `evaluate` library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optimum_order.evaluation.base import Metric
from optimum_order.evaluation.samples import Windows

if TYPE_CHECKING:
    import evaluate


def to_evaluate(metric: Metric) -> evaluate.Metric:
    """A module of the `evaluate` library, made here and not fetched from anywhere.

        to_evaluate(Perplexity()).compute(predictions=ids, model=model)

    Its predictions are token ids, one list of one length for each sequence; it takes what `Metric.measure` takes
    by name and returns `Measurement.as_dict()`.
    """
    import datasets  # both take seconds to import
    import evaluate

    class Module(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
            return evaluate.MetricInfo(description=metric.summary, citation="", features=features)

        def _compute(self, predictions: list[list[int]], **options: Any) -> dict[str, Any]:
            windows = Windows(torch.tensor(predictions), "ids in memory")
            return metric.measure(samples=windows, **options).as_dict()

    return Module(config_name=metric.name, keep_in_memory=True)
