"""`auto`: a few layers, each compressed in every order with a calibration draw of its own.

Two witnesses judge an order: the layers' output errors, and M (or what stands for M) of the model
with these layers compressed and noise of the same size in all others, on a few samples. An order is
dropped once both together are sure that another is better; otherwise twice as many layers are
looked at. Where that never decides, M of the whole models does.
"""

from __future__ import annotations

import math

from scipy.special import ndtri
from torch import Tensor

from optimum_order.evaluation import Metric, Samples
from optimum_order.evaluation.comparison import Difference
from optimum_order.order import Order
from optimum_order.search.intervals import (
    BIAS,
    extrapolate,
    interval,
    student,
    sureness,
    together,
    widened,
)
from optimum_order.search.plan import Ranking
from optimum_order.search.sketch import Sketch
from optimum_order.search.strategies import small
from optimum_order.search.strategies.base import Task, Verdict, count_samples

_FIRST_LAYERS = 4
"""Layers that are looked at to begin with."""


def rank(task: Task) -> Verdict:
    """Rank orders by as few layers, samples and draws as decide."""
    if not task.single_layers:
        return small.rank(task)
    draws = task.small_draws()
    with task.bar("layer") as bar:
        sketch = Sketch(task.runner, task.orders, draws, bar.update)
        return _Elimination(task, sketch).run()


class _Elimination:
    """Orders that are dropped one after the other.

    Args:
        task: The orders.
        sketch: Some layers after each of them.
    """

    def __init__(self, task: Task, sketch: Sketch):
        self.task = task
        self.sketch = sketch
        self.samples: Samples = task.few_samples()
        self.alive = list(task.orders)
        self.errors: dict[Order, Tensor] = {}
        """The logarithm of the output error of each layer that was taken: (layers,)."""
        self.scores: dict[Order, Tensor] = {}
        """What the scorer says of the imagined model: (samples,)."""

    def run(self) -> Verdict:
        """Take layers until one order is left, or all layers are taken."""
        total = len(self.sketch.layers)
        level = float(ndtri((1 + self.task.effort.confidence) / 2))
        count = max(_FIRST_LAYERS, len(self.sketch.draws))
        while True:
            count = min(count, total)
            self._look(count)
            lead = self._leads()
            behind = sorted((order for order in lead if lead[order] >= level), key=lead.__getitem__)
            looked_at = self.alive
            self.alive = [order for order in self.alive if order not in behind]
            if len(self.alive) == 1 or count == total:
                break
            count *= 2
        self.task.cost |= {
            "orders": len(self.task.orders),
            "calibration_samples": sum(map(count_samples, self.sketch.draws)),
            "scored_samples": len(self.samples),
            "layers": count,
        }
        if len(self.alive) > 1:
            return self._by_models()
        # orders that fell behind earlier were looked at on fewer layers
        errors = {
            order: self.sketch.logarithms(order).mean().exp().item() for order in self.task.orders
        }
        earlier = [order for order in self.task.orders if order not in looked_at]
        earlier.sort(key=errors.__getitem__)
        ranking: Ranking = [(order, errors[order]) for order in [*self.alive, *behind]]
        return self._by_layers([*ranking, *((order, None) for order in earlier)], count)

    def _look(self, count: int) -> None:
        """Ask both witnesses about the orders that are left.

        Args:
            count: How many layers to look at.
        """
        self.sketch.take(count, self.alive)
        self.errors = {order: self.sketch.logarithms(order) for order in self.alive}
        self.scores = {order: self._imagined(order, self.task.scorer) for order in self.alive}

    def _imagined(self, order: Order, metric: Metric) -> Tensor:
        """Return the performances of the model with noise in the layers that were not taken."""
        self.sketch.imagine(order)
        return self.task.measure(metric, self.samples).performances

    def _leads(self) -> dict[Order, float]:
        """Return how sure both witnesses are that the best order is better than each other one."""

        def lead(first: Order, second: Order) -> float:
            return together(
                sureness(self.errors[second] - self.errors[first], BIAS),
                sureness(self.scores[first] - self.scores[second]),
            )

        best = max(self.alive, key=lambda one: sum(lead(one, other) for other in self.alive))
        return {order: lead(best, order) for order in self.alive if order != best}

    def _by_layers(self, ranking: Ranking, count: int) -> Verdict:
        """Recommend the one order that is left, and say what it is worth."""
        best, second = (order for order, _ in ranking[:2])
        ratio = self._ratio(best, second)
        difference = self._difference(best, second)
        name = self.task.scoring.metric.name
        noise = "" if count == len(self.sketch.layers) else " with noise in the other layers"
        end = "." if difference.decisive else ", too little to be sure of."
        reason = (
            f"on {count} of {len(self.sketch.layers)} layers, each {self._evidence()}, '{best}' "
            f"leaves {_less(ratio)} than '{second}', and the model{noise} is ahead by "
            f"{difference.mean:.2g} ({difference.low:.2g} to {difference.high:.2g}) in {name}{end}"
        )
        return Verdict(ranking, "layer error", difference, difference.decisive, reason)

    def _by_models(self) -> Verdict:
        """Rank orders whose layers are all compressed by M of the whole model."""
        task = self.task
        means = {order: self.scores[order].mean().item() for order in self.alive}
        ranked = sorted(self.alive, key=lambda order: -means[order])
        dropped = [order for order in task.orders if order not in self.alive]
        best, second = ranked[:2]
        difference = self._difference(best, second)
        suffix = "" if task.scorer is task.scoring.metric else f", by {task.scorer.name}"
        unit = task.scoring.samples.unit
        evidence = (
            f"all layers, each {self._evidence()}, scored on {len(self.samples)} {unit}s{suffix}"
        )
        if difference.decisive:
            reason = f"with {evidence}, '{best}' is ahead of '{second}'."
        else:
            reason = f"no difference between '{best}' and '{second}' that {evidence}, would show."
        ranking: Ranking = [(order, means[order]) for order in ranked]
        ranking += [(order, None) for order in dropped]
        return Verdict(ranking, task.scorer.name, difference, difference.decisive, reason)

    def _ratio(self, best: Order, second: Order) -> Difference:
        """Return the logarithm of the output error of an order over that of a better one."""
        return student(self.errors[second] - self.errors[best])

    def _difference(self, best: Order, second: Order) -> Difference:
        """Return M of the best order less that of another, by the imagined models."""
        metric = self.task.scoring.metric
        is_scored = metric is self.task.scorer
        first, other = (
            self.scores[order] if is_scored else self._imagined(order, metric)
            for order in (best, second)
        )
        self.task.runner.reset()
        original = self.task.measure(metric, self.samples).performances
        loss = (original - (first + other) / 2).mean().item()
        measured = interval(metric, (first - other)[None])
        expected = extrapolate(measured, self._ratio(best, second), loss)
        return widened(expected, "M" if is_scored else "M by a finer metric")

    def _evidence(self) -> str:
        draws = self.sketch.draws
        if not draws:
            return "without data"
        unit = self.task.scoring.samples.unit
        return f"with one of {len(draws)} draws of {count_samples(draws[0])} calibration {unit}s"


def _less(ratio: Difference) -> str:
    """Return how much less output error there is, in words.

    Args:
        ratio: The logarithm of the larger error over the smaller one.
    """

    def words(value: float) -> str:
        return f"{abs(value):.0%} {'less' if value >= 0 else 'more'}"

    mean, low, high = (1 - math.exp(-value) for value in (ratio.mean, ratio.low, ratio.high))
    return f"{words(mean)} output error ({words(low)} to {words(high)})"
