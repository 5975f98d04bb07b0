"""`pih`: weaker first, stronger later, by M of each stage alone.

The rule is the Progressive Intensity Hypothesis of Kim et al. 2026, arXiv 2603.18426.
"""

from __future__ import annotations

import itertools

from optimum_order.order import Order
from optimum_order.search.strategies.base import Task, Verdict


def rank(task: Task) -> Verdict:
    """Rank orders by how many pairs of stages they run against the rule."""
    samples = task.scoring.samples
    alone = {}
    with task.bar("stage") as bar:
        for stage in dict.fromkeys(task.orders[0]):
            task.runner.run(Order((stage,)), 0)
            alone[stage] = task.measure(task.scoring.metric, samples).performance
            bar.update()
    task.cost |= {"orders": len(alone), "scored_samples": len(samples)}

    def inversions(order: Order) -> float:
        pairs = itertools.combinations(order, 2)
        return float(sum(alone[first] < alone[second] for first, second in pairs))

    ranking = sorted(((order, inversions(order)) for order in task.orders), key=lambda row: row[1])
    weakest = max(alone, key=alone.__getitem__)
    strongest = min(alone, key=alone.__getitem__)
    reason = (
        f"weaker first: of the stages alone '{weakest}' costs the least and '{strongest}' the most."
    )
    return Verdict([*ranking], "inversions", None, False, reason)
