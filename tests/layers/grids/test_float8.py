"""Float8 numbers times a scale of each row, against the library that unpacks them."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from optimum_order.layers.grids.float8 import Float8Grid
from optimum_order.layers.inputs import FLOAT8
from optimum_order.layers.state import integers
from optimum_order.testing import DTYPES, GridContract, gaussian, same_bits

ARGS = QuantizationArgs(num_bits=8, type="float", strategy="channel")


class TestContract(GridContract):
    def grids(self, weight):
        yield Float8Grid.fit(weight)


def test_codes_and_values_are_those_of_the_library():
    for dtype in DTYPES:
        weight = gaussian(16, 40).to(dtype) * 0.02
        grid = Float8Grid.fit(weight)
        assert torch.equal(grid.scale, (weight.abs().float().amax(1) / 448).to(dtype)[:, None])
        codes = grid.numbers(grid.quantize(weight))
        theirs = quantize(weight, grid.scale, None, ARGS, dtype=FLOAT8)
        near = (codes.float() - theirs.float()).abs() * grid.scale.float()
        steps = (codes.float().abs() / 8).clamp(min=2**-9) * grid.scale.float()
        assert (near <= steps).all(), "the library divides in the model's dtype: a step at most"
        assert (near == 0).float().mean() > 0.9
        assert same_bits(dequantize(codes, grid.scale, args=ARGS), grid.nearest(weight))


def test_the_largest_weight_of_a_row_is_on_the_grid():
    weight = gaussian(8, 32)
    largest = weight.abs().amax(1)
    nearest = Float8Grid.fit(weight).nearest(weight)
    assert torch.allclose(nearest.abs().amax(1), largest, rtol=1e-6)


def test_zero_is_plus_zero_and_a_row_of_zeros_stays_one():
    weight = gaussian(4, 8)
    weight[1] = 0.0
    weight[2, :4] = -1e-9
    for dtype in DTYPES:
        grid = Float8Grid.fit(weight.to(dtype))
        nearest = grid.nearest(weight.to(dtype))
        assert not integers(nearest[1]).any() and not integers(nearest[2, :4]).any()
        assert grid.scale[1] == 1.0 and (grid.scale > 0).all()


def test_any_columns_may_be_taken_and_none_may_not():
    grid = Float8Grid.fit(gaussian(4, 8))
    assert grid.take(columns=torch.tensor([7, 0, 3])).inputs == 3
    with pytest.raises(ValueError, match="needs a column"):
        grid.take(columns=torch.tensor([], dtype=torch.int64))
