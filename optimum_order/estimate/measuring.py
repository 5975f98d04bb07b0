"""What measuring a model by a metric would take: one forward traced, for all samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_order import files
from optimum_order.data.samples import Samples, without_labels
from optimum_order.estimate import rates
from optimum_order.estimate.trace import forward_cost
from optimum_order.models.memory import resident


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What measuring a model would take; a guess within a factor of two or so.

    Args:
        samples: Windows, images or whatever else is measured on.
        tokens: Tokens of all samples; None for images.
        weights: Bytes of the model's weights.
        seconds: Of all forwards. Downloading and loading the model come on top.
        memory: Bytes that the process has resident at most.
    """

    samples: int
    tokens: int | None
    weights: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f" of {self.tokens:,} tokens together"
        return (
            f"{self.samples:,} samples{tokens}, about {files.duration(self.seconds)} and "
            f"{files.size(self.memory)} of memory, {files.size(self.weights)} of them weights"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON, and in words."""
        return dataclasses.asdict(self) | {"summary": str(self)}


def measuring(
    model: PreTrainedModel, samples: Samples, device: torch.device, *, models: int = 1
) -> Measuring:
    """Return what measuring would take.

    Args:
        model: On the meta device, from `estimate.empty`.
        samples: What is measured on.
        device: Where the model will run.
        models: Models of this size that read each sample: 2 where a metric has a reference.

    Raises:
        ModelError: If what a forward takes cannot be told from shapes.
    """
    before = resident()
    batch = without_labels(next(samples.batches(samples.batch_size)))
    first = next(iter(batch.values()))
    cost = forward_cost(model, batch)
    rows = first.numel() if first.ndim == 2 else 1024
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    widths = sorted(weight[0].numel() for weight in matrices) or [1024]
    width = widths[len(widths) // 2]
    speed = rates.measure(device, model.dtype, model.dtype, rows, width)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    seconds = cost.products / speed.forward + cost.traffic / speed.traffic
    return Measuring(
        samples=len(samples),
        tokens=samples.tokens,
        weights=models * weights,
        seconds=models * seconds * len(samples) / len(first),
        memory=before + models * weights + cost.working,
    )
