"""What a metric is: a name, a score for every sequence of a batch, and what those scores come to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, Windows, placed
from optimum_order.errors import ModelError


@dataclass(frozen=True)
class Measurement:
    """What a metric found.

    Args:
        name: The metric's name.
        value: The figure it is known by.
        standard_error: Of the mean of `per_sequence`; None where there is only one sequence.
        per_sequence: Each sample's score, in their order. They are kept so that two models measured on the same
            samples can be compared pair by pair.
        higher_is_better: Whether a better model has higher scores.
        source: What it was measured on.
        digest: Digest of what it was measured on.
        tokens: How many tokens the model read; None for images.
        details: Further figures by name.
    """

    name: str
    value: float
    standard_error: float | None
    per_sequence: tuple[float, ...] = field(repr=False)
    higher_is_better: bool
    source: str
    digest: str
    tokens: int | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def performances(self) -> Tensor:
        """M of each sample, higher is better: (samples,) float64. Minus log-perplexity for language."""
        scores = torch.tensor(self.per_sequence, dtype=torch.float64)
        return scores if self.higher_is_better else -scores

    @property
    def performance(self) -> float:
        """M, the mean of `performances`."""
        return self.performances.mean().item()

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single sequences' scores, ready for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "standard_error_of_mean_score": self.standard_error,
            **self.details,
            "samples": len(self.per_sequence),
            **({} if self.tokens is None else {"tokens": self.tokens}),
            "source": self.source,
            "digest": self.digest,
        }


class Metric(ABC):
    """One way to measure a model. A subclass is one file.

    It says in `score` what one sequence is worth and in `value` what the mean of that is called; running the model,
    progress, and what is done about a broken model are here.
    """

    name: ClassVar[str]
    """What a user calls it."""
    summary: ClassVar[str]
    """What it is, in one line."""
    higher_is_better: ClassVar[bool]
    """Whether a better model has a higher value."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with the model before compression."""

    def __init__(self, reference: PreTrainedModel | None = None):
        """Args:
            reference: The model before compression, in evaluation mode; only where `needs_reference`.

        Raises:
            ModelError: If it is needed and missing.
        """
        if self.needs_reference and reference is None:
            raise ModelError(
                f"The metric '{self.name}' compares with the original model: give it as 'reference'."
            )
        self.reference = reference

    @abstractmethod
    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Each sample's score, on a scale on which scores may be averaged.

        Args:
            model: In evaluation mode, on the device of the batch.
            batch: From `Samples.batches`: the arguments of the forward, and "labels" if they are known.

        Returns:
            (b,) floats.
        """

    def value(self, mean: float) -> float:
        """The figure the metric is known by, from the mean score."""
        return mean

    def details(self, mean: float, samples: Samples) -> dict[str, float]:
        """Further figures by name."""
        return {}

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        """Refuse a model that this metric says nothing about, or samples that the model cannot read.

        Raises:
            ModelError: If the model is of the wrong kind.
            DataError: If the samples do not suit the model or the metric.
        """
        samples.check(model)

    def measure(
        self,
        model: PreTrainedModel,
        samples: Samples,
        *,
        batch_size: int = 8,
        progress: bool = True,
    ) -> Measurement:
        """Run the model over the samples, on its own device.

        Args:
            model: It is left in the mode (training or evaluation) it was in.
            samples: What to run it on.
            batch_size: Samples at a time; changes the result by no more than rounding.
            progress: Whether to show a bar on stderr.

        Raises:
            ModelError: If the model is of the wrong kind, or its outputs are not finite.
            DataError: If the model cannot read the samples.
        """
        self.check(model, samples)
        training = model.training
        scores: list[float] = []
        model.eval()
        try:
            with (
                torch.inference_mode(),
                tqdm(
                    total=len(samples), desc=self.name, unit=samples.unit, disable=not progress
                ) as bar,
            ):
                for batch in samples.batches(batch_size):
                    found = self.score(model, placed(batch, model)).double().cpu()
                    if not found.isfinite().all():
                        at = len(scores) + int((~found.isfinite()).nonzero()[0])
                        raise ModelError(
                            f"The {self.name} of {samples.unit} {at + 1} of {len(samples)} is not finite: the model "
                            "computes NaN or infinity. Use a milder compression, or float32 in place of float16."
                        )
                    scores += found.tolist()
                    bar.update(len(found))
        finally:
            model.train(training)
        per_sequence = torch.tensor(scores, dtype=torch.float64)
        mean = per_sequence.mean().item()
        error = per_sequence.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else None
        return Measurement(
            name=self.name,
            value=self.value(mean),
            standard_error=error,
            per_sequence=tuple(scores),
            higher_is_better=self.higher_is_better,
            source=samples.source,
            digest=samples.digest,
            tokens=samples.tokens if isinstance(samples, Windows) else None,
            details=self.details(mean, samples),
        )
