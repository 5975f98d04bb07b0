"""Which order? Every permutation of some stages ranked, with what is expected of the best one and what that cost.

Strategies, cheapest first:

    pih      weaker first, stronger later (the Progressive Intensity Hypothesis), by M of each stage alone
    proxy    the layers' output errors on inputs of the original model: one pass of statistics, no model is run after
    auto     every order on a small part of the calibration data, block by block, then a race: the orders are scored
             on ever more samples, pair by pair, and one that is surely worse than the best is dropped
    measure  every order in full

`pih` and `proxy` say nothing about M itself. Neither was found to be reliable; they are here to be compared with.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm.auto import tqdm

from optimum_order import pipeline
from optimum_order.backends import Backend, method
from optimum_order.calibration.walk import walk
from optimum_order.errors import OrderError, unknown
from optimum_order.evaluation import Measurement, Metric, Samples
from optimum_order.evaluation.comparison import Difference, difference_over_draws
from optimum_order.layer import Statistics
from optimum_order.order import Order, Stage
from optimum_order.ordering.runner import Runner

STRATEGIES = ("auto", "measure", "pih", "proxy")
MOST_STAGES = 5

_PARTS = {"window": (16, (16, 8)), "image": (4, (4, 2, 1))}
"""What `auto` uses, by the kind of sample: the calibration draw divided by the first, the evaluation samples divided by
each of the others in turn; no fewer than 4. An image says less than a window: it has one answer and few tokens."""
_SURE = 0.99
"""How sure the race must be to drop an order; it looks several times, so this is stricter than what is reported."""


@dataclass(frozen=True)
class Plan:
    """A recommendation, and what it rests on.

    Args:
        ranking: Every order with its score, best first; what a score is depends on the strategy.
        strategy: How it was found.
        metric: The name of M.
        difference: Expected M of the recommended order less that of the next, with its interval; None where the
            strategy does not measure M.
        decisive: Whether the recommended order is known to be better than the next.
        reason: One sentence for people.
        cost: Seconds, processor seconds, and what was run.
    """

    ranking: tuple[tuple[Order, float], ...]
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

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, and for the manifest of what is compressed by it."""
        return {
            "order": str(self.order),
            "strategy": self.strategy,
            "metric": self.metric,
            "ranking": [{"order": str(order), "score": score} for order, score in self.ranking],
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
            + ("Add a stage." if len(order) < 2 else "Plan the most important ones, or run a study of chosen orders.")
        )
    found = list(order.permutations())
    if len(found) < 2:
        raise OrderError(f"All of these stages are the same, '{order[0]}', so there is nothing to order.")
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
        ranking, difference, decisive, reason = planner.auto(scorer or metric, calibration_samples)
    elif strategy == "measure":
        ranking, difference, decisive, reason = planner.measure(draws)
    else:
        ranking, reason = planner.pih() if strategy == "pih" else planner.proxy(calibration_samples)
        difference, decisive = None, False
    runner.reset()
    cost = {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        **planner.done,
    }
    return Plan(tuple(ranking), strategy, metric.name, difference, decisive, reason, cost)


Ranking = list[tuple[Order, float]]


