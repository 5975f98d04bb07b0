"""The trials of a study by order and draw, and contrasts of their performances."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from optimum_order import evaluation
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.order import Order
from optimum_order.study.grid import draws_matter
from optimum_order.study.trials import ORIGINAL, Row, Trials

CONFIDENCE = 0.95


class Runs:
    """The finished trials; a trial without calibration stands for every draw.

    Args:
        trials: The trials of a study.

    Attributes:
        rows: The row of each trial by order and draw.
        names: The orders, oldest first, without the original.
    """

    def __init__(self, trials: Trials):
        self.rows = trials.rows("trials")
        self.names = list(dict.fromkeys(order for order, _ in self.rows if order != ORIGINAL))
        metric = evaluation.available().get(trials.settings.get("metric", "").partition(":")[0])
        self._bounds = (-math.inf, math.inf) if metric is None else metric.bounds
        self._draws: dict[str, set[int]] = {name: set() for name in [*self.names, ORIGINAL]}
        for (order, draw), row in self.rows.items():
            if row["performance"] is not None:
                self._draws[order].add(draw)

    def draws(self, *orders: str) -> list[int]:
        """Return the draws in which all of some orders have a performance.

        Args:
            orders: Orders; without calibration in any of them, draw 0 is the only one.
        """
        if any(not self._draws.get(order) for order in orders):
            return []
        calibrated = [self._draws[order] for order in orders if not _is_fixed(order)]
        return sorted(set.intersection(*calibrated)) if calibrated else [0]

    def row(self, order: str, draw: int) -> Row:
        """Return the row that tells about an order in a draw.

        Args:
            order: The order.
            draw: One of `draws(order)`.
        """
        return self.rows[order, 0 if _is_fixed(order) else draw]

    def finished(self, order: str) -> list[Row]:
        """Return the rows of an order that have a performance, by draw."""
        return [self.rows[order, draw] for draw in sorted(self._draws.get(order, ()))]

    def mean(self, order: str, draws: Sequence[int]) -> float:
        """Return the mean M of an order over some draws.

        Args:
            order: The order.
            draws: Some of `draws(order)`.
        """
        return statistics.fmean(self.row(order, draw)["performance"] for draw in draws)

    def overall(self, order: str) -> float | None:
        """Return the mean M of an order over all draws, or None without a performance."""
        rows = self.finished(order)
        return statistics.fmean(row["performance"] for row in rows) if rows else None

    def contrast(self, weights: Mapping[str, float]) -> dict[str, Any] | None:
        """Return the weighted sum of the M of some orders with its interval, ready for JSON.

        Args:
            weights: The weight of each order.

        Returns:
            A `Difference` as a dict, its draws, and whether one of the orders calibrates; None
            where the orders have no draw in common.
        """
        draws = self.draws(*weights)
        if not draws:
            return None
        sums = []
        for draw in draws:
            terms = [
                weight * torch.tensor(self.row(order, draw)["performances"], dtype=torch.float64)
                for order, weight in weights.items()
            ]
            sums.append(sum(terms[1:], terms[0]))
        difference = difference_over_draws(torch.stack(sums), confidence=CONFIDENCE)
        difference = difference.within(*self._possible(weights.values()))
        calibrated = not all(map(_is_fixed, weights))
        return difference.as_dict() | {"draws": draws, "calibrated": calibrated}

    def _possible(self, weights: Iterable[float]) -> tuple[float, float]:
        """Return the least and the most that a weighted sum of M can be."""
        low, high = self._bounds
        least = 0.0
        most = 0.0
        for weight in filter(None, weights):
            ends = sorted((weight * low, weight * high))
            least += ends[0]
            most += ends[1]
        return least, most


@functools.cache
def _is_fixed(order: str) -> bool:
    """Return whether an order does without calibration."""
    return order == ORIGINAL or not draws_matter(Order.parse(order))
