"""What a search under a budget answers: a recipe, what else was made, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from optimum_order.evaluation.comparison import Difference, difference_over_draws
from optimum_order.order import Order
from optimum_order.search.menu import Candidate


@dataclass(frozen=True)
class Attempt:
    """A recipe that was carried out on the whole model.

    Args:
        candidate: The recipe, and what was expected of it.
        bytes: Of the weight files that were written.
        bits: Of a weight of the compressed layers in them, all side information counted.
        performances: M of each sample that was held back, higher is better, (samples,) float64.
        model: The compressed model.
    """

    candidate: Candidate
    bytes: int
    bits: float
    performances: Tensor
    model: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Row:
    """One line of the table "what else fits in these bytes".

    Args:
        order: The recipe.
        format: The name of the format.
        bytes: Of the weight files, as written if the recipe was carried out, else as estimated.
        bits: Of a weight of the compressed layers, likewise.
        made: Whether the recipe was carried out on the whole model.
        fits: Whether the bytes are allowed.
        loss: How far the loss on samples that were held back rises over the original's; None if the
            recipe was not carried out.
        interval: The interval of that rise over the samples.
        difference: How much less the loss of the recommended recipe is, pair by pair; None for that
            recipe itself, and where nothing was measured.
        error: Mean relative output error of some layers, each by itself.
    """

    order: Order
    format: str
    bytes: int
    bits: float
    made: bool
    fits: bool
    loss: float | None
    interval: tuple[float, float] | None
    difference: Difference | None
    error: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        difference = self.difference and self.difference.as_dict()
        return asdict(self) | {"order": str(self.order), "difference": difference}


@dataclass(frozen=True)
class Selection:
    """A recipe and its evidence.

    Args:
        rows: The recommended recipe, others that were carried out, and some that were not.
        metric: The metric whose mean score is the loss.
        samples: How many samples were held back.
        budget: The most that was allowed, as text; None if only the loss was limited.
        max_loss: The most that the loss may rise; None if only the bytes were limited.
        met: Whether both are met.
        reason: One sentence for people.
        cost: Compressions of the whole model, layers that were looked at, and seconds.
        engine: The engine that is to load the result, or None.
        model: The compressed model of the recommended recipe.
    """

    rows: tuple[Row, ...]
    metric: str
    samples: int
    budget: str | None
    max_loss: float | None
    met: bool
    reason: str
    cost: dict[str, Any]
    engine: str | None = None
    model: Any = field(default=None, repr=False, compare=False)

    @property
    def order(self) -> Order:
        """The recommended order."""
        return self.rows[0].order

    @property
    def format(self) -> str:
        """The format in which the result has the bytes that are promised."""
        return self.rows[0].format

    def as_dict(self) -> dict[str, Any]:
        """Return all but the model, ready for JSON, and for the manifest of a model made so."""
        return {
            "order": str(self.order),
            "format": self.format,
            "engine": self.engine,
            "budget": self.budget,
            "max_loss": self.max_loss,
            "met": self.met,
            "reason": self.reason,
            "metric": self.metric,
            "samples": self.samples,
            "rows": [row.as_dict() for row in self.rows],
            "cost": self.cost,
        }


def compared(
    winner: Attempt, attempt: Attempt, original: Tensor
) -> tuple[float, tuple[float, float], Difference | None]:
    """Return the rise of a attempt's loss, its interval, and how much less the winner's is.

    Args:
        winner: The recommended recipe.
        attempt: Any.
        original: M of the model before compression on the same samples, (samples,).

    Raises:
        DataError: If there are fewer than two samples.
    """
    rise = difference_over_draws((original - attempt.performances)[None])
    difference = None
    if attempt is not winner:
        difference = difference_over_draws((winner.performances - attempt.performances)[None])
    return rise.mean, (rise.low, rise.high), difference
