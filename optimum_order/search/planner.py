"""The planner: which order of some stages hurts a model least?

A compression that calibrates comes out otherwise with other calibration data, so an order is
called decisively better only where an interval that covers draws says so: `auto` splits its few
calibration samples into small draws, `measure` needs two draws or more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from optimum_order.engine.runner import Runner
from optimum_order.errors import OrderError, unknown
from optimum_order.order import Stage
from optimum_order.search.intervals import possible
from optimum_order.search.plan import Plan, runnable
from optimum_order.search.strategies import auto, measure, pih, proxy
from optimum_order.search.strategies.base import USUAL, Effort, Scoring, Task, Verdict

STRATEGIES: Mapping[str, Callable[[Task], Verdict]] = {
    "auto": auto.rank,
    "measure": measure.rank,
    "pih": pih.rank,
    "proxy": proxy.rank,
}
"""`pih` and `proxy` say nothing of M: they are rules of thumb to compare with."""


def plan(
    runner: Runner,
    stages: Iterable[Stage | str],
    scoring: Scoring,
    strategy: str = "auto",
    effort: Effort = USUAL,
    *,
    progress: bool = False,
) -> Plan:
    """Rank every order of some stages.

    Args:
        runner: The model, with its calibration draws.
        stages: 2 to 5 stages.
        scoring: The performance M, and what M is measured on: all of it by `measure`, a part by
            `auto`.
        strategy: One of `STRATEGIES`.
        effort: How much data to use, and how sure to be.
        progress: Whether to show a bar on stderr.

    Raises:
        OrderError: If there is no such strategy, if there are too few or too many stages, or if
            fewer than two orders can be run.
        DataError: If calibration data is missing or too short, or the samples do not suit the
            model.
        ModelError: If the metric says nothing about the model.
    """
    if strategy not in STRATEGIES:
        raise OrderError(unknown("strategy", strategy, STRATEGIES))
    orders, left_out = runnable(stages, runner.check)
    runner.check_metric(scoring.metric, scoring.samples)
    task = Task(runner, orders, scoring, effort, progress)
    wall = time.perf_counter()
    cpu = time.process_time()
    verdict = STRATEGIES[strategy](task)
    runner.reset()
    cost = {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        **task.cost,
    }
    return Plan(
        tuple(verdict.ranking),
        verdict.scored_by,
        strategy,
        scoring.metric.name,
        verdict.difference and possible(scoring.metric, verdict.difference),
        verdict.decisive,
        verdict.reason,
        cost,
        left_out,
    )
