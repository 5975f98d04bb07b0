import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.testing import DTYPES, GridContract, gaussian

CASES = list(itertools.product(DTYPES, range(2, 9), [True, False]))
ROWS, INPUTS = 4, 32

WEIGHTS = {
    "gaussian": lambda w, info: w,
    "positive": lambda w, info: w.abs(),
    "negative": lambda w, info: -w.abs() - 0.5,
    "shifted": lambda w, info: w + 3,
    "small": lambda w, info: w * 1e-3,
    "subnormal": lambda w, info: w * info.tiny * 0.3,
    "1e-30": lambda w, info: w * 1e-30,
    "huge": lambda w, info: w / w.abs().max() * info.max * 0.4,
    "largest": lambda w, info: w / w.abs().max() * info.max,
    "largest positive": lambda w, info: w.abs() / w.abs().max() * info.max,
    "outlier": lambda w, info: w.index_fill(1, torch.tensor([3]), 1e4),
    "zeros": lambda w, info: w * (torch.arange(INPUTS) >= 8) * (torch.arange(ROWS) > 1)[:, None],
    "constant": lambda w, info: torch.full_like(w, 0.3),
}


def stacked(dtype, *names):
    """Rows of each of these kinds, or of all."""
    info = torch.finfo(dtype)
    w = gaussian(ROWS, INPUTS)
    return torch.cat([WEIGHTS[name](w, info).to(dtype) for name in names or WEIGHTS])


def levels(grid, shape):
    """(codes, out, in) float64: every value that each weight may take."""
    low = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    codes = torch.arange(low, low + 2**grid.bits, dtype=torch.int16)
    return grid.dequantize(codes[:, None, None].expand(-1, *shape)).double()


class TestContract(GridContract):
    def grids(self, weight):
        for bits, symmetric in itertools.product((2, 4, 8), (True, False)):
            for group_size in (16, -1):
                yield UniformGrid.fit(
                    weight, bits=bits, group_size=group_size, symmetric=symmetric, clip="mse"
                )


def test_a_grid_keeps_its_promises_at_every_magnitude():
    for (dtype, bits, symmetric), clip in itertools.product(CASES, ["none", "mse"]):
        case = f"{dtype}, {bits} bits, symmetric={symmetric}, clip={clip}"
        weight = stacked(dtype)
        grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric, clip=clip)
        assert grid.dtype == grid.scale.dtype == dtype, case
        assert torch.isfinite(grid.scale).all(), case
        assert (grid.scale > 0).all(), case
        nearest = grid.nearest(weight)
        assert nearest.dtype == dtype, case
        assert torch.equal(nearest, grid.nearest(nearest)), case
        assert grid.holds(nearest), case

        zeros = grid.nearest(torch.zeros_like(weight))
        assert not zeros.any(), case
        assert not torch.signbit(zeros).any(), case

        values = levels(grid, weight.shape)
        assert torch.isfinite(values).all(), case
        least = (values - weight.double()).abs().amin(0)
        error = (nearest.double() - weight.double()).abs()
        # Codes are chosen by exact multiples of the scale; the dtype stores them to one place.
        scale = grid.scale.double()[:, grid._group]
        rounding = torch.finfo(dtype).eps * nearest.double().abs() + 1e-6 * scale
        assert (error <= least + rounding).all(), case


@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip=st.sampled_from(["none", "mse"]),
    values=st.lists(
        st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=8, max_size=8
    ),
    exponent=st.integers(-40, 30),
)
@settings(max_examples=150, deadline=None)
def test_any_finite_group_is_rounded_to_finite_values_once(
    dtype, bits, symmetric, clip, values, exponent
):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([values], dtype=torch.float64) * 2.0**exponent
    weight = weight.clamp(-largest, largest).to(dtype)
    grid = UniformGrid.fit(weight, bits=bits, symmetric=symmetric, clip=clip)
    nearest = grid.nearest(weight)
    assert torch.isfinite(nearest).all()
    assert grid.holds(nearest)
    assert torch.equal(nearest[weight == 0], torch.zeros_like(nearest[weight == 0]))
    assert not torch.signbit(grid.nearest(torch.zeros_like(weight))).any()


