"""What many orders of one model would take, from what their methods take alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optimum_order import files
from optimum_order.engine.recipe import method
from optimum_order.estimate import Estimate
from optimum_order.order import Order, Stage


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What running and measuring many orders would take; a guess within a factor of two or so.

    Args:
        trials: Orders that are run, each with every draw that changes it.
        compressing: Seconds of compressing, beginnings that orders share counted once.
        measuring: Seconds of measuring; None for models that read no text.
        memory: Bytes that the process has resident at most.
    """

    trials: int
    compressing: float
    measuring: float | None
    memory: int

    @property
    def seconds(self) -> float:
        """Of all that is counted."""
        return self.compressing + (self.measuring or 0.0)

    def __str__(self) -> str:
        rest = "" if self.measuring is not None else ", and measuring on top"
        return (
            f"{self.trials} trials, about {files.duration(self.seconds)}{rest}, "
            f"{files.size(self.memory)} of memory"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON, and in words."""
        return dataclasses.asdict(self) | {"seconds": self.seconds, "summary": str(self)}


def forecast(
    runs: Mapping[Order, int],
    estimates: Mapping[str, Estimate],
    measured_tokens: float | None,
    parameters: int,
) -> Forecast:
    """Return what some runs would take.

    Args:
        runs: The calibration draws of each order.
        estimates: What one stage of each method takes, by the name of the method.
        measured_tokens: Tokens that each model is measured on, or None if not known.
        parameters: Weights of the model.
    """
    prefixes: dict[tuple[Stage, ...], int] = {}
    for order, draws in runs.items():
        for length in range(1, len(order) + 1):
            prefix = order.stages[:length]
            times = draws if any(method(stage).needs_data for stage in prefix) else 1
            prefixes[prefix] = max(times, prefixes.get(prefix, 0))
    trials = sum(runs.values())
    seconds = {
        name: sum(step.seconds for step in estimate.steps) for name, estimate in estimates.items()
    }
    loading = max(estimate.loading for estimate in estimates.values())
    measuring = None
    if measured_tokens is not None:
        speed = max(estimate.rates.forward for estimate in estimates.values())
        measuring = (trials + 1) * 2 * parameters * measured_tokens / speed
    return Forecast(
        trials=trials,
        compressing=loading
        + sum(times * seconds[prefix[-1].method] for prefix, times in prefixes.items()),
        measuring=measuring,
        memory=max(estimate.memory for estimate in estimates.values()),
    )
