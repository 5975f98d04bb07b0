import pytest
import torch

from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage


def test_removes_the_smallest_of_the_layer(gaussian):
    weight = gaussian() * torch.arange(1, 17)[:, None]  # rows of very different size
    state = method(Stage("magnitude", 0.5)).apply(LayerState(weight))
    threshold = weight.abs().flatten().sort().values[256]
    assert torch.equal(state.weight, weight * (weight.abs() >= threshold))
    assert state.pruned.sum(1).unique().numel() > 1


def test_removes_the_smallest_of_each_row_if_told_so(gaussian):
    weight = gaussian() * torch.arange(1, 17)[:, None]
    state = method(Stage("magnitude", sparsity=0.5, per="row")).apply(LayerState(weight))
    threshold = weight.abs().sort(1).values[:, 16:17]
    assert torch.equal(state.weight, weight * (weight.abs() >= threshold))


def test_survivors_are_untouched_and_no_data_is_needed(gaussian):
    weight = gaussian(dtype=torch.float16)
    state = method(Stage("magnitude", pattern="2:4")).apply(LayerState(weight), None)
    assert torch.equal(state.weight[~state.pruned], weight[~state.pruned])
    assert state.grid is None


def test_weights_compete_in_the_layer_or_in_a_row():
    with pytest.raises(OrderError, match=r"'per' .* must be layer or row, got 'column'"):
        method(Stage("magnitude", sparsity=0.5, per="column"))
