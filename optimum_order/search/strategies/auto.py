"""`auto`: a few layers, each compressed in every order with a calibration draw of its own.

Two witnesses judge an order: the layers' output errors, and M (or what stands for M) of the model
with these layers alone compressed, on a few samples. An order is dropped once both are against it
and the errors differ by more than chance; otherwise twice as many layers are looked at, as they are
where the one order that is left is expected to have less M than the next. Where that never decides,
M of the whole models does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optimum_order.evaluation import Metric, Samples
from optimum_order.evaluation.comparison import Difference
from optimum_order.order import Order
from optimum_order.search.intervals import extrapolate, interval, jackknife, student, widened
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
        self.scores: dict[Order, Tensor] = {}
        """What the scorer says of the model with the layers that were taken: (samples,)."""
        self.ratios: dict[Order, Difference] = {}
        """The logarithm of each order's output error over that of the best."""

    def run(self) -> Verdict:
        """Take layers until one order is left, or all layers are taken."""
        total = len(self.sketch.layers)
        count = max(_FIRST_LAYERS, len(self.sketch.draws))
        while True:
            count = min(count, total)
            self.sketch.take(count, self.alive)
            self.scores = self._score(self.alive)
            best, self.ratios = self._compare(self.alive)
            means = {order: self.scores[order].mean().item() for order in self.alive}
            dropped = {
                order
                for order, ratio in self.ratios.items()
                if ratio.low > 0 and means[order] < means[best]
            }
            difference = None
            if len(dropped) == len(self.ratios):
                second = min(self.ratios, key=lambda order: self.ratios[order].mean)
                difference = self._imagine(best, second)
                if difference.mean < 0:
                    dropped = set()
                    difference = None
            self.alive = [order for order in self.alive if order not in dropped]
            if len(self.alive) == 1 or count == total:
                break
            count *= 2
        self.task.cost |= {
            "orders": len(self.task.orders),
            "calibration_samples": sum(map(count_samples, self.sketch.draws)),
            "scored_samples": len(self.samples),
            "layers": count,
        }
        errors = {
            order: self.sketch.logarithms(order).mean().exp().item() for order in self.task.orders
        }
        # orders that fell behind earlier were looked at on fewer layers
        ranked = sorted(
            self.task.orders,
            key=lambda order: (order not in self.alive, order not in self.ratios, errors[order]),
        )
        if difference is None:
            return self._by_models([order for order in ranked if order not in self.alive])
        scored = {best, *self.ratios}
        ranking: Ranking = [(order, errors[order] if order in scored else None) for order in ranked]
        return self._by_layers(ranking, count, difference)

    def _score(self, orders: Iterable[Order]) -> dict[Order, Tensor]:
        """Score the model with the layers that were taken and no other compressed."""
        scores = {}
        for order in orders:
            self.sketch.write(order)
            scores[order] = self._performances(self.task.scorer)
        return scores

    def _compare(self, orders: Iterable[Order]) -> tuple[Order, dict[Order, Difference]]:
        """Return the order with the least output error, and how all others compare."""
        logarithms = {order: self.sketch.logarithms(order) for order in orders}
        best = min(logarithms, key=lambda order: logarithms[order].mean().item())
        ratios = {
            order: student(values - logarithms[best], self.task.effort.confidence)
            for order, values in logarithms.items()
            if order != best
        }
        return best, ratios

    def _by_layers(self, ranking: Ranking, count: int, difference: Difference) -> Verdict:
        """Recommend the one order that is left, and say what it is worth."""
        best, second = (order for order, _ in ranking[:2])
        ratio = self.ratios[second]
        less, least, most = (1 - math.exp(-value) for value in (ratio.mean, ratio.low, ratio.high))
        end = "." if difference.decisive else ", and is too little to be sure of."
        reason = (
            f"on {count} of {len(self.sketch.layers)} layers, each {self._evidence()}, '{best}' "
            f"leaves {less:.0%} less output error than '{second}' ({least:.0%} to {most:.0%}), and "
            "the model with these layers alone compressed agrees; what it is worth in "
            f"{self.task.scoring.metric.name} is estimated with noise of that size in the other "
            f"layers{end}"
        )
        return Verdict(ranking, "layer error", difference, difference.decisive, reason)

    def _imagine(self, best: Order, second: Order) -> Difference:
        """Return M of the best order less that of another, with noise in all other layers."""
        metric = self.task.scoring.metric
        performances = []
        for order in (best, second):
            self.sketch.imagine(order)
            performances.append(self._performances(metric))
        measured = interval(metric, (performances[0] - performances[1])[None])
        ratio = student(self.sketch.logarithms(second) - self.sketch.logarithms(best))
        return widened(extrapolate(measured, ratio))

    def _by_models(self, dropped: Sequence[Order]) -> Verdict:
        """Rank orders whose layers are all compressed by M of the whole model."""
        task = self.task
        metric = task.scoring.metric
        means = {order: self.scores[order].mean().item() for order in self.alive}
        ranked = sorted(self.alive, key=lambda order: -means[order])
        best, second = ranked[:2]
        scored = self._gap(best, second, task.scorer, self.scores[best] - self.scores[second])
        difference = widened(scored if task.scorer is metric else self._gap(best, second, metric))
        decisive = difference.decisive if task.scorer is metric else scored.decisive
        suffix = "" if task.scorer is metric else f", by {task.scorer.name}"
        unit = task.scoring.samples.unit
        evidence = (
            f"all layers, each {self._evidence()}, scored on {len(self.samples)} {unit}s{suffix}"
        )
        if decisive:
            reason = f"with {evidence}, '{best}' is ahead of '{second}'."
        else:
            reason = f"no difference between '{best}' and '{second}' that {evidence}, would show."
        ranking: Ranking = [(order, means[order]) for order in ranked]
        ranking += [(order, None) for order in dropped]
        return Verdict(ranking, task.scorer.name, difference, decisive, reason)

    def _gap(
        self, best: Order, second: Order, metric: Metric, whole: Tensor | None = None
    ) -> Difference:
        """Return the difference of two whole models, its interval over draws where they matter.

        Args:
            best: One order.
            second: The other.
            metric: What the models are measured by.
            whole: The difference of each sample, (samples,), if measured.
        """
        if whole is None:
            whole = self._difference(best, second, metric)
        plain = interval(metric, whole[None])
        draws = len(self.sketch.draws)
        if draws < 2 or not self.task.calibrates or not plain.decisive:
            return plain  # draws do not close what samples leave open
        reduced = [self._difference(best, second, metric, without=draw) for draw in range(draws)]
        return jackknife(metric, whole, torch.stack(reduced))

    def _difference(
        self, best: Order, second: Order, metric: Metric, without: int | None = None
    ) -> Tensor:
        """Return M of one order less that of another, with the layers of a draw left alone."""
        performances = []
        for order in (best, second):
            self.sketch.write(order, without=without)
            performances.append(self._performances(metric))
        return performances[0] - performances[1]

    def _performances(self, metric: Metric) -> Tensor:
        return self.task.measure(metric, self.samples).performances

    def _evidence(self) -> str:
        draws = self.sketch.draws
        if not draws:
            return "without data"
        unit = self.task.scoring.samples.unit
        return f"with one of {len(draws)} draws of {count_samples(draws[0])} calibration {unit}s"