def test_a_value_that_two_codes_round_to_stays_where_it_is():
    """Unsigned 8-bit codes have more digits than bfloat16: several are stored as one number."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(4000, 1, generator=generator).exp()
    weight = (torch.rand(4000, 128, generator=generator) * spread).bfloat16()
    grid = UniformGrid.fit(weight, bits=8, symmetric=False)
    nearest = grid.nearest(weight)
    assert nearest.unique().numel() < grid.quantize(weight).numel()
    assert grid.holds(nearest)


def test_small_float16_weights_are_not_lost():
    """Their scale is below the smallest normal float16, and a number like any other."""
    weight = gaussian(ROWS, INPUTS) * 1e-3
    for bits in range(4, 9):
        grid = UniformGrid.fit(weight.half(), bits=bits)
        reference = UniformGrid.fit(weight, bits=bits)
        error = (grid.nearest(weight.half()).float() - weight).square().sum()
        assert error <= 1.3 * (reference.nearest(weight) - weight).square().sum()


def test_every_level_keeps_its_value():
    """A format packs codes: unpacking them gives the weight back."""
    for dtype, bits, symmetric in CASES:
        case = f"{dtype}, {bits} bits, symmetric={symmetric}"
        weight = gaussian(ROWS, INPUTS).to(dtype)
        grid = UniformGrid.fit(weight, bits=bits, group_size=16, symmetric=symmetric)
        for level in levels(grid, weight.shape)[:: 2 ** max(0, bits - 4)]:
            assert torch.equal(grid.nearest(level.to(dtype)).double(), level), case
        codes = grid.quantize(weight)
        low = -(2 ** (bits - 1)) if symmetric else 0
        assert codes.min() >= low, case
        assert codes.max() <= low + 2**bits - 1, case
        assert torch.equal(grid.dequantize(codes), grid.nearest(weight)), case


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_spans_the_group(symmetric):
    """No weight moves by more than half a step, or one at the far end of an asymmetric grid."""
    weight = stacked(torch.float32, "gaussian", "positive", "negative", "shifted", "zeros")
    grid = UniformGrid.fit(weight, bits=4, group_size=8, symmetric=symmetric)
    steps = (grid.nearest(weight) - weight).abs() / grid.scale[:, grid._group]
    assert steps.max() <= (0.5 + 1e-5 if symmetric else 1 + 1e-5)
    assert steps.mean() < 0.3


def test_searching_for_the_range_never_rounds_worse():
    for dtype, bits, symmetric in CASES:
        case = f"{dtype}, {bits} bits, symmetric={symmetric}"
        weight = stacked(dtype, "gaussian", "outlier", "shifted", "zeros", "small")
        errors = {}
        for clip in ("mse", "none"):
            grid = UniformGrid.fit(weight, bits=bits, group_size=16, symmetric=symmetric, clip=clip)
            squares = (grid.nearest(weight).double() - weight.double()).square()
            errors[clip] = squares.view(len(weight), -1, 16).sum(-1)
        assert (errors["mse"] <= errors["none"] * (1 + 1e-5)).all(), case
        if bits == 2:
            assert errors["mse"][:ROWS].sum() < 0.9 * errors["none"][:ROWS].sum(), case


def test_groups_are_fitted_alike_however_many_there_are():
    """Large layers are fitted in parts."""
    weight = gaussian(2100, 128)
    grid = UniformGrid.fit(weight, bits=4, group_size=64, symmetric=False, clip="mse")
    for rows in (slice(0, 3), slice(1020, 1030), slice(2097, None)):
        part = UniformGrid.fit(weight[rows], bits=4, group_size=64, symmetric=False, clip="mse")
        assert torch.equal(part.scale, grid.scale[rows])
        assert torch.equal(part.zero_point, grid.zero_point[rows])


def test_a_group_shares_a_scale_with_nobody_else():
    weight = gaussian(ROWS, INPUTS)
    plain = UniformGrid.fit(weight, bits=4, group_size=8)
    scaled = weight.clone()
    scaled[2, 8:16] *= 100
    grid = UniformGrid.fit(scaled, bits=4, group_size=8)
    changed = torch.zeros(ROWS, INPUTS // 8, dtype=torch.bool)
    changed[2, 1] = True
    assert torch.equal(plain.scale != grid.scale, changed)
    assert (grid.unit, grid.group_size) == (8, 8)
    whole = UniformGrid.fit(weight, bits=4)
    assert (whole.unit, whole.group_size, whole.scale.shape) == (INPUTS, -1, (ROWS, 1))


def test_codes_do_not_depend_on_the_columns_asked_for_or_the_layout_in_memory():
    for dtype, bits, symmetric in CASES:
        case = f"{dtype}, {bits} bits, symmetric={symmetric}"
        weight = gaussian(ROWS, INPUTS).to(dtype)
        grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric)
        codes = grid.quantize(weight * 1.1)
        columns = torch.arange(INPUTS)
        assert torch.equal(grid.quantize(weight * 1.1, columns), codes), case
        assert torch.equal(grid.quantize((weight * 1.1).T.contiguous().T), codes), case
        assert torch.equal(grid.dequantize(codes, columns), grid.dequantize(codes)), case
        assert torch.equal(grid.dequantize(codes), grid.nearest(weight * 1.1)), case


def test_a_sweep_rounds_as_the_whole_matrix_does():
    columns = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    for dtype, bits, symmetric in CASES:
        info = torch.finfo(dtype)
        weight = stacked(dtype)
        grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric)
        shifted = (weight.float() * 1.1).clamp(info.min, info.max)  # off the grid and beyond
        whole = grid.nearest(shifted).float()
        rounder = grid.rounder(columns)
        rounded = torch.empty(len(whole))
        for i, column in enumerate(columns.tolist()):
            rounder(i, shifted[:, column], rounded)
            assert torch.equal(rounded, whole[:, column]), f"{dtype}, {bits}, {symmetric}"


def test_holds_is_exact():
    weight = gaussian(ROWS, INPUTS)
    grid = UniformGrid.fit(weight, bits=4)
    nearest = grid.nearest(weight)
    assert grid.holds(nearest)
    nearest[3, 4] = torch.nextafter(nearest[3, 4], torch.tensor(math.inf))
    assert not grid.holds(nearest)


class TestParts:
    def grid(self, **options):
        return UniformGrid.fit(gaussian(ROWS, INPUTS), **({"bits": 4, "group_size": 8} | options))

    def test_the_group_that_a_selection_breaks_is_named(self):
        grid = self.grid()
        order = torch.arange(INPUTS)
        order[[16, 24]] = order[[24, 16]]
        for columns, group in [(slice(0, 12), 1), (slice(4, 12), 0), (order, 3)]:
            with pytest.raises(ValueError, match=f"breaks group {group}: the 8 weights of a group"):
                grid.take(columns=columns)

    def test_columns_may_be_reordered_within_a_group_and_groups_among_each_other(self):
        weight = gaussian(ROWS, INPUTS)
        grid = self.grid(symmetric=False)
        columns = torch.arange(INPUTS).view(-1, 8)[[2, 0]].flip(1).flatten()
        part = grid.take(columns=columns)
        assert torch.equal(part.nearest(weight[:, columns]), grid.nearest(weight)[:, columns])

    def test_a_scale_of_a_whole_row_fits_any_columns(self):
        grid = self.grid(group_size=-1)
        part = grid.take(slice(1, 3), torch.tensor([30, 2, 7]))
        assert (part.group_size, part.inputs) == (-1, 3)
        assert torch.equal(part.scale, grid.scale[1:3])

    def test_grids_are_stacked_only_if_they_agree(self):
        grid = self.grid()
        others = {
            "bits": self.grid(bits=3),
            "unit": self.grid(group_size=16),
            "symmetric": self.grid(symmetric=False),
            "dtype": dataclasses.replace(grid, scale=grid.scale.half()),
            "inputs": grid.take(columns=slice(0, 8)),
        }
        for name, other in others.items():
            with pytest.raises(ValueError, match=f"same {name}, got"):
                UniformGrid.concat([grid, other])

    def test_groups_must_divide_the_inputs_of_another_shape(self):
        with pytest.raises(ValueError, match="Groups of 8 do not divide 20 inputs"):
            self.grid().like(4, 20)
        assert self.grid(group_size=-1).like(4, 20).scale.shape == (4, 1)


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([1e-7, 1e-5, 1e-3, 1.0, 1e3, 1e5]),
)
def test_short_scales_are_float16_numbers_close_to_the_others(seed, dtype, bits, symmetric, size):
    weight = (gaussian(4, 64, seed=seed).float() * size).clamp(-6e4, 6e4).to(dtype)
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric, "clip": "none"}
    usual = UniformGrid.fit(weight, **options)
    short = UniformGrid.fit(weight, **options, short_scales=True)
    scale = short.scale.float()
    assert torch.equal(scale.half().float(), scale)
    if not symmetric:
        product = scale * short.zero_point
        assert torch.equal(product.half().float(), product)
    assert torch.equal(
        short.dequantize(short.quantize(short.nearest(weight))), short.nearest(weight)
    )
    normal = (usual.scale > 2.0**-14) & (usual.scale < 100)
    digits = 11 if symmetric else 11 - bits
    difference = (scale / usual.scale.float() - 1).abs()[normal]
    assert (difference <= 2.0**-digits + 2.0**-7 * (dtype == torch.bfloat16)).all()
