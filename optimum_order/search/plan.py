"""A plan: every order of some stages, ranked, with the evidence for the recommendation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optimum_order.errors import OrderError
from optimum_order.evaluation.comparison import Difference
from optimum_order.files import html_table
from optimum_order.order import Order, Stage

MOST_STAGES = 5

Ranking = list[tuple[Order, float | None]]


@dataclass(frozen=True)
class Plan:
    """A recommendation and its evidence.

    Args:
        ranking: Every order that can be run, with its score, best first; None for an order that was
            dropped before it was scored.
        scored_by: What a score is: a metric's mean, higher is better, or `layer error` (of the
            layers' outputs, relative) or `inversions` (of the weaker-first rule), lower is better.
        strategy: The strategy that ranked the orders.
        metric: The name of M.
        difference: Expected M of the recommended order less that of the next, with its interval
            and what the interval covers; None where the strategy does not measure M.
        decisive: Whether the recommended order is better than the next, whatever the calibration
            draw.
        reason: One sentence for people.
        cost: Seconds, processor seconds, and what was run.
        left_out: The orders of these stages that cannot be run, and why.
    """

    ranking: tuple[tuple[Order, float | None], ...]
    scored_by: str
    strategy: str
    metric: str
    difference: Difference | None
    decisive: bool
    reason: str
    cost: dict[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def order(self) -> Order:
        """The recommended order."""
        return self.ranking[0][0]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """Return the plan that `as_dict` was made of.

        Raises:
            KeyError, TypeError, OrderError: If the fields are not those of a plan.
        """
        difference = fields["difference"]
        if difference is not None:
            difference = dict(difference)
            del difference["decisive"]
            difference = Difference(**difference)
        ranking = tuple((Order.parse(row["order"]), row["score"]) for row in fields["ranking"])
        plain = ("scored_by", "strategy", "metric", "decisive", "reason", "cost")
        values = {name: fields[name] for name in plain}
        left_out = fields.get("left_out", {})  # plans of older versions have none
        return cls(ranking, difference=difference, left_out=left_out, **values)

    def __repr__(self) -> str:
        verdict = "decisive" if self.decisive else "not decisive"
        count = len(self.ranking)
        return f"Plan({str(self.order)!r}, best of {count} orders, {verdict})"

    def _repr_html_(self) -> str:
        rows = [
            (str(order), "not measured" if score is None else f"{score:.4g}")
            for order, score in self.ranking
        ]
        return html_table(f"{self.scored_by}. {self.reason}", rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan ready for JSON, and for the manifest of a model compressed by it."""
        return {
            "order": str(self.order),
            "strategy": self.strategy,
            "metric": self.metric,
            "ranking": [{"order": str(order), "score": score} for order, score in self.ranking],
            "scored_by": self.scored_by,
            "difference": self.difference and self.difference.as_dict(),
            "decisive": self.decisive,
            "reason": self.reason,
            "cost": self.cost,
            "left_out": dict(self.left_out),
        }


def runnable(
    stages: Iterable[Stage | str], check: Callable[[Order], Order]
) -> tuple[list[Order], dict[str, str]]:
    """Return the orders of some stages that can be run, and why the others cannot.

    A rotation, for example, cannot follow a stage whose zeros it would fill.

    Args:
        stages: The stages.
        check: Returns the canonical order, or raises an OrderError.

    Returns:
        The orders, as `check` returns them, and the reason by each order that is left out.

    Raises:
        OrderError: As `permutations`; and if no order or only one can be run.
    """
    orders, refusals = [], {}
    for order in permutations(stages):
        try:
            orders.append(check(order))
        except OrderError as error:
            refusals[str(order)] = error
    if not orders:
        raise next(iter(refusals.values()))
    if len(orders) == 1:
        raise OrderError(
            f"Of these stages only '{orders[0]}' can be run, so no order is to be found. In any "
            f"other: {next(iter(refusals.values()))}"
        )
    return orders, {order: str(error) for order, error in refusals.items()}


def permutations(stages: Iterable[Stage | str]) -> list[Order]:
    """Return every distinct order of some stages.

    Raises:
        OrderError: If there are fewer than 2 stages, more than can be planned, or only one order.
    """
    order = Order(stages)
    if not 2 <= len(order) <= MOST_STAGES:
        advice = "Plan the most important ones, or run a study of chosen orders."
        raise OrderError(
            f"A plan is for 2 to {MOST_STAGES} stages, got {len(order)}. "
            + ("Add a stage." if len(order) < 2 else advice)
        )
    orders = list(order.permutations())
    if len(orders) < 2:
        raise OrderError(
            f"All of these stages are the same, '{order[0]}', so there is nothing to order. Give "
            "stages that differ."
        )
    return orders
