"""What is learnt on a small layer holds for a large one."""

import logging

import pytest
import torch
from torch import nn

from optimum_order.engine.recipe import canonical
from optimum_order.estimate.laboratory import Laboratory
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.trace import Counter
from optimum_order.models.units import Target
from optimum_order.order import Order

SPEED = Rates(forward=1e12, gram=5e11, products=1e11, factors=1e10, traffic=1e10, hashing=1e9)
CPU = torch.device("cpu")


def laboratory(rows, dtype=torch.float32):
    return Laboratory([Target("layer", "linear", nn.Linear(8, rows, dtype=dtype))], CPU, SPEED)


def stages(order):
    return tuple(canonical(Order.parse(order)))


@pytest.mark.parametrize(
    "order", ["gptq:4", "sparsegpt:0.5", "sparsegpt:0.5 > gptq:4", "wanda:0.5", "rtn:4"]
)
def test_work_on_a_layer_of_another_shape(order):
    history = stages(order)
    result = laboratory(128).trial(history, 1024)  # tried on 128 x 256
    large = laboratory(384)
    before, seen = large._state(history[:-1], 384, 1024), large._statistics(history[-1], 1024)
    with Counter() as first:
        large._compress(history[-1], before, seen)
    with Counter() as second:
        large._compress(history[-1], before, seen)
    assert result.state.weight.shape == (128, 256)
    assert result.products * 384 * 1024**2 == pytest.approx(second.products, rel=0.15)
    assert result.holds(384, 1024) == pytest.approx(first.peak, rel=0.25)
    assert result.factors == second.factors == 0
    assert (
        (result.shared > 0)
        == (first.factors > 0)
        == ("gptq" in str(history[-1]) or "sparse" in str(history[-1]))
    )


def test_seconds_are_operations_over_rates_and_the_rest_in_proportion():
    result = laboratory(64).trial(stages("gptq:4"), 256)
    assert result.shared == pytest.approx(2 / 3)  # a Cholesky factor and its inverse
    plain = result.seconds * 64 * 256
    assert plain > 0 and result.factors == 0
    products = 64 * 256**2 * (result.products / SPEED.products + result.checks / SPEED.gram)
    assert result.takes(64, 256, SPEED) == pytest.approx(plain + products)
    assert result.takes(128, 512, SPEED) == pytest.approx(4 * plain + 8 * products)


@pytest.mark.parametrize(
    ("order", "inputs", "tried"),
    [
        ("rtn:4", 4096, 256),
        ("rtn:4", 14336, 256),
        ("rtn:4", 192, 192),
        ("rtn(bits=4, group_size=512)", 4096, 1024),
        ("rtn(bits=4, group_size=-1)", 1024, 256),
        ("rtn:4", 800, 800),  # 32 divides it and 64 does not; so it is with no smaller divisor
        ("magnitude(pattern=2:4)", 4096, 256),
        ("rtn:4", 257, 257),
    ],
)
def test_a_narrow_layer_is_treated_like_the_wide_one(order, inputs, tried):
    history = stages(order)
    state = laboratory(32).state(history, inputs)
    assert state.weight.shape == (32, tried)
    whole = laboratory(32)._state(history, 32, inputs)
    if state.grid is not None:
        assert state.grid.unit == (tried if whole.grid.unit == inputs else whole.grid.unit)


def test_layers_are_of_the_models_dtype_and_usual_height():
    targets = [
        Target(str(rows), "linear", nn.Linear(8, rows, dtype=torch.bfloat16))
        for rows in (8, 16, 10**4)
    ]
    result = Laboratory(targets, CPU, SPEED).state((), 512)
    assert (result.weight.shape, result.weight.dtype) == ((16, 256), torch.bfloat16)


def test_nothing_is_said_of_layers_that_are_made_up(caplog):
    (stage,) = stages("ecsq(rate=3.2, max_code=7)")
    result = laboratory(64).trial((stage,), 256)
    assert result.state.grid is not None
    assert not caplog.records
    assert logging.getLogger("optimum_order.backends").level == logging.NOTSET
