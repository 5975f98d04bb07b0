import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.testing import DTYPES, GridContract, gaussian, same_bits

ROWS, INPUTS = 6, 32
CASES = list(itertools.product(DTYPES, range(2, 9)))


def exponents(inputs, lowest=-3, highest=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(lowest, highest + 1, (inputs,), generator=generator, dtype=torch.int8)


def spanning(weight, bits, exponent):
    """The grid that spans each row."""
    rows = UniformGrid.fit(weight.float() * 2.0 ** -exponent.float(), bits=bits)
    least, most = DualScaleGrid.scale_range(weight.dtype, bits, exponent)
    grid = DualScaleGrid(bits, rows.scale.clamp(least, most).to(weight.dtype), exponent)
    grid.check()
    return grid


def codes_of(bits, shape):
    low = -(2 ** (bits - 1))
    generator = torch.Generator().manual_seed(3)
    return torch.randint(low, -low, shape, generator=generator, dtype=torch.int16)


class TestContract(GridContract):
    def grids(self, weight):
        # the layer of another shape repeats the columns
        exponent = exponents(self.inputs).repeat(weight.shape[1] // self.inputs)
        for bits in (2, 4, 8):
            yield spanning(weight, bits, exponent)
            yield spanning(weight, bits, torch.zeros_like(exponent))


def test_a_value_is_code_times_scale_rounded_then_times_a_power_of_two():
    for dtype, bits in CASES:
        scale = (gaussian(ROWS, 1).abs() * 0.1 + 0.01).to(dtype)
        exponent = exponents(INPUTS)
        grid = DualScaleGrid(bits, scale, exponent)
        codes = codes_of(bits, (ROWS, INPUTS))
        product = (codes.double() * scale.double()).to(dtype).double()
        value = product * 2.0 ** exponent.double()
        assert torch.equal(grid.dequantize(codes).double(), value), (dtype, bits)
        assert torch.equal(grid.quantize(grid.dequantize(codes)), codes), (dtype, bits)


def test_without_its_powers_of_two_a_weight_lies_on_the_folded_grid():
    for dtype, bits in CASES:
        exponent = exponents(INPUTS)
        grid = spanning(gaussian(ROWS, INPUTS).to(dtype), bits, exponent)
        codes = codes_of(bits, (ROWS, INPUTS))
        folded = grid.folded()
        assert type(folded) is UniformGrid and folded.group_size == -1 and folded.symmetric
        weight = grid.dequantize(codes).double() * 2.0 ** -exponent.double()
        assert same_bits(weight.to(dtype), folded.dequantize(codes)), (dtype, bits)
        assert torch.equal(weight.to(dtype).double(), weight), (dtype, bits)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.integers(2, 8),
    st.lists(st.integers(-126, 126), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
def test_at_the_ends_of_the_range_of_scales_every_code_comes_back(dtype, bits, powers, seed):
    exponent = torch.tensor(powers, dtype=torch.int8)
    try:
        least, most = DualScaleGrid.scale_range(dtype, bits, exponent)
    except ValueError as error:
        assert "No scale" in str(error)
        return
    generator = torch.Generator().manual_seed(seed)
    between = torch.exp(torch.rand(8, generator=generator, dtype=torch.float64) * 3) * least
    ends = torch.tensor([least, most], dtype=torch.float64)
    scale = torch.cat([ends, between.clamp(least, most)]).to(dtype).clamp(least, most)[:, None]
    grid = DualScaleGrid(bits, scale, exponent)
    grid.check()
    low = -(2 ** (bits - 1))
    codes = torch.arange(low, -low, dtype=torch.int16).repeat_interleave(len(scale))
    codes = codes.view(-1, len(scale), 1).expand(-1, -1, len(powers))
    columns = torch.arange(len(powers))
    rounder = grid.rounder(columns)
    rounded = torch.empty(len(scale))
    for level in codes:
        values = grid.dequantize(level)
        assert torch.isfinite(values).all()
        assert torch.equal(grid.quantize(values), level)
        assert same_bits(grid.nearest(values), values)
        beside = values.float() * 1.2
        expected = grid.nearest(beside).float()
        for i in range(len(powers)):
            rounder(i, beside[:, i], rounded)
            assert torch.equal(rounded, expected[:, i])


def test_scales_with_which_values_lose_digits_are_refused():
    exponent = torch.tensor([-3, 2], dtype=torch.int8)
    for dtype in DTYPES:
        least, most = DualScaleGrid.scale_range(dtype, 4, exponent)
        info = torch.finfo(dtype)
        assert least == info.tiny * 8 and most == info.max / 32
        for wrong in (least / 2, most * 2, 0.0, -1.0, float("nan"), float("inf")):
            scale = torch.tensor([[1.0], [wrong]], dtype=torch.float64).to(dtype)
            with pytest.raises(ValueError, match="scales of 4 bits .* must lie in"):
                DualScaleGrid(4, scale, exponent).check()


def test_fields_that_do_not_fit_together_are_refused():
    scale = torch.ones(2, 1)
    exponent = torch.zeros(3, dtype=torch.int8)
    for fields, reason in [
        ((1, scale, exponent), "2 to 8 bits, got 1"),
        ((9, scale, exponent), "2 to 8 bits, got 9"),
        ((4, scale[:, 0], exponent), r"\(out, 1\), got \(2,\)"),
        ((4, scale.expand(2, 2), exponent), r"\(out, 1\), got \(2, 2\)"),
        ((4, scale[:0], exponent), r"\(out, 1\), got \(0, 1\)"),
        ((4, scale, exponent.short()), "int8, got"),
        ((4, scale, exponent[None]), r"\(in,\) int8, got \(1, 3\)"),
        ((4, scale, exponent[:0]), r"\(in,\) int8, got \(0,\)"),
        ((4, scale, exponent - 127), "-126 to 126, got -127"),
        ((4, scale, exponent + 127), r"-126 to 126, got 127"),
        ((4, scale.half(), exponent - 30), "No scale of torch.float16 fits"),
    ]:
        with pytest.raises(ValueError, match=reason):
            DualScaleGrid(*fields).check()


def test_grids_are_stacked_only_if_they_agree():
    grid = DualScaleGrid(4, torch.ones(2, 1), exponents(INPUTS))
    others = {
        "the same bits": DualScaleGrid(5, grid.scale, grid.exponent),
        "the same dtype": DualScaleGrid(4, grid.scale.half(), grid.exponent),
        "the same unit": grid.take(columns=slice(0, 8)),
        "the same exponents": DualScaleGrid(4, grid.scale, grid.exponent.flip(0)),
        "cannot be stacked": grid.folded(),
    }
    for reason, other in others.items():
        with pytest.raises(ValueError, match=reason):
            DualScaleGrid.concat([grid, other])


def test_columns_bring_their_exponents_along():
    grid = DualScaleGrid(4, torch.ones(2, 1), exponents(INPUTS))
    columns = torch.tensor([30, 2, 7])
    part = grid.take(slice(1, 2), columns)
    assert torch.equal(part.exponent, grid.exponent[columns])
    assert (part.unit, part.group_size, part.scale.shape) == (3, None, (1, 1))
