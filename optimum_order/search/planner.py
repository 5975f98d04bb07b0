"""Which order? Every permutation of some stages ranked, with what is expected of the best one and what that cost.

Strategies:

    auto     a few layers, each compressed in every order with a calibration draw of its own. There are two witnesses:
             the layers' output errors, and M (or what stands for it) of the model with these layers alone compressed,
             on a few samples. An order is out once both say so and the errors differ by more than chance; otherwise
             twice as many layers are looked at, and where that never ends it, M of the whole models decides
    measure  every order in full, with one calibration draw or more
    proxy    the output errors of all layers on inputs of the original model: no model is run after
    pih      weaker first, stronger later (the Progressive Intensity Hypothesis), by M of each stage alone

`pih` and `proxy` say nothing about M itself; they are here to be compared with.

A compression that calibrates comes out otherwise with other calibration data, so an order is only called decisively
better where an interval that covers draws says so: `auto` splits its few calibration samples into small draws,
`measure` needs two draws or more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm.auto import tqdm

from optimum_order.backends import Allocator
from optimum_order.engine.recipe import Recipe, method
from optimum_order.engine.run import Subject, run
from optimum_order.engine.runner import Batches, Runner
from optimum_order.errors import OrderError, unknown
from optimum_order.evaluation import Measurement, Metric, Samples
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.comparison import Difference, difference_over_draws
from optimum_order.order import Order, Stage
from optimum_order.search.sketch import Sketch

STRATEGIES = ("auto", "measure", "pih", "proxy")
MOST_STAGES = 5

_CALIBRATING = {"window": 16, "image": 4}
_SCORING = {"window": 16, "image": 8}
"""What `auto` uses, by the kind of sample: the calibration draw, and what models are scored on, divided by these. An
image says less than a window: it has one answer and few tokens."""
_SMALL_DRAWS = 4
"""Into how many small draws `auto` splits its calibration samples."""
_FIRST_LAYERS = 4
"""How many layers `auto` looks at to begin with."""
CONFIDENCE = 0.9
"""Of the interval of the output errors' ratio that must exclude 1 before `auto` believes them."""
_BIAS = 0.1
"""What a logarithm of the output errors' ratio may be off by, when it stands for M, however many layers it is of.

Chosen after two cases of tiny-llama in which it pointed the wrong way by 0.05 and 0.07 (benchmarks/planner.py)."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Plan:
    """A recommendation, and what it rests on.

    Args:
        ranking: Every order with its score, best first; None for one that was dropped before it was scored.
        scored_by: What a score is: a metric's mean, higher is better, or one of `layer error` (of the layers' outputs,
            relative) and `inversions` (of the weaker-first rule), lower is better.
        strategy: How it was found.
        metric: The name of M.
        difference: Expected M of the recommended order less that of the next, with its interval and what that covers;
            None where the strategy does not measure M.
        decisive: Whether the recommended order is known to be better than the next, whatever the calibration draw.
        reason: One sentence for people.
        cost: Seconds, processor seconds, and what was run.
    """

    ranking: tuple[tuple[Order, float | None], ...]
    scored_by: str
    strategy: str
    metric: str
    difference: Difference | None
    decisive: bool
    reason: str
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> Order:
        """The recommended order."""
        return self.ranking[0][0]

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` was made of."""
        gap = found["difference"]
        ranking = tuple((Order.parse(row["order"]), row["score"]) for row in found["ranking"])
        difference = gap and Difference(
            **{name: value for name, value in gap.items() if name != "decisive"}
        )
        rest = ("scored_by", "strategy", "metric", "decisive", "reason", "cost")
        return cls(ranking, difference=difference, **{name: found[name] for name in rest})

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, and for the manifest of what is compressed by it."""
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
        }


def permutations(stages: Iterable[Stage | str]) -> list[Order]:
    """Every distinct order of these stages.

    Raises:
        OrderError: If there are fewer than 2 of them, or more than can be planned.
    """
    order = Order(stages)
    if not 2 <= len(order) <= MOST_STAGES:
        raise OrderError(
            f"A plan is for 2 to {MOST_STAGES} stages, got {len(order)}. "
            + (
                "Add a stage."
                if len(order) < 2
                else "Plan the most important ones, or run a study of chosen orders."
            )
        )
    found = list(order.permutations())
    if len(found) < 2:
        raise OrderError(
            f"All of these stages are the same, '{order[0]}', so there is nothing to order."
        )
    return found


def plan(
    runner: Runner,
    stages: Iterable[Stage | str],
    metric: Metric,
    samples: Samples,
    *,
    strategy: str = "auto",
    scorer: Metric | None = None,
    calibration_samples: int = 128,
    draws: int = 1,
    confidence: float = CONFIDENCE,
    batch_size: int = 8,
    progress: bool = False,
) -> Plan:
    """Rank every order of the stages.

    Args:
        runner: The model, with its calibration draws.
        stages: 2 to 5 of them.
        metric: The performance M.
        samples: What M is measured on: all of it by `measure`, a part by `auto`.
        strategy: One of `STRATEGIES`.
        scorer: What `auto` ranks by, where M of a single sample is too coarse, as accuracy is; by default M.
        calibration_samples: How many a draw has.
        draws: How many calibration draws `measure` runs.
        confidence: How sure `auto` must be of the layers' output errors. The surer, the more layers it looks at, and
            the more often whole models decide: at 1 always, at 0 as seldom as can be.
        batch_size: Of the metric.
        progress: Whether to show a bar on stderr.

    Raises:
        OrderError: If there is no such strategy, too few or too many stages, or an order that cannot be run.
        DataError: If calibration data is missing or too short, or the samples do not suit the model.
        ModelError: If the metric says nothing about the model.
    """
    if strategy not in STRATEGIES:
        raise OrderError(unknown("strategy", strategy, STRATEGIES))
    orders = [runner.check(order) for order in permutations(stages)]
    metric.check(runner.model, samples)
    planner = _Planner(runner, orders, metric, samples, batch_size, progress)
    wall, cpu = time.perf_counter(), time.process_time()
    if strategy == "auto":
        found = planner.auto(scorer or metric, calibration_samples, confidence)
    elif strategy == "measure":
        found = planner.measure(draws)
    else:
        found = planner.pih() if strategy == "pih" else planner.proxy(calibration_samples)
    runner.reset()
    cost = {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        **planner.done,
    }
    return Plan(
        tuple(found.ranking),
        found.scored_by,
        strategy,
        metric.name,
        found.difference,
        found.decisive,
        found.reason,
        cost,
    )


Ranking = list[tuple[Order, float | None]]


class Found(NamedTuple):
    """What a strategy makes of the orders; see `Plan`."""

    ranking: Ranking
    scored_by: str
    difference: Difference | None
    decisive: bool
    reason: str


class _Planner:
    def __init__(
        self,
        runner: Runner,
        orders: list[Order],
        metric: Metric,
        samples: Samples,
        batch_size: int,
        progress: bool,
    ):
        self.runner, self.orders, self.metric, self.samples = runner, orders, metric, samples
        self.batch_size, self.progress = batch_size, progress
        self.done = {"orders": 0, "calibration_samples": 0, "scored_samples": 0}
        self._calibrated = any(method(stage).needs_data for stage in orders[0])

    def auto(self, scorer: Metric, calibration_samples: int, confidence: float) -> Found:
        if any(isinstance(method(stage), Allocator) for stage in self.orders[0]):
            return self._in_small(scorer, calibration_samples)
        draws, samples = self._small_draws(calibration_samples), self._some(_SCORING)
        with self._bar("layer") as bar:
            sketch = Sketch(self.runner, self.orders, draws, bar.update)
            total, count, alive = (
                len(sketch.layers),
                max(_FIRST_LAYERS, len(draws)),
                list(self.orders),
            )
            while True:
                count = min(count, total)
                sketch.take(count, alive)
                scores = self._scores(sketch, alive, scorer, samples)
                best, ratios = self._ratios(sketch, alive, confidence)
                mean = {order: scores[order].mean().item() for order in alive}
                sure = {o for o, found in ratios.items() if found.low > 0 and mean[o] < mean[best]}
                alive = [order for order in alive if order not in sure]
                if len(alive) == 1 or count == total:
                    break
                count *= 2
        self.done |= {
            "orders": len(self.orders),
            "calibration_samples": sum(map(_count, draws)),
            "scored_samples": len(samples),
            "layers": count,
        }
        errors = {order: sketch.logarithms(order).mean().exp().item() for order in self.orders}
        # those that fell behind earlier were looked at on fewer layers
        by_error = sorted(
            self.orders, key=lambda order: (order not in alive, order not in ratios, errors[order])
        )
        if len(alive) > 1:
            dropped = [order for order in by_error if order not in alive]
            return self._whole(
                sketch, {order: scores[order] for order in alive}, dropped, scorer, samples
            )
        second, found = by_error[1], ratios[by_error[1]]
        difference = self._imagined(sketch, best, second, samples)
        less, most, least = (1 - math.exp(-ratio) for ratio in (found.mean, found.high, found.low))
        reason = (
            f"on {count} of {total} layers, each {self._seen(draws)}, '{best}' leaves {less:.0%} less output error "
            f"than '{second}' ({least:.0%} to {most:.0%}), and the model with these layers alone compressed agrees; "
            f"what it is worth in {self.metric.name} is estimated with noise of that size in the other layers"
            f"{'.' if difference.decisive else ', and is too little to be sure of.'}"
        )
        known = {best, *ratios}
        ranking: Ranking = [
            (order, errors[order] if order in known else None) for order in by_error
        ]
        return Found(ranking, "layer error", difference, difference.decisive, reason)

    def _scores(
        self, sketch: Sketch, orders: Iterable[Order], scorer: Metric, samples: Samples
    ) -> dict[Order, Tensor]:
        """What the model is worth with the layers that were taken and no other compressed: (samples,) of each order."""
        found = {}
        for order in orders:
            sketch.write(order)
            found[order] = self._measure(scorer, samples).performances
        return found

    def _ratios(
        self, sketch: Sketch, orders: Iterable[Order], confidence: float
    ) -> tuple[Order, dict[Order, Difference]]:
        """The order with the least output error, and the logarithm of every other's over it, over layers and draws."""
        logarithms = {order: sketch.logarithms(order) for order in orders}
        best = min(logarithms, key=lambda order: logarithms[order].mean().item())
        return best, {
            o: _student(found - logarithms[best], confidence)
            for o, found in logarithms.items()
            if o != best
        }

    def _imagined(self, sketch: Sketch, best: Order, second: Order, samples: Samples) -> Difference:
        """M of the best order less that of another, where the layers that were not looked at are noise.

        Its interval is that over samples and that over layers and draws of what it comes from, and what such errors do
        not say of M (`_BIAS`) is in it too: M is taken to differ in proportion to their logarithm.
        """
        measured = []
        for order in (best, second):
            sketch.imagine(order)
            measured.append(self._measure(self.metric, samples).performances)
        over_samples = self._interval(self.metric, (measured[0] - measured[1])[None])
        ratio = _student(sketch.logarithms(second) - sketch.logarithms(best), _CONFIDENCE)
        mean = over_samples.mean
        unknown = math.hypot(ratio.high - ratio.mean, _BIAS)
        over_layers = abs(mean) * unknown / ratio.mean
        half = math.hypot(over_samples.high - mean, over_layers)
        return Difference(mean, mean - half, mean + half, "draws, layers and samples", _CONFIDENCE)

    def _whole(
        self,
        sketch: Sketch,
        scores: dict[Order, Tensor],
        dropped: list[Order],
        scorer: Metric,
        samples: Samples,
    ) -> Found:
        """Rank orders whose layers are all compressed by what the whole model makes of them."""
        ranked = sorted(scores, key=lambda order: -scores[order].mean().item())
        best, second = ranked[:2]
        found = self._jackknife(
            sketch, best, second, scorer, samples, scores[best] - scores[second]
        )
        difference = (
            found
            if scorer is self.metric
            else self._jackknife(sketch, best, second, self.metric, samples)
        )
        shown = f"{len(samples)} {self.samples.unit}s"
        by = f", by {scorer.name}" if scorer is not self.metric else ""
        how = f"all layers, each {self._seen(sketch.draws)}, scored on {shown}{by}"
        if found.decisive:
            reason = f"with {how}, '{best}' is ahead of '{second}'."
        else:
            reason = f"no difference between '{best}' and '{second}' that {how}, would show."
        ranking: Ranking = [(order, scores[order].mean().item()) for order in ranked]
        return Found(
            [*ranking, *((order, None) for order in dropped)],
            scorer.name,
            difference,
            found.decisive,
            reason,
        )

    def _jackknife(
        self,
        sketch: Sketch,
        best: Order,
        second: Order,
        metric: Metric,
        samples: Samples,
        gaps: Tensor | None = None,
    ) -> Difference:
        """The difference of two whole models; its interval from leaving out the layers of one draw after another.

        With D the difference and D_r that without the layers of draw r, R D - (R - 1) D_r are as good as R independent
        estimates of D (Tukey's pseudo-values), which vary with draws, layers and samples.
        """

        def gap(draw: int | None) -> Tensor:
            found = []
            for order in (best, second):
                sketch.write(order, without=draw)
                found.append(self._measure(metric, samples).performances)
            return found[0] - found[1]

        whole = gap(None) if gaps is None else gaps
        plain, count = self._interval(metric, whole[None]), len(sketch.draws)
        if (
            count < 2 or not self._calibrated or not plain.decisive
        ):  # what samples leave open, draws do not close
            return plain
        values = torch.stack([count * whole - (count - 1) * gap(draw) for draw in range(count)])
        found = self._interval(metric, values, "draws, layers and samples")
        moved = plain.mean - found.mean
        return dataclasses.replace(
            found, mean=plain.mean, low=found.low + moved, high=found.high + moved
        )

    def _in_small(self, scorer: Metric, calibration_samples: int) -> Found:
        """Every order in full on each of the small draws, for stages that look at all layers at once."""
        draws, samples = self._small_draws(calibration_samples), self._some(_SCORING)
        scores: dict[Order, list[Tensor]] = {order: [] for order in self.orders}
        values: dict[Order, list[Tensor]] = {order: [] for order in self.orders}
        with self._bar("order") as bar:
            for batches, order in itertools.product(draws, self.orders):
                subject = Subject(self.runner.model, self.runner.units, batches)
                recipe = Recipe.of(order, "block")
                run(subject, recipe, self.runner.execution, start=self.runner.original)
                scores[order].append(self._measure(scorer, samples).performances)
                if scorer is not self.metric:
                    values[order].append(self._measure(self.metric, samples).performances)
                bar.update()
        self.done |= {
            "orders": len(draws) * len(self.orders),
            "calibration_samples": sum(map(_count, draws)),
            "scored_samples": len(samples),
        }
        means = {order: torch.stack(found).mean().item() for order, found in scores.items()}
        best, second, *_ = ranked = sorted(self.orders, key=lambda order: -means[order])
        found = self._interval(scorer, torch.stack(scores[best]) - torch.stack(scores[second]))
        difference = found
        if scorer is not self.metric:
            difference = self._interval(
                self.metric, torch.stack(values[best]) - torch.stack(values[second])
            )
        how = f"{len(draws)} draws of {_count(draws[0])} calibration samples and {len(samples)} {self.samples.unit}s"
        if found.decisive:
            reason = f"compressed and scored with {how}, '{best}' is ahead of '{second}'."
        else:
            reason = f"no difference between '{best}' and '{second}' that {how} would show."
        return Found(
            [(order, means[order]) for order in ranked],
            scorer.name,
            difference,
            found.decisive,
            reason,
        )

    def measure(self, draws: int) -> Found:
        needed = range(draws) if self._calibrated else range(1)
        found: dict[Order, list[Tensor]] = {order: [] for order in self.orders}
        with self._bar("order", len(needed) * len(self.orders)) as bar:
            for draw, order in itertools.product(needed, self.orders):
                self.runner.run(order, draw)
                found[order].append(self._measure(self.metric, self.samples).performances)
                bar.update()
        self.done |= {"orders": len(self.orders) * len(needed), "scored_samples": len(self.samples)}
        ranking = sorted(
            ((o, torch.stack(m).mean().item()) for o, m in found.items()), key=lambda each: -each[1]
        )
        (best, _), (second, _) = ranking[:2]
        difference = difference_over_draws(torch.stack(found[best]) - torch.stack(found[second]))
        known = len(needed) > 1 or not self._calibrated
        what = (
            f"{len(needed)} calibration draw{'s' if len(needed) > 1 else ''}"
            if self._calibrated
            else "all samples"
        )
        if not difference.decisive:
            reason = f"no difference between '{best}' and '{second}' that {what} would show."
        elif known:
            reason = f"measured in full with {what}, '{best}' is better than '{second}'."
        else:
            reason = (
                f"'{best}' is better than '{second}' with this one calibration draw, and the interval covers samples "
                "only; whether it is with another draw takes more of them to know."
            )
        return Found(
            [*ranking], self.metric.name, difference, difference.decisive and known, reason
        )

    def pih(self) -> Found:
        alone: dict[Stage, float] = {}
        with self._bar("stage") as bar:
            for stage in dict.fromkeys(self.orders[0]):
                self.runner.run(Order((stage,)), 0)
                alone[stage] = self._measure(self.metric, self.samples).performance
                bar.update()
        self.done |= {"orders": len(alone), "scored_samples": len(self.samples)}

        def inversions(order: Order) -> float:
            return float(sum(alone[a] < alone[b] for a, b in itertools.combinations(order, 2)))

        ranking = sorted(
            ((order, inversions(order)) for order in self.orders), key=lambda each: each[1]
        )
        weakest, strongest = max(alone, key=alone.__getitem__), min(alone, key=alone.__getitem__)
        reason = f"weaker first: of the stages alone '{weakest}' costs the least and '{strongest}' the most."
        return Found([*ranking], "inversions", None, False, reason)

    def proxy(self, calibration_samples: int) -> Found:
        few = self._few(calibration_samples)
        batches = self.runner.batches(0, few)
        with self._bar("layer") as bar:
            sketch = Sketch(self.runner, self.orders, [batches] if batches else [], bar.update)
            sketch.take(len(sketch.layers), self.orders)
        self.done |= {
            "orders": len(self.orders),
            "calibration_samples": few if batches else 0,
            "layers": len(sketch.layers),
        }
        errors = {order: sum(found.values()) / len(found) for order, found in sketch.errors.items()}
        ranking = sorted(errors.items(), key=lambda each: each[1])
        (_, least), (_, next_) = ranking[:2]
        reason = f"the layers' mean relative output error is {least:.3g} in this order, {next_:.3g} in the next."
        return Found([*ranking], "layer error", None, False, reason)

    def _few(self, calibration_samples: int) -> int:
        return min(
            calibration_samples, max(4, calibration_samples // _CALIBRATING[self.samples.unit])
        )

    def _small_draws(self, calibration_samples: int) -> list[Batches]:
        """A few calibration samples in disjoint parts; none where there is no calibration."""
        batches = self.runner.batches(0, self._few(calibration_samples))
        whole = {
            name: torch.cat([batch[name] for batch in batches])
            for name in (batches[0] if batches else {})
        }
        count = min((len(tensor) for tensor in whole.values()), default=0)
        parts = [
            torch.arange(count)[first::_SMALL_DRAWS] for first in range(min(_SMALL_DRAWS, count))
        ]
        return [[{name: tensor[part] for name, tensor in whole.items()}] for part in parts]

    def _some(self, divided_by: dict[str, int]) -> Samples:
        """So many of the samples, from all over them."""
        total = len(self.samples)
        count = min(total, max(2, total // divided_by[self.samples.unit]))
        return self.samples.take(torch.arange(count) * total // count)

    def _seen(self, draws: list[Batches]) -> str:
        unit = self.samples.unit
        return (
            f"with one of {len(draws)} draws of {_count(draws[0])} calibration {unit}s"
            if draws
            else "without data"
        )

    def _interval(
        self, metric: Metric, gaps: Tensor, over: str = "draws and samples"
    ) -> Difference:
        """The mean of gaps (draws, samples) and its interval."""
        draws, samples = gaps.shape
        if isinstance(metric, Accuracy) and not gaps.any():
            # no answer changed, of so few: the share of those that do may still be this large (the "rule of three")
            most = 1 - (1 - _CONFIDENCE) ** (1 / samples)
            return Difference(0.0, -most, most, over if draws > 1 else "samples", _CONFIDENCE)
        if draws == 1:
            return _student(gaps[0], _CONFIDENCE)
        return dataclasses.replace(difference_over_draws(gaps, confidence=_CONFIDENCE), over=over)

    @contextlib.contextmanager
    def _bar(self, unit: str, total: int | None = None) -> Iterator[tqdm]:
        with tqdm(total=total, desc="plan", unit=unit, disable=not self.progress) as bar:
            yield bar

    def _measure(self, metric: Metric, samples: Samples) -> Measurement:
        return self.runner.measure(metric, samples, batch_size=self.batch_size)


def _count(batches: Batches) -> int:
    """How many samples."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def _student(differences: Tensor, confidence: float) -> Difference:
    """The mean and its t interval over samples, which unlike a bootstrap is right for a handful of them."""
    mean, count = differences.mean().item(), len(differences)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * (differences.std() / count**0.5).item()
    return Difference(mean, mean - half, mean + half, "samples", confidence)