class _Planner:
    def __init__(
        self, runner: Runner, orders: list[Order], metric: Metric, samples: Samples, batch_size: int, progress: bool
    ):
        self.runner, self.orders, self.metric, self.samples = runner, orders, metric, samples
        self.batch_size, self.progress = batch_size, progress
        self.done = {"orders": 0, "calibration_samples": 0, "scored_samples": 0}

    def auto(self, scorer: Metric, calibration_samples: int) -> tuple[Ranking, Difference, bool, str]:
        few, rounds = self._few(calibration_samples), _PARTS[self.samples.unit][1]
        batches = self.runner.batches(0, few)
        results = {}
        for order in self._shown(self.orders):
            results[order] = pipeline.run(
                self.runner.model,
                self.runner.units,
                order,
                batches,
                schedule="block",
                start=self.runner.original,
                progress=False,
            )
        self.done |= {"orders": len(results), "calibration_samples": few if batches else 0}
        scores: dict[Order, list[Tensor]] = {order: [] for order in results}
        alive, seen, best = list(results), 0, self.orders[0]
        for part in rounds:
            end = min(len(self.samples), max(4, len(self.samples) // part))
            if end == seen:
                continue
            new = self.samples.take(torch.arange(seen, end))
            for order in alive:
                results[order].write(self.runner.units)
                scores[order].append(self._measure(scorer, new).performances)
            seen = end
            best = max(alive, key=lambda order: torch.cat(scores[order]).mean().item())
            alive = [o for o in alive if o is best or not _surely(scores[best], scores[o], _SURE)]
            if len(alive) == 1:
                break
        self.done["scored_samples"] = seen
        ranking = sorted(
            ((order, torch.cat(scores[order]).mean().item()) for order in results),
            # those that were dropped earlier stand below those that stayed longer, whatever their mean was then
            key=lambda each: (-len(scores[each[0]]), -each[1]),
        )
        ranking.sort(key=lambda each: each[0] is not best)
        runner_up = ranking[1][0]
        together = min(len(scores[best]), len(scores[runner_up]))
        gaps = torch.cat(scores[best][:together]) - torch.cat(scores[runner_up][:together])
        decisive = len(alive) == 1 or _student(gaps, 0.95).decisive
        if scorer is self.metric:
            difference = _student(gaps, 0.95)
        else:
            common = self.samples.take(torch.arange(len(gaps)))
            measured = []
            for order in (best, runner_up):
                results[order].write(self.runner.units)
                measured.append(self._measure(self.metric, common).performances)
            difference = _student(measured[0] - measured[1], 0.95)
        unit = f"{len(gaps)} {self.samples.unit}s"
        by = f", by {scorer.name}" if scorer is not self.metric else ""
        if decisive:
            reason = (
                f"compressed with {few} calibration samples and scored on {unit}{by}, '{best}' is ahead of all others."
            )
        else:
            reason = f"no difference between '{best}' and '{runner_up}' that {unit}{by} would show."
        return ranking, difference, decisive, reason

    def measure(self, draws: int) -> tuple[Ranking, Difference, bool, str]:
        needed = range(draws) if any(pipeline.needs_data(stage) for stage in self.orders[0]) else range(1)
        found: dict[Order, list[Tensor]] = {order: [] for order in self.orders}
        for draw in needed:
            for order in self._shown(self.orders):
                self.runner.run(order, draw)
                found[order].append(self._measure(self.metric, self.samples).performances)
        self.done |= {"orders": len(self.orders) * len(needed), "scored_samples": len(self.samples)}
        ranking = sorted(((o, torch.stack(m).mean().item()) for o, m in found.items()), key=lambda each: -each[1])
        (best, _), (second, _) = ranking[:2]
        difference = difference_over_draws(torch.stack(found[best]) - torch.stack(found[second]))
        what = f"{len(needed)} calibration draw{'s' if len(needed) > 1 else ''}"
        if difference.decisive:
            reason = f"measured in full with {what}, '{best}' is better than '{second}'."
        else:
            reason = f"no difference between '{best}' and '{second}' that {what} would show."
        return ranking, difference, difference.decisive, reason

    def pih(self) -> tuple[Ranking, str]:
        alone: dict[Stage, float] = {}
        for stage in self._shown(dict.fromkeys(self.orders[0])):
            self.runner.run(Order((stage,)), 0)
            alone[stage] = self._measure(self.metric, self.samples).performance
        self.done |= {"orders": len(alone), "scored_samples": len(self.samples)}

        def inversions(order: Order) -> float:
            return float(sum(alone[a] < alone[b] for a, b in itertools.combinations(order, 2)))

        ranking = sorted(((order, inversions(order)) for order in self.orders), key=lambda each: each[1])
        weakest, strongest = max(alone, key=alone.__getitem__), min(alone, key=alone.__getitem__)
        return ranking, f"weaker first: of the stages alone '{weakest}' costs the least and '{strongest}' the most."

    def proxy(self, calibration_samples: int) -> tuple[Ranking, str]:
        few = self._few(calibration_samples)
        known: dict[str, Statistics] = {}
        batches = self.runner.batches(0, few)
        if batches:
            self.runner.reset()
            walk(self.runner.model, self.runner.units, batches, lambda at: known.update(at.statistics), gram=True)
        self.done |= {"orders": len(self.orders), "calibration_samples": few if batches else 0}
        errors = []
        for order in self._shown(self.orders):
            backends = [_backend(stage) for stage in order]
            total = 0.0
            for name, original in self.runner.original.states.items():
                state = original
                for backend in backends:
                    state = backend.apply(state, known.get(name), where=name)
                total += pipeline.relative_error(original.weight, state.weight, known.get(name))[0]
            errors.append((order, total / len(self.runner.original.states)))
        ranking = sorted(errors, key=lambda each: each[1])
        (_, least), (_, next_) = ranking[:2]
        return ranking, f"the layers' mean relative output error is {least:.3g} in this order, {next_:.3g} in the next."

    def _few(self, calibration_samples: int) -> int:
        return min(calibration_samples, max(4, calibration_samples // _PARTS[self.samples.unit][0]))

    def _shown(self, work: Collection) -> Iterable:
        return tqdm(work, desc="plan", unit="order", disable=not self.progress)

    def _measure(self, metric: Metric, samples: Samples) -> Measurement:
        return self.runner.measure(metric, samples, batch_size=self.batch_size)


def _backend(stage: Stage) -> Backend:
    chosen = method(stage)
    if not isinstance(chosen, Backend):
        raise OrderError(f"Strategy 'proxy' looks at one layer at a time and cannot rank '{stage}'; use 'auto'.")
    return chosen


def _student(differences: Tensor, confidence: float) -> Difference:
    """The mean and its t interval over samples, which unlike a bootstrap is right for a handful of them."""
    mean, count = differences.mean().item(), len(differences)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * (differences.std() / count**0.5).item()
    return Difference(mean, mean - half, mean + half, "samples", confidence)


def _surely(best: Sequence[Tensor], other: Sequence[Tensor], confidence: float) -> bool:
    return _student(torch.cat(list(best)) - torch.cat(list(other)), confidence).low > 0
