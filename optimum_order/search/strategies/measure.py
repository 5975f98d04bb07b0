"""`measure`: every order in full, with one calibration draw or more."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.order import Order
from optimum_order.search.strategies.base import Task, Verdict


def rank(task: Task) -> Verdict:
    """Rank orders by M of the whole models."""
    metric = task.scoring.metric
    samples = task.scoring.samples
    draws = task.effort.draws if task.calibrates else 1
    performances: dict[Order, list[Tensor]] = {order: [] for order in task.orders}
    with task.bar("order", draws * len(task.orders)) as bar:
        for draw, order in itertools.product(range(draws), task.orders):
            task.runner.run(order, draw)
            performances[order].append(task.measure(metric, samples).performances)
            bar.update()
    task.cost |= {"orders": len(task.orders) * draws, "scored_samples": len(samples)}
    stacked = {order: torch.stack(rows) for order, rows in performances.items()}
    means = {order: rows.mean().item() for order, rows in stacked.items()}
    ranked = sorted(task.orders, key=lambda order: -means[order])
    best, second = ranked[:2]
    difference = difference_over_draws(stacked[best] - stacked[second])
    covers_draws = draws > 1 or not task.calibrates
    evidence = "all samples"
    if task.calibrates:
        evidence = f"{draws} calibration draw{'s' if draws > 1 else ''}"
    if not difference.decisive:
        reason = f"no difference between '{best}' and '{second}' that {evidence} would show."
    elif covers_draws:
        reason = f"measured in full with {evidence}, '{best}' is better than '{second}'."
    else:
        reason = (
            f"'{best}' is better than '{second}' with this one calibration draw, and the interval "
            "covers samples only; whether it is with another draw takes more of them to know."
        )
    return Verdict(
        [(order, means[order]) for order in ranked],
        metric.name,
        difference,
        difference.decisive and covers_draws,
        reason,
    )
