"""Blocks as somebody else has made them: negative and zero scales, leasts of any value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.layers.grids.block import BLOCK, ForeignBlockGrid
from optimum_order.layers.state import LayerState, integers
from optimum_order.testing import GridContract, gaussian


def fitted(weight, bits, *, affine):
    """The grid that llama.cpp's rule gives a weight: scales of either sign."""
    blocks = weight.float().view(len(weight), -1, BLOCK)
    if affine:
        low, high = blocks.aminmax(dim=-1)
        scale, least = (high - low) / (2**bits - 1), low.half()
    else:
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
        scale, least = largest / -(2 ** (bits - 1)), None
    return ForeignBlockGrid(bits, scale.half(), least, weight.dtype)


class TestContract(GridContract):
    def grids(self, weight):
        for bits in (4, 5, 8):
            yield fitted(weight, bits, affine=False)
        for bits in (4, 5):
            yield fitted(weight, bits, affine=True)


@given(
    bits=st.sampled_from([4, 5, 8]),
    affine=st.booleans(),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 200.0]),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_codes_come_back_from_float32_values(bits, affine, size, shift, seed):
    """So that what is not pruned is written with the code that it was read with."""
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.randn(4, 2, generator=generator) * size).half()
    least = ((torch.randn(4, 2, generator=generator) + shift) * size).half() if affine else None
    grid = ForeignBlockGrid(bits, scale, least, torch.float32)
    low = 0 if affine else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (4, 64), generator=generator).short()
    again = grid.quantize(grid.dequantize(codes))
    steps = (scale != 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(again[steps], codes[steps])
    assert not again[~steps].any(), "where the step is zero, all codes stand for one value"
    assert torch.equal(grid.dequantize(again), grid.dequantize(codes))


def test_zero_is_on_a_grid_only_where_a_code_stands_for_it():
    scale = torch.tensor([[0.5, -0.25]], dtype=torch.float16)

    def has_zero(*least):
        return ForeignBlockGrid(
            4, scale, torch.tensor([least], dtype=torch.float16), torch.float32
        ).has_zero

    assert has_zero(-1.0, 0.5) and has_zero(0.0, 3.75)
    assert not has_zero(-1.1, 0.5), "between two values"
    assert not has_zero(0.5, 0.5) and not has_zero(-8.0, 0.5), "out of the range of codes"
    assert ForeignBlockGrid(4, scale, None, torch.float32).has_zero
    grid = ForeignBlockGrid(4, scale, None, torch.float32)
    state = LayerState(grid.nearest(gaussian(1, 64)), grid=grid)
    assert not integers(state.weight)[state.weight == 0].any(), "no -0.0 under a negative scale"
    state.check("here")


def test_what_does_not_fit_is_refused():
    grid = ForeignBlockGrid(4, torch.ones(2, 2).half(), None, torch.float32)
    with pytest.raises(ValueError, match="do not divide 40"):
        grid.like(2, 40)
    with pytest.raises(ValueError, match="block"):
        grid.take(columns=slice(3, 40))
    other = ForeignBlockGrid(4, torch.ones(2, 2).half(), torch.ones(2, 2).half(), torch.float32)
    with pytest.raises(ValueError):
        ForeignBlockGrid.concat([grid, other])
    assert other.like(3, 96).least.shape == (3, 3) and other.like(3, 96).scale.is_meta
