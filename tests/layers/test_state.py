import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import InvariantError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = list(itertools.product(DTYPES, range(2, 9), [True, False]))
ROWS, INPUTS = 4, 32


def gaussian(dtype, rows=ROWS, inputs=INPUTS, seed=0):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = {
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


def levels(grid, shape):
    """(codes, out, in) float64: every value that each weight may take."""
    low = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    codes = torch.arange(low, low + 2**grid.bits, dtype=torch.int16)
    return grid.dequantize(codes[:, None, None].expand(-1, *shape)).double()


@pytest.mark.parametrize(("dtype", "bits", "symmetric"), CASES)
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_grid_keeps_its_promises_at_every_magnitude(dtype, bits, symmetric, clip):
    info = torch.finfo(dtype)
    weight = torch.cat(
        [shape(gaussian(torch.float32), info).to(dtype) for shape in SHAPES.values()]
    )
    grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric, clip=clip)
    assert grid.dtype == grid.scale.dtype == dtype
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale > 0).all()
    nearest = grid.nearest(weight)
    assert nearest.dtype == dtype
    assert torch.equal(nearest, grid.nearest(nearest))
    assert grid.holds(nearest)

    zeros = grid.nearest(torch.zeros_like(weight))
    assert not zeros.any()
    assert not torch.signbit(zeros).any()

    every = levels(grid, weight.shape)
    assert torch.isfinite(every).all()
    least = (every - weight.double()).abs().amin(0)
    error = (nearest.double() - weight.double()).abs()
    # The codes are chosen by exact multiples of the scale, which are stored to one place in the dtype.
    rounding = info.eps * nearest.double().abs() + 1e-6 * grid.scale.double()[:, grid._group]
    assert (error <= least + rounding).all()


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
    weight = (
        (torch.tensor([values], dtype=torch.float64) * 2.0**exponent)
        .clamp(-largest, largest)
        .to(dtype)
    )
    grid = UniformGrid.fit(weight, bits=bits, symmetric=symmetric, clip=clip)
    nearest = grid.nearest(weight)
    assert torch.isfinite(nearest).all()
    assert grid.holds(nearest)
    assert torch.equal(nearest[weight == 0], torch.zeros_like(nearest[weight == 0]))
    assert not torch.signbit(grid.nearest(torch.zeros_like(weight))).any()


