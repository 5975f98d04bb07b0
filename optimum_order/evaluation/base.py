"""The contract of a metric: a name, a score for every sample, and a figure for the mean."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, placed
from optimum_order.errors import ModelError
from optimum_order.files import html_table
from optimum_order.models import precision
from optimum_order.progress import Bar


@dataclass(frozen=True)
class Measurement:
    """The result of one metric on one model.

    Args:
        name: The metric's name.
        value: The figure of the metric.
        standard_error: Standard error of the mean of `scores`; None for a single sample.
        scores: The score of each sample, in order, so that two models measured on the same samples
            can be compared pair by pair.
        higher_is_better: Whether a better model has higher scores.
        source: The source of the samples.
        digest: The digest of the samples.
        tokens: Tokens that the model read; None for images.
        details: Further figures by name.
        names: The name of each sample; none where they are numbered.
    """

    name: str
    value: float
    standard_error: float | None
    scores: tuple[float, ...] = field(repr=False)
    higher_is_better: bool
    source: str
    digest: str
    tokens: int | None = None
    details: dict[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        error = f" ± {self.standard_error:.2g}" if self.standard_error is not None else ""
        score = f", mean score {sum(self.scores) / len(self.scores):.4g}{error}"
        count = len(self.scores)
        return (
            f"Measurement({self.name} {self.value:.6g}{score} of {count} samples of "
            f"{self.source!r})"
        )

    def _repr_html_(self) -> str:
        rows = [(self.name, f"{self.value:.6g}")]
        rows += [(name, f"{value:.6g}") for name, value in self.details.items()]
        if self.standard_error is not None:
            rows.append(("standard error of the mean score", f"{self.standard_error:.3g}"))
        rows.append(("measured on", f"{len(self.scores)} samples of {self.source}"))
        return html_table("Measurement", rows)

    @property
    def performances(self) -> Tensor:
        """M of each sample, higher is better: (samples,) float64. Minus log-perplexity for text."""
        scores = torch.tensor(self.scores, dtype=torch.float64)
        return scores if self.higher_is_better else -scores

    @property
    def performance(self) -> float:
        """M, the mean of `performances`."""
        return self.performances.mean().item()

    def as_dict(self) -> dict[str, Any]:
        """Return all but the scores of single samples, ready for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "standard_error_of_mean_score": self.standard_error,
            **self.details,
            "samples": len(self.scores),
            **({} if self.tokens is None else {"tokens": self.tokens}),
            "source": self.source,
            "digest": self.digest,
        }


class Metric(ABC):
    """One way to measure a model. A subclass is one file.

    A subclass gives the score of one sample in `score`, and the figure for the mean score in
    `value`. Running the model, progress, and errors about a broken model are handled here.

    Args:
        reference: The model before compression, in evaluation mode; only where `needs_reference`.

    Raises:
        ModelError: If the reference is needed and missing.
    """

    name: ClassVar[str]
    """The name a user types."""
    summary: ClassVar[str]
    """The metric in one line."""
    higher_is_better: ClassVar[bool]
    """Whether a better model has a higher value."""
    needs_reference: ClassVar[bool] = False
    """Whether the metric compares with the model before compression."""
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """The least and the most that M of a sample can be."""

    def __init__(self, reference: PreTrainedModel | None = None) -> None:
        if self.needs_reference and reference is None:
            raise ModelError(
                f"The metric '{self.name}' compares with the original model: give it as "
                "'reference'."
            )
        self.reference = reference

    @classmethod
    def of(cls, named: str) -> type[Metric]:
        """Return the metric for what a user named after a colon, as in `lm_eval:arc_easy`.

        Args:
            named: The text after the colon.

        Raises:
            ModelError: If the metric takes none.
        """
        raise ModelError(f"The metric '{cls.name}' takes nothing after a colon, got '{named}'.")

    @classmethod
    def own_samples(cls, source: Any, processor: Any, count: int | None) -> Samples | None:
        """Return the samples that the metric brings itself; None if it measures on any data.

        Args:
            source: The evaluation data as the user named it.
            processor: The tokenizer or image processor of the model; None if there is none.
            count: How many samples, from all over; all by default.

        Raises:
            DataError: If there are none.
        """
        return None

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether `metric="auto"` means this metric for a model."""
        return False

    @abstractmethod
    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's score, on a scale on which scores may be averaged.

        Args:
            model: The model, in evaluation mode, on the device of the batch.
            batch: From `Samples.batches`: the arguments of the forward, and "labels" if known.

        Returns:
            (b,) floats.
        """

    def value(self, mean: float) -> float:
        """Return the figure of the metric for a mean score."""
        return mean

    def details(self, mean: float, samples: Samples) -> dict[str, float]:
        """Return further figures by name.

        Args:
            mean: The mean score.
            samples: The samples that were measured.
        """
        return {}

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        """Refuse a model that the metric cannot measure, or samples that the model cannot read.

        Args:
            model: The model to measure.
            samples: The samples to measure on.

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
            model: The model; its mode (training or evaluation) is restored.
            samples: The samples to measure on.
            batch_size: Samples at a time; changes the result by no more than rounding.
            progress: Whether to show a bar on stderr.

        Raises:
            ModelError: If the model is of the wrong kind, or its outputs are not finite.
            DataError: If the model cannot read the samples.
        """
        self.check(model, samples)
        training = model.training
        model.train(False)
        try:
            scores = self._scores(model, samples, batch_size, progress)
        finally:
            model.train(training)
        return self.measurement(scores, samples, self.details(scores.mean().item(), samples))

    def measurement(
        self,
        scores: Tensor,
        samples: Samples,
        details: dict[str, float],
        names: tuple[str, ...] = (),
    ) -> Measurement:
        """Return the measurement that some scores are.

        Args:
            scores: (samples,) float64.
            samples: The samples.
            details: Further figures by name.
            names: The name of each sample; none where they are numbered.
        """
        mean = scores.mean().item()
        count = len(scores)
        return Measurement(
            name=self.name,
            value=self.value(mean),
            standard_error=scores.std().item() / math.sqrt(count) if count > 1 else None,
            scores=tuple(scores.tolist()),
            higher_is_better=self.higher_is_better,
            source=samples.source,
            digest=samples.digest,
            tokens=samples.tokens,
            details=details,
            names=names,
        )

    @torch.inference_mode()
    def _scores(
        self, model: PreTrainedModel, samples: Samples, batch_size: int, progress: bool
    ) -> Tensor:
        """Return the score of each sample, (samples,) float64."""
        scores: list[Tensor] = []
        count = 0
        with Bar(
            total=len(samples), desc=self.name, unit=samples.unit, disable=not progress
        ) as bar:
            for batch in samples.batches(batch_size):
                with precision.forwards(model.dtype, model.dtype, model.device):
                    part = self.score(model, placed(batch, model)).double().cpu()
                if not part.isfinite().all():
                    number = count + int((~part.isfinite()).nonzero()[0]) + 1
                    raise ModelError(
                        f"The {self.name} of {samples.unit} {number} of {len(samples)} is not "
                        "finite: the model computes NaN or infinity. Use a milder compression, or "
                        "float32 in place of float16."
                    )
                scores.append(part)
                count += len(part)
                bar.update(len(part))
        return torch.cat(scores)
