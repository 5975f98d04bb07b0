"""What many orders take: shared beginnings once, draws only where they matter."""

import dataclasses
from types import SimpleNamespace

import pytest

from optimum_order.engine.recipe import canonical
from optimum_order.estimate.forecast import forecast
from optimum_order.order import Order


def takes(seconds, memory=10):
    step = SimpleNamespace(seconds=seconds)
    rates = SimpleNamespace(forward=1000.0)
    return SimpleNamespace(steps=[step], loading=1.0, memory=memory, rates=rates)


def test_shared_beginnings_count_once_and_fixed_orders_have_one_draw():
    texts = ["rtn:4", "wanda:0.5", "wanda:0.5 > rtn:4", "rtn:4 > wanda:0.5"]
    orders = [canonical(Order.of(text)) for text in texts]
    runs = dict.fromkeys(orders, 2) | {orders[0]: 1}
    estimates = {"rtn": takes(1.0, memory=30), "wanda": takes(100.0)}
    result = forecast(runs, estimates, 50.0, 20)
    # rtn alone once; for each draw wanda, rtn after wanda, and wanda after rtn
    assert result.compressing == 1.0 + 1.0 + 2 * (100.0 + 1.0 + 100.0)
    assert result.measuring == (7 + 1) * 2 * 20 * 50.0 / 1000
    assert (result.trials, result.memory) == (7, 30)
    assert result.seconds == pytest.approx(404 + 16)
    assert str(result) == "7 trials, about 7 minutes, 30 bytes of memory"
    assert result.as_dict()["summary"] == str(result)
    unknown = dataclasses.replace(result, measuring=None)
    assert "and measuring on top" in str(unknown) and unknown.seconds == 404
