"""`proxy`: the output errors of all layers on inputs of the original model; none is run after."""

from __future__ import annotations

from optimum_order.search.sketch import Sketch
from optimum_order.search.strategies.base import Task, Verdict


def rank(task: Task) -> Verdict:
    """Rank orders by the mean relative output error of the layers.

    Raises:
        OrderError: If a stage looks at more than one layer.
    """
    count = task.few_calibration_samples()
    batches = task.runner.batches(0, count)
    with task.bar("layer") as bar:
        sketch = Sketch(task.runner, task.orders, [batches] if batches else [], bar.update)
        sketch.take(len(sketch.layers), task.orders)
    task.cost |= {
        "orders": len(task.orders),
        "calibration_samples": count if batches else 0,
        "layers": len(sketch.layers),
    }
    means = {order: sum(errors.values()) / len(errors) for order, errors in sketch.errors.items()}
    ranking = sorted(means.items(), key=lambda row: row[1])
    (_, least), (_, next_least) = ranking[:2]
    reason = (
        f"the layers' mean relative output error is {least:.3g} in this order, {next_least:.3g} in "
        "the next."
    )
    return Verdict([*ranking], "layer error", None, False, reason)
