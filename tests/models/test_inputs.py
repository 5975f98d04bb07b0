"""Modules that round their inputs, whoever calls them."""

import copy
import threading

import pytest
import torch
from torch import nn

from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.inputs import quantize_inputs
from optimum_order.models.units import find_targets
from optimum_order.testing import gaussian

GRID = InputGrid("int8")


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(16, 8)


@pytest.fixture
def x():
    return gaussian(6, 16).view(2, 3, 16)


def test_a_call_of_the_module_rounds_and_nothing_else_does(linear, x):
    plain = linear(x)
    quantize_inputs(linear, GRID)
    expected = nn.functional.linear(GRID.nearest(x), linear.weight, linear.bias)
    assert torch.equal(linear(x), expected) and torch.equal(linear(input=x), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(nn.functional.linear(x, linear.weight, linear.bias), plain)


def test_another_grid_takes_the_place_of_the_first_and_none_takes_it_away(linear, x):
    plain = linear(x)
    for grid in (GRID, InputGrid("fp8"), InputGrid.fit(x.abs().max(), "int8", x.dtype)):
        quantize_inputs(linear, grid)
        expected = nn.functional.linear(grid.nearest(x), linear.weight, linear.bias)
        assert torch.equal(linear(x), expected)
    for _ in range(2):
        quantize_inputs(linear, None)
        assert torch.equal(linear(x), plain)
    assert "_optimum_order_inputs" not in vars(linear) and not linear._forward_pre_hooks


def test_a_copy_of_a_model_rounds_and_is_changed_by_itself(linear, x):
    quantize_inputs(linear, InputGrid.fit(x.abs().max(), "fp8", x.dtype))
    copied = copy.deepcopy(linear)
    assert torch.equal(copied(x), linear(x))
    quantize_inputs(copied, None)
    assert not torch.equal(copied(x), linear(x))


def test_layers_that_read_one_input_get_one_tensor(linear, x):
    """So that whoever looks at the memory of inputs knows that they are shared."""
    seen = []
    other = copy.deepcopy(linear)
    for module, grid in ((linear, GRID), (other, GRID)):
        quantize_inputs(module, grid)
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for mode in (torch.no_grad, torch.inference_mode):
        seen.clear()
        with mode():
            linear(x), other(x)
        assert seen[0] is seen[1]
    quantize_inputs(other, InputGrid("fp8"))
    other.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    linear(x), other(x)
    assert not torch.equal(seen[-2], seen[-1])


def test_an_input_that_was_changed_in_place_is_rounded_anew(linear, x):
    kept = []
    quantize_inputs(linear, GRID)
    linear.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        linear(x)
        x *= 2
        linear(x)
    assert torch.equal(kept[1], GRID.nearest(x))


def test_threads_do_not_share_what_they_remember(linear, x):
    quantize_inputs(linear, GRID)
    kept = []
    linear.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    for _ in range(2):
        thread = threading.Thread(target=linear, args=(x,))
        thread.start()
        thread.join()
    assert kept[0] is not kept[1] and torch.equal(kept[0], kept[1])


def test_gradients_pass_as_if_nothing_was_rounded(linear, x):
    x.requires_grad_()
    quantize_inputs(linear, GRID)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand_as(x))


def test_a_target_is_put_with_its_inputs(linear, x):
    (target,) = find_targets(nn.ModuleList([linear]))
    weight = torch.ones(8, 16)
    target.put(LayerState(weight, inputs=GRID))
    assert torch.equal(linear(x), nn.functional.linear(GRID.nearest(x), weight, linear.bias))
    target.put(LayerState(weight))
    assert torch.equal(linear(x), nn.functional.linear(x, weight, linear.bias))
