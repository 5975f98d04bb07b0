"""Our metrics behind the interface of the `evaluate` library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optimum_order.data.samples import Images, Samples, Windows
from optimum_order.errors import DataError
from optimum_order.evaluation.base import Metric

if TYPE_CHECKING:
    import evaluate


def to_evaluate(metric: Metric | type[Metric]) -> evaluate.Metric:
    """Return a metric as a module of the `evaluate` library, made in memory and not downloaded.

        to_evaluate(Perplexity).compute(predictions=ids, model=model)
        to_evaluate(Fidelity).compute(predictions=pixels, model=model, reference=original)
        to_evaluate(Accuracy).compute(predictions=pixels, references=labels, model=model)

    Predictions are the inputs of a model: token ids, one list of one length for each sequence, or
    images as (channels, height, width). References are the class numbers of images, or left out.
    `compute` takes the arguments of `Metric.measure` by name, and `reference` as well where the
    metric is a class, and returns `Measurement.as_dict()`.

    Args:
        metric: A metric, or a class that `compute` makes one of.
    """
    import datasets
    import evaluate

    class Module(evaluate.Metric):  # type: ignore[misc]  # the library has no types
        def _info(self) -> evaluate.MetricInfo:
            row, label = datasets.Sequence(datasets.Value("float32")), datasets.Value("int64")
            kinds = (
                datasets.Sequence(datasets.Value("int64")),
                datasets.Sequence(datasets.Sequence(row)),
            )
            features = [
                datasets.Features({"predictions": kind, "references": label}) for kind in kinds
            ]
            return evaluate.MetricInfo(description=metric.summary, citation="", features=features)

        def add_batch(
            self, *, predictions: Any = None, references: Any = None, **options: Any
        ) -> None:
            """Add a batch of inputs, and of their labels if known."""
            if references is None and predictions is not None:
                references = [None] * len(predictions)
            super().add_batch(predictions=predictions, references=references, **options)

        def _compute(
            self, predictions: list[Any], references: list[int | None], **options: Any
        ) -> dict[str, Any]:
            instance = metric
            if isinstance(metric, type):
                instance = metric(options.pop("reference", None))
            return instance.measure(samples=_samples(predictions, references), **options).as_dict()

    return Module(config_name=metric.name, keep_in_memory=True)


def _samples(predictions: list[Any], references: list[int | None]) -> Samples:
    labeled = [label is not None for label in references]
    if any(labeled) and not all(labeled):
        raise DataError(
            f"References must be given for all samples or for none, got {sum(labeled)} of them."
        )
    try:
        inputs = torch.tensor(predictions)
    except ValueError as error:
        raise DataError(f"Predictions must all be of one shape: {error}.") from None
    if inputs.ndim == 2:
        if any(labeled):
            raise DataError(
                "References are the class numbers of images; token ids have none. Leave them out."
            )
        return Windows(inputs, "ids in memory")
    return Images(inputs, "pixels in memory", torch.tensor(references) if any(labeled) else None)
