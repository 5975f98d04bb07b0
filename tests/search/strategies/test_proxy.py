"""The output errors of all layers."""

import pytest

from optimum_order.search.sketch import Sketch
from optimum_order.search.strategies import proxy


def test_orders_are_ranked_by_the_mean_error_of_all_layers(make_task):
    task = make_task(["wanda:0.5", "rtn:3"])
    verdict = proxy.rank(task)
    sketch = Sketch(task.runner, task.orders, [task.runner.batches(0, 4)])
    sketch.take(14, task.orders)
    means = {order: sketch.logarithms(order).exp().mean().item() for order in task.orders}
    ranked = sorted(means.items(), key=lambda row: row[1])
    assert [order for order, _ in verdict.ranking] == [order for order, _ in ranked]
    assert [score for _, score in verdict.ranking] == pytest.approx([mean for _, mean in ranked])
    assert task.cost == {
        "orders": 2,
        "calibration_samples": 4,
        "scored_samples": 0,
        "layers": 14,
    }
