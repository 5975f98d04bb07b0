import dataclasses
import math

import pytest
import torch

from optimum_order.errors import InvariantError
from optimum_order.layers.grids.bitsandbytes import fit_blocks
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState, integers, is_finite, tensor_bytes
from optimum_order.layers.tree import tensors_in
from optimum_order.testing import gaussian

ROWS, INPUTS = 4, 32


def make_state(**changes):
    """A layer that is pruned and quantized."""
    weight = gaussian(ROWS, INPUTS).bfloat16()
    pruned = weight.abs() < 0.5
    grid = UniformGrid.fit(weight, bits=4)
    weight = grid.nearest(weight).masked_fill(pruned, 0.0)
    return dataclasses.replace(LayerState(weight, pruned, grid), **changes)


def test_a_state_that_keeps_its_promises_passes():
    make_state().check("here")
    LayerState(gaussian(ROWS, INPUTS).half()).check("here")


def test_sparsity_is_what_was_removed_and_not_what_is_zero():
    state = make_state()
    assert state.sparsity == pytest.approx(state.pruned.float().mean().item())
    assert (state.weight == 0).float().mean() >= state.sparsity
    assert LayerState(torch.zeros(4, 4)).sparsity == 0


def test_bits_and_group_size_are_those_of_the_grid():
    state = make_state()
    assert (state.bits, state.group_size) == (4, -1)
    grouped = make_state(grid=UniformGrid.fit(state.weight, bits=3, group_size=8))
    assert (grouped.bits, grouped.group_size) == (3, 8)
    blocks = make_state(grid=fit_blocks(state.weight, "nf4", 32, False)[0])
    assert (blocks.bits, blocks.group_size) == (4, None)


def test_without_a_grid_bits_are_those_of_the_dtype():
    assert (make_state(grid=None).bits, make_state(grid=None).group_size) == (16, None)
    assert LayerState(torch.zeros(1, 1)).bits == 32


def test_all_tensors_are_moved():
    state = make_state(grid=fit_blocks(gaussian(ROWS, INPUTS).bfloat16(), "nf4", 32, True)[0])
    moved = state.to(torch.device("meta"))
    assert len(tensors_in(moved)) == len(tensors_in(state)) == 6
    assert all(tensor.is_meta for tensor in tensors_in(moved))
    assert moved.notes == state.notes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(value):
    weight = gaussian(ROWS, INPUTS)
    weight[1, 2] = value
    with pytest.raises(InvariantError, match="layer 3: a weight is NaN or infinite"):
        LayerState(weight).check("layer 3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_that_is_no_number_is_seen_anywhere(dtype):
    weight = gaussian(7, 11).to(dtype)
    assert is_finite(weight)
    assert is_finite(weight[:0])
    for value in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (3, 5), (6, 10)):
            broken = weight.clone()
            broken[place] = value
            assert not is_finite(broken)
            assert not is_finite(broken.T)


@pytest.mark.parametrize("value", [1e-3, -0.0])
def test_a_removed_weight_must_be_positive_zero(value):
    state = make_state(grid=None)
    weight = state.weight.clone()
    row, column = state.pruned.nonzero()[0].tolist()
    weight[row, column] = value
    message = r"^here: 1 pruned weights are no longer \+0\.0\. This is a bug"
    with pytest.raises(InvariantError, match=message):
        dataclasses.replace(state, weight=weight).check("here")


@pytest.mark.parametrize(
    "pruned", [torch.zeros(ROWS, INPUTS), torch.zeros(INPUTS, dtype=torch.bool)]
)
def test_a_mask_must_fit(pruned):
    with pytest.raises(InvariantError, match="not a boolean tensor of the weight's shape"):
        make_state(pruned=pruned).check("here")


def test_a_weight_off_its_grid_is_refused():
    state = make_state()
    weight = state.weight.clone()
    row, column = (~state.pruned).nonzero()[0].tolist()
    weight[row, column] *= 1.01
    with pytest.raises(InvariantError, match="here: a weight is off its quantization grid"):
        dataclasses.replace(state, weight=weight).check("here")


def test_the_grid_is_in_the_dtype_of_the_weight():
    state = make_state()
    message = r"the grid is in torch\.bfloat16, the weight in torch\.float32"
    with pytest.raises(InvariantError, match=message):
        dataclasses.replace(state, weight=state.weight.float()).check("here")


def test_integers_tell_the_zeros_apart():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        plus, minus = integers(torch.tensor([0.0, -0.0], dtype=dtype)).tolist()
        assert plus == 0 and minus != 0


def test_bytes_are_the_values_row_by_row():
    weight = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    assert bytes(tensor_bytes(weight)) == b"\x01\x02\x03\x04"
    assert bytes(tensor_bytes(weight.T)) == b"\x01\x03\x02\x04"
