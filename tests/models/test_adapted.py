"""Modules that add what an adapter makes of their inputs, whoever calls them."""

import copy

import pytest
import torch
from torch import nn

from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.state import LayerState
from optimum_order.models.adapted import adapt, is_adapted
from optimum_order.models.units import find_targets
from optimum_order.testing import gaussian

ADAPTER = LowRank.rounded(gaussian(2, 16), gaussian(8, 2), torch.float16)
OTHER = LowRank.rounded(gaussian(3, 16, 1), gaussian(8, 3, 1), torch.bfloat16)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(16, 8)


@pytest.fixture
def x():
    return gaussian(6, 16).view(2, 3, 16)


def test_a_call_of_the_module_adds_and_the_weight_stays(linear, x):
    weight, plain = linear.weight.clone(), linear(x)
    for adapter in (ADAPTER, OTHER, ADAPTER):
        adapt(linear, adapter)
        expected = adapter.added(x, plain)
        assert torch.equal(linear(x), expected) and torch.equal(linear(input=x), expected)
        assert not torch.equal(expected, plain)
    assert torch.equal(linear.weight, weight)
    for _ in range(2):
        adapt(linear, None)
        assert torch.equal(linear(x), plain) and not is_adapted(linear)
    assert not linear._forward_hooks


def test_a_copy_of_a_model_adds_and_is_changed_by_itself(linear, x):
    plain = linear(x)
    adapt(linear, ADAPTER)
    copied = copy.deepcopy(linear)
    assert torch.equal(copied(x), linear(x)) and is_adapted(copied)
    adapt(copied, None)
    assert torch.equal(copied(x), plain)
    assert torch.equal(linear(x), ADAPTER.added(x, plain))


def test_a_layer_is_put_with_its_adapter(linear, x):
    (target,) = find_targets(linear)
    plain = linear(x)
    target.put(LayerState(target.read(), adapter=ADAPTER))
    assert torch.equal(linear(x), ADAPTER.added(x, plain))
    target.put(LayerState(target.read()))
    assert torch.equal(linear(x), plain)
    target.put(LayerState(target.read(), adapter=ADAPTER))
    target.plain()
    assert torch.equal(linear(x), plain)