def test_a_value_that_two_codes_round_to_stays_where_it_is():
    """Unsigned 8-bit codes have more digits than bfloat16: several of them are stored as the same number."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(4000, 1, generator=generator).exp()
    weight = (torch.rand(4000, 128, generator=generator) * spread).bfloat16()
    grid = UniformGrid.fit(weight, bits=8, symmetric=False)
    nearest = grid.nearest(weight)
    assert nearest.unique().numel() < grid.quantize(weight).numel()
    assert grid.holds(nearest)


def test_small_float16_weights_are_not_lost():
    """Their scale is below the smallest normal float16, yet it is a number like any other."""
    weight = gaussian(torch.float32) * 1e-3
    for bits in range(4, 9):
        grid = UniformGrid.fit(weight.half(), bits=bits)
        reference = UniformGrid.fit(weight, bits=bits)
        error = (grid.nearest(weight.half()).float() - weight).square().sum()
        assert error <= 1.3 * (reference.nearest(weight) - weight).square().sum()


@pytest.mark.parametrize(("dtype", "bits", "symmetric"), CASES)
def test_every_level_keeps_its_value(dtype, bits, symmetric):
    """What a format packs are the codes: unpacking them gives the weight back."""
    weight = gaussian(dtype)
    grid = UniformGrid.fit(weight, bits=bits, group_size=16, symmetric=symmetric)
    for level in levels(grid, weight.shape)[:: 2 ** max(0, bits - 4)]:
        assert torch.equal(grid.nearest(level.to(dtype)).double(), level)
    codes = grid.quantize(weight)
    low = -(2 ** (bits - 1)) if symmetric else 0
    assert codes.min() >= low
    assert codes.max() <= low + 2**bits - 1
    assert torch.equal(grid.dequantize(codes), grid.nearest(weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_spans_the_group(symmetric):
    """No weight is moved by more than half a step, or one step at the far end of a symmetric grid."""
    names = ["gaussian", "positive", "negative", "shifted", "zeros"]
    weight = torch.cat([SHAPES[name](gaussian(torch.float32), None) for name in names])
    grid = UniformGrid.fit(weight, bits=4, group_size=8, symmetric=symmetric)
    steps = (grid.nearest(weight) - weight).abs() / grid.scale[:, grid._group]
    assert steps.max() <= (0.5 + 1e-5 if symmetric else 1 + 1e-5)
    assert steps.mean() < 0.3


@pytest.mark.parametrize(("dtype", "bits", "symmetric"), CASES)
def test_searching_for_the_range_never_rounds_worse(dtype, bits, symmetric):
    names = ["gaussian", "outlier", "shifted", "zeros", "small"]
    weight = torch.cat(
        [SHAPES[n](gaussian(torch.float32), torch.finfo(dtype)).to(dtype) for n in names]
    )

    def error(clip):
        grid = UniformGrid.fit(weight, bits=bits, group_size=16, symmetric=symmetric, clip=clip)
        return (
            (grid.nearest(weight).double() - weight.double())
            .square()
            .view(len(weight), -1, 16)
            .sum(-1)
        )

    searched, plain = error("mse"), error("none")
    assert (searched <= plain * (1 + 1e-5)).all()
    if bits == 2:
        assert searched[:ROWS].sum() < 0.9 * plain[:ROWS].sum()


def test_a_group_shares_a_scale_with_nobody_else():
    weight = gaussian(torch.float32)
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


def test_columns_are_rounded_as_they_are_in_the_whole_matrix():
    weight = gaussian(torch.bfloat16)
    grid = UniformGrid.fit(weight, bits=3, group_size=8, symmetric=False)
    whole = grid.nearest(weight)
    columns = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.nearest(weight[:, columns], columns), whole[:, columns])
    assert torch.equal(grid.nearest(weight[:, 5:11], slice(5, 11)), whole[:, 5:11])


@pytest.mark.parametrize(("dtype", "bits", "symmetric"), CASES)
def test_codes_of_columns_are_those_of_the_whole_matrix(dtype, bits, symmetric):
    weight = gaussian(dtype)
    grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric)
    codes, columns = grid.quantize(weight * 1.1), torch.arange(INPUTS)
    assert torch.equal(grid.quantize(weight * 1.1, columns), codes)
    assert torch.equal(
        grid.quantize((weight * 1.1).T.contiguous().T), codes
    )  # however it lies in memory
    assert torch.equal(grid.dequantize(codes, columns), grid.dequantize(codes))
    assert torch.equal(grid.dequantize(codes), grid.nearest(weight * 1.1))


@pytest.mark.parametrize(("dtype", "bits", "symmetric"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_rounds_as_the_whole_matrix_does(dtype, bits, symmetric, shape):
    weight = SHAPES[shape](gaussian(dtype), torch.finfo(dtype))
    grid = UniformGrid.fit(weight, bits=bits, group_size=8, symmetric=symmetric)
    shifted = (weight.float() * 1.1).clamp(
        torch.finfo(dtype).min, torch.finfo(dtype).max
    )  # off the grid and beyond
    whole = grid.nearest(shifted).float()
    columns = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    rounder, found = grid.rounder(columns), torch.empty(len(whole))
    for i, column in enumerate(columns.tolist()):
        rounder(i, shifted[:, column], found)
        assert torch.equal(found, whole[:, column])


def test_holds_is_exact():
    weight = gaussian(torch.float32)
    grid = UniformGrid.fit(weight, bits=4)
    nearest = grid.nearest(weight)
    assert grid.holds(nearest)
    nearest[3, 4] = torch.nextafter(nearest[3, 4], torch.tensor(math.inf))
    assert not grid.holds(nearest)


class TestStatistics:
    def test_squared_error_is_that_of_the_outputs(self):
        X, delta = gaussian(torch.float32, rows=50), gaussian(torch.float32, rows=4, seed=1)
        statistics = Statistics(50, {Gram: X.T @ X})
        assert statistics.squared_error(delta) == pytest.approx(
            (X @ delta.T).square().sum().item(), rel=1e-5
        )

    def test_squared_error_is_its_diagonal_part_without_a_gram_matrix(self):
        X, delta = torch.diag(torch.arange(1.0, 5.0)), gaussian(torch.float32, rows=3, inputs=4)
        statistics = Statistics(4, {SquaredNorms: X.square().sum(0)})
        assert statistics.squared_error(delta) == pytest.approx(
            (X @ delta.T).square().sum().item(), rel=1e-5
        )

    def test_isotropic_knows_nothing(self):
        isotropic = Statistics(9, {Gram: torch.full((4, 4), 2.0)}).isotropic()
        assert isotropic.tokens == 0
        assert torch.equal(isotropic[SquaredNorms], torch.ones(4))
        assert torch.equal(isotropic[Gram], torch.eye(4))
        assert Statistics(9, {SquaredNorms: torch.ones(4)}).isotropic().gram is None


class TestLayerState:
    def state(self, **changes):
        weight = gaussian(torch.bfloat16)
        pruned = weight.abs() < 0.5
        grid = UniformGrid.fit(weight, bits=4)
        weight = grid.nearest(weight).masked_fill(pruned, 0.0)
        return dataclasses.replace(LayerState(weight, pruned, grid), **changes)

    def test_a_state_that_keeps_its_promises_passes(self):
        self.state().check("here")
        LayerState(gaussian(torch.float16)).check("here")

    def test_sparsity_is_what_was_removed_and_not_what_is_zero(self):
        state = self.state()
        assert state.sparsity == pytest.approx(state.pruned.float().mean().item())
        assert (state.weight == 0).float().mean() >= state.sparsity
        assert LayerState(torch.zeros(4, 4)).sparsity == 0

    def test_bits_are_those_of_the_grid_or_of_the_dtype(self):
        assert self.state().bits == 4
        assert self.state(grid=None).bits == 16
        assert LayerState(torch.zeros(1, 1)).bits == 32

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_weight_that_is_no_number_is_refused(self, value):
        weight = gaussian(torch.float32)
        weight[1, 2] = value
        with pytest.raises(InvariantError, match="layer 3: a weight is NaN or infinite"):
            LayerState(weight).check("layer 3")

    @pytest.mark.parametrize("value", [1e-3, -0.0])
    def test_a_removed_weight_must_be_positive_zero(self, value):
        state = self.state()
        weight = state.weight.clone()
        row, column = state.pruned.nonzero()[0].tolist()
        weight[row, column] = value
        with pytest.raises(
            InvariantError, match=r"^here: 1 pruned weights are no longer \+0\.0\. This is a bug"
        ):
            dataclasses.replace(state, weight=weight, grid=None).check("here")

    @pytest.mark.parametrize(
        "pruned", [torch.zeros(ROWS, INPUTS), torch.zeros(INPUTS, dtype=torch.bool)]
    )
    def test_a_mask_must_fit(self, pruned):
        with pytest.raises(InvariantError, match="not a boolean tensor of the weight's shape"):
            self.state(pruned=pruned).check("here")

    def test_a_weight_off_its_grid_is_refused(self):
        state = self.state()
        weight = state.weight.clone()
        row, column = (~state.pruned).nonzero()[0].tolist()
        weight[row, column] *= 1.01
        with pytest.raises(InvariantError, match="here: a weight is off its quantisation grid"):
            dataclasses.replace(state, weight=weight).check("here")

    def test_the_grid_is_in_the_dtype_of_the_weight(self):
        state = self.state()
        with pytest.raises(
            InvariantError, match=r"the grid is in torch\.bfloat16, the weight in torch\.float32"
        ):
            dataclasses.replace(state, weight=state.weight.float()).check("here")
