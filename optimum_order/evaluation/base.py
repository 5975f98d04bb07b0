"""What a metric is: a name, a score for every sequence of a batch, and what those scores come to."""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_order.errors import DataError, ModelError


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens, all of one length: what a model is calibrated or measured on.

    Args:
        ids: (samples, length) int64.
        source: Where the text came from, as the user gave it; of a local path only the file's name.
        bytes: UTF-8 bytes of the text that the predicted tokens spell, which are all but the first of each window;
            None where it is not known.
        dropped: Tokens of the text that are in no window.
        note: What a user should know about them, or "".
    """

    ids: Tensor
    source: str
    bytes: int | None = None
    dropped: int = 0
    note: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens there are in all windows together."""
        return self.ids.numel()

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the ids and their shape. This goes into a manifest, the text never does."""
        shape = "x".join(map(str, self.ids.shape))
        return hashlib.sha256(f"{shape}:".encode() + self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The windows in order, as (b, length) tensors with b at most `batch_size`."""
        return iter(self.ids.split(batch_size))


@dataclass(frozen=True)
class Measurement:
    """What a metric found.

    Args:
        name: The metric's name.
        value: The figure it is known by.
        standard_error: Of the mean of `per_sequence`; None where there is only one sequence.
        per_sequence: Each sequence's score, in the order of the windows. They are kept so that two models measured
            on the same windows can be compared pair by pair.
        tokens: How many tokens the model read.
        source: What it was measured on.
        digest: Digest of what it was measured on.
        details: Further figures by name.
    """

    name: str
    value: float
    standard_error: float | None
    per_sequence: tuple[float, ...] = field(repr=False)
    tokens: int
    source: str
    digest: str
    details: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single sequences' scores, ready for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "standard_error_of_mean_score": self.standard_error,
            **self.details,
            "sequences": len(self.per_sequence),
            "tokens": self.tokens,
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

    @abstractmethod
    def score(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Each sequence's score: a mean over its tokens, on a scale on which scores may be averaged.

        Args:
            model: In evaluation mode, on the device of `ids`.
            ids: (b, length) int64.

        Returns:
            (b,) floats.
        """

    def value(self, mean: float) -> float:
        """The figure the metric is known by, from the mean score."""
        return mean

    def details(self, mean: float, windows: Windows) -> dict[str, float]:
        """Further figures by name."""
        return {}

    def check(self, model: PreTrainedModel, windows: Windows) -> None:
        """Refuse a model that this metric says nothing about, or windows that the model cannot read.

        Raises:
            ModelError: If the model is of the wrong kind.
            DataError: If the windows are too long for the model or from another vocabulary.
        """
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = windows.ids.shape[1]
        if longest is not None and length > longest:
            raise DataError(
                f"{type(model).__name__} reads at most {longest} tokens at once, got windows of {length}. Use a "
                f"sequence length of at most {longest}."
            )
        embedding: Any = model.get_input_embeddings()
        known, largest = embedding.weight.shape[0], int(windows.ids.max())
        if largest >= known:
            raise DataError(
                f"{type(model).__name__} knows tokens 0 to {known - 1}, got token {largest} from {windows.source}. Use "
                "the tokenizer that belongs to the model."
            )

    def measure(
        self, model: PreTrainedModel, windows: Windows, *, batch_size: int = 8, progress: bool = True
    ) -> Measurement:
        """Run the model over the windows, on its own device.

        Args:
            model: It is left in the mode (training or evaluation) it was in.
            windows: What to run it on.
            batch_size: Windows at a time; changes the result by no more than rounding.
            progress: Whether to show a bar on stderr.

        Raises:
            ModelError: If the model is of the wrong kind, or its outputs are not finite.
            DataError: If the model cannot read the windows.
        """
        self.check(model, windows)
        training = model.training
        scores: list[float] = []
        model.eval()
        try:
            with (
                torch.inference_mode(),
                tqdm(total=len(windows.ids), desc=self.name, unit="window", disable=not progress) as bar,
            ):
                for ids in windows.batches(batch_size):
                    batch = self.score(model, ids.to(model.device)).double().cpu()
                    if not batch.isfinite().all():
                        at = len(scores) + int((~batch.isfinite()).nonzero()[0])
                        raise ModelError(
                            f"The {self.name} of window {at + 1} of {len(windows.ids)} is not finite: the model "
                            "computes NaN or infinity. Use a milder compression, or float32 in place of float16."
                        )
                    scores += batch.tolist()
                    bar.update(len(ids))
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
            tokens=windows.tokens,
            source=windows.source,
            digest=windows.digest,
            details=self.details(mean, windows),
        )
