import pytest
import torch

from optimum_order.backends.magnitude import Magnitude
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage
from optimum_order.testing import BackendContract


class TestContract(BackendContract):
    backend = Magnitude
    stages = ("magnitude:0.5", "magnitude(sparsity=0.5, per=row)", "magnitude(pattern=2:4)")


def apply(weight, value=None, **options):
    return Magnitude(Stage("magnitude", value, **options)).apply(LayerState(weight))


def test_removes_the_smallest_of_the_layer(gaussian):
    weight = gaussian() * torch.arange(1, 17)[:, None]  # rows of very different size
    state = apply(weight, 0.5)
    threshold = weight.abs().flatten().sort().values[256]
    assert torch.equal(state.weight, weight * (weight.abs() >= threshold))
    assert state.pruned.sum(1).unique().numel() > 1


def test_removes_the_smallest_of_each_row_if_told_so(gaussian):
    weight = gaussian() * torch.arange(1, 17)[:, None]
    state = apply(weight, sparsity=0.5, per="row")
    threshold = weight.abs().sort(1).values[:, 16:17]
    assert torch.equal(state.weight, weight * (weight.abs() >= threshold))


def test_survivors_are_untouched_and_no_data_is_needed(gaussian):
    weight = gaussian(dtype=torch.float16)
    state = apply(weight, pattern="2:4")
    assert torch.equal(state.weight[~state.pruned], weight[~state.pruned])
    assert state.grid is None
    assert not Magnitude.needs


def test_weights_compete_in_the_layer_or_in_a_row(gaussian):
    with pytest.raises(OrderError, match=r"'per' .* must be layer or row, got 'column'"):
        apply(gaussian(), sparsity=0.5, per="column")
