"""What a strategy is asked, with what, and what it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from optimum_order.engine.recipe import Recipe
from optimum_order.engine.runner import Batches, Runner
from optimum_order.evaluation import Measurement, Metric, Samples
from optimum_order.evaluation.comparison import Difference
from optimum_order.order import Order
from optimum_order.progress import Bar
from optimum_order.search.plan import Ranking


class _Divisors(NamedTuple):
    """What parts of the samples are used for a cheap look."""

    calibration: int
    scoring: int


_DIVISORS = {"image": _Divisors(calibration=4, scoring=16)}
"""By the kind of sample: an image has few tokens, and users bring many."""
_USUAL_DIVISORS = _Divisors(calibration=16, scoring=8)
_SMALL_DRAWS = 4
"""How many small draws a few calibration samples are split into."""


@dataclass(frozen=True)
class Scoring:
    """The performance that orders are compared by.

    Args:
        metric: M.
        samples: What M is measured on.
        scorer: What `auto` ranks by, where M of a single sample is too coarse, as accuracy is; by
            default M.
    """

    metric: Metric
    samples: Samples
    scorer: Metric | None = None


@dataclass(frozen=True)
class Effort:
    """How much data a strategy uses, and how sure it must be.

    Args:
        calibration_samples: Samples in a calibration draw.
        draws: Calibration draws that `measure` runs.
        confidence: Of both witnesses together before `auto` drops an order. The surer, the more
            layers it looks at, and the more often whole models decide: at 1 always, at 0 as seldom
            as can be.
    """

    calibration_samples: int = 128
    draws: int = 1
    confidence: float = 0.9


USUAL = Effort()


class Verdict(NamedTuple):
    """The answer of a strategy; see `Plan`."""

    ranking: Ranking
    scored_by: str
    difference: Difference | None
    decisive: bool
    reason: str


@dataclass
class Task:
    """Orders to rank.

    Args:
        runner: The model, with its calibration draws.
        orders: Canonical orders that can be run.
        scoring: The performance.
        effort: How much data to use, and how sure to be.
        progress: Whether to show a bar on stderr.
        cost: What was run; strategies write into it.
    """

    runner: Runner
    orders: list[Order]
    scoring: Scoring
    effort: Effort = USUAL
    progress: bool = False
    cost: dict[str, int] = field(
        default_factory=lambda: {"orders": 0, "calibration_samples": 0, "scored_samples": 0}
    )

    @property
    def scorer(self) -> Metric:
        """What `auto` ranks by."""
        return self.scoring.scorer or self.scoring.metric

    @property
    def calibrates(self) -> bool:
        """Whether a stage looks at the layers' inputs."""
        return Recipe.of(self.orders[0]).needs_data

    @property
    def single_layers(self) -> bool:
        """Whether each stage treats one layer by itself."""
        methods = Recipe.of(self.orders[0]).methods
        return all(method.kind in ("prune", "quantize") for method in methods)

    @contextlib.contextmanager
    def bar(self, unit: str, total: int | None = None) -> Iterator[Bar]:
        """Show a bar while active.

        Args:
            unit: The word for one thing that is done.
            total: How many there are, if certain.
        """
        with Bar(total=total, desc="plan", unit=unit, disable=not self.progress) as bar:
            yield bar

    def measure(self, metric: Metric, samples: Samples) -> Measurement:
        """Measure the model as it is now.

        Args:
            metric: The metric.
            samples: What it is measured on.
        """
        batch_size = self.scoring.samples.batch_size
        return self.runner.measure(metric, samples, batch_size=batch_size)

    @property
    def _divisors(self) -> _Divisors:
        return _DIVISORS.get(self.scoring.samples.unit, _USUAL_DIVISORS)

    def few_calibration_samples(self) -> int:
        """Return the number of calibration samples for a cheap look."""
        total = self.effort.calibration_samples
        fewest = max(method.fewest_samples for method in Recipe.of(self.orders[0]).methods)
        few = total // self._divisors.calibration
        return min(total, max(_SMALL_DRAWS * fewest, few))

    def small_draws(self) -> list[Batches]:
        """Return a few calibration samples in disjoint parts; none without calibration."""
        batches = self.runner.batches(0, self.few_calibration_samples())
        if not batches:
            return []
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        count = min(len(tensor) for tensor in whole.values())
        parts = [
            torch.arange(count)[first::_SMALL_DRAWS] for first in range(min(_SMALL_DRAWS, count))
        ]
        return [[{name: tensor[part] for name, tensor in whole.items()}] for part in parts]

    def few_samples(self) -> Samples:
        """Return a few samples to score with, from all over them."""
        samples = self.scoring.samples
        total = len(samples)
        count = min(total, max(4, total // self._divisors.scoring))
        return samples.take(torch.arange(count) * total // count)


def count_samples(batches: Batches) -> int:
    """Return the number of samples in batches."""
    return sum(len(next(iter(batch.values()))) for batch in batches)
