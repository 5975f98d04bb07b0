"""Every order on a few small draws: what `auto` does where stages look at all layers.

What learns takes fewer steps there, and goes as often over each sample.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Subject, run
from optimum_order.evaluation import Metric
from optimum_order.order import Order
from optimum_order.search.intervals import interval
from optimum_order.search.strategies.base import Task, Verdict, count_samples


def rank(task: Task) -> Verdict:
    """Rank orders by the scorer's mean over small draws and a few samples."""
    runner = task.runner
    draws = task.small_draws() or [[]]
    part = count_samples(draws[0]) / max(1, task.effort.calibration_samples)
    stand_ins = {
        order: Order([method.on_a_part(part) for method in Recipe.of(order).methods])
        for order in task.orders
    }
    samples = task.few_samples()
    metrics = list(dict.fromkeys([task.scorer, task.scoring.metric]))
    rows: dict[tuple[Order, Metric], list[Tensor]] = {
        key: [] for key in itertools.product(task.orders, metrics)
    }
    with task.bar("order") as bar:
        for batches, order in itertools.product(draws, task.orders):
            runner.reset()  # a stage may have made the model smaller
            subject = Subject(runner.model, runner.units, batches, runner.source.load)
            recipe = Recipe.of(stand_ins[order], "block")
            run(subject, recipe, runner.execution, start=runner.original)
            for metric in metrics:
                rows[order, metric].append(task.measure(metric, samples).performances)
            bar.update()
    task.cost |= {
        "orders": len(draws) * len(task.orders),
        "calibration_samples": sum(map(count_samples, draws)),
        "scored_samples": len(samples),
    }
    scores = {key: torch.stack(performances) for key, performances in rows.items()}
    means = {order: scores[order, task.scorer].mean().item() for order in task.orders}
    ranked = sorted(task.orders, key=lambda order: -means[order])
    best, second = ranked[:2]
    differences = {
        metric: interval(metric, scores[best, metric] - scores[second, metric])
        for metric in metrics
    }
    decisive = differences[task.scorer].decisive
    shorter = ", ".join(f"'{stage}'" for stage in stand_ins[best] if stage not in best)
    evidence = f"{len(samples)} {samples.unit}s"
    if draws[0]:
        size = count_samples(draws[0])
        evidence = f"{len(draws)} draws of {size} calibration samples and {evidence}"
        if shorter:
            evidence += f" (with {shorter})"
    if decisive:
        reason = f"compressed and scored with {evidence}, '{best}' is ahead of '{second}'."
    else:
        reason = f"no difference between '{best}' and '{second}' that {evidence} would show."
    return Verdict(
        [(order, means[order]) for order in ranked],
        task.scorer.name,
        differences[task.scoring.metric],
        decisive,
        reason,
    )
