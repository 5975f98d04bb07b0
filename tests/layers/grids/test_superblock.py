import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.superblock_search import SUPERBLOCK, TYPES
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.testing import DTYPES, GridContract, gaussian

CASES = list(itertools.product(TYPES, (False, True)))


class TestContract(GridContract):
    inputs = 2 * SUPERBLOCK

    def grids(self, weight):
        for kind, zero in CASES:
            yield SuperblockGrid.fit(weight, kind, zero=zero)

    def together(self, grid):
        return SUPERBLOCK


def error(weight, grid, counts=None):
    squares = (grid.nearest(weight).double() - weight.double()).square()
    return (squares if counts is None else squares * counts).sum().item()


@given(
    kind=st.sampled_from(sorted(TYPES)),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-6, 1e-4, 0.05, 30.0, 3e4]),
    shift=st.sampled_from([0.0, 0.3, -4.0]),
    sparsity=st.sampled_from([0.0, 0.5, 0.95]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_zero_is_exactly_on_a_grid_that_promises_it(kind, dtype, size, shift, sparsity, seed):
    """Whatever the scales, in float32 as the package gguf computes: step * code - lowest."""
    weight = ((gaussian(3, SUPERBLOCK, seed) + shift) * size).clamp(-6e4, 6e4).to(dtype)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < sparsity
    grid = SuperblockGrid.fit(weight.masked_fill(pruned, 0.0), kind)
    assert grid.has_zero and grid.with_zero_looked_for().has_zero
    values = grid.nearest(torch.zeros_like(weight))
    assert not values.any()
    for tensor in (grid.scale, grid.least):
        assert tensor is None or (torch.isfinite(tensor) & (tensor > 0)).all()
    most = TYPES[kind].most
    for factor in (grid.factor, grid.least_factor):
        assert factor is None or factor.abs().max() <= most
    assert (grid.factor != 0).all()
    assert torch.isfinite(grid.nearest(weight)).all()


def test_free_leasts_round_with_less_error_and_say_that_zero_may_be_missing():
    weight = gaussian(32, 1024) * 0.05
    for kind, type_ in TYPES.items():
        free = SuperblockGrid.fit(weight, kind, zero=False)
        bound = SuperblockGrid.fit(weight, kind, zero=True)
        assert free.has_zero is (not type_.affine)
        if type_.affine:
            assert error(weight, free) < 0.9 * error(weight, bound), kind
            assert free.nearest(torch.zeros_like(weight)).any(), kind
        else:
            assert error(weight, free) == error(weight, bound), kind


def test_a_superblock_loses_little_against_scales_that_are_stored_in_full():
    """Which take three times the bits of its own."""
    weight = gaussian(32, 1024) * 0.05
    for kind, type_ in TYPES.items():
        full = UniformGrid.fit(
            weight, bits=type_.bits, group_size=type_.block, symmetric=not type_.affine, clip="mse"
        )
        grid = SuperblockGrid.fit(weight, kind, zero=False)
        assert error(weight, grid) < 1.01 * error(weight, full), kind


def test_inputs_that_count_more_are_rounded_with_less_error():
    weight = gaussian(16, 512)
    counts = torch.where(torch.arange(512) % 8 == 0, 100.0, 1.0)
    for kind, zero in CASES:
        plain = SuperblockGrid.fit(weight, kind, zero=zero)
        counted = SuperblockGrid.fit(weight, kind, importance=counts, zero=zero)
        assert error(weight, counted, counts) < 0.9 * error(weight, plain, counts), kind
        same = SuperblockGrid.fit(weight, kind, importance=torch.zeros(512), zero=zero)
        assert torch.equal(same.factor, plain.factor), kind


def test_a_permutation_within_a_superblock_is_refused():
    grid = SuperblockGrid.fit(gaussian(4, SUPERBLOCK), "q4_k")
    order = torch.arange(SUPERBLOCK)
    order[[0, 40]] = order[[40, 0]]
    with pytest.raises(ValueError, match="breaks block"):
        grid.take(columns=order)
    with pytest.raises(ValueError, match="do not divide 300"):
        grid.like(4, 300)


def test_blocks_may_be_zero_in_files_of_others():
    """A step of zero has the value zero alone, and no value is NaN."""
    grid = SuperblockGrid(
        kind="q6_k",
        scale=torch.ones(1, 1, dtype=torch.float16),
        factor=torch.zeros(1, 16, dtype=torch.int8),
        least=None,
        least_factor=None,
        zero=True,
        dtype=torch.float32,
    )
    weight = gaussian(1, SUPERBLOCK)
    assert not grid.nearest(weight).any()
    out = torch.empty(1)
    grid.rounder(torch.arange(4))(2, weight[:, 2], out)
    assert out.item() == 0.0
