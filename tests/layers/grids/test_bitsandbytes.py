"""Codes, values and scales of the library's grids; that both are the library's own is tested with
the backend."""

import dataclasses

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from optimum_order.layers.grids.bitsandbytes import (
    BlockGrid,
    NestedScales,
    fit_blocks,
    fit_rows,
)
from optimum_order.testing import GridContract, gaussian, same


class TestBlocks(GridContract):
    inputs = 128

    def grids(self, weight):
        yield fit_blocks(weight, "nf4", 32, False)[0]
        yield fit_blocks(weight, "fp4", 64, False)[0]

    def together(self, grid):
        return grid.blocksize


class TestNestedBlocks(GridContract):
    """A row has as many blocks as share a scale."""

    inputs = 32 * 256

    def grids(self, weight):
        yield fit_blocks(weight, "nf4", 32, True)[0]

    def together(self, grid):
        return self.inputs


class TestRows(GridContract):
    def grids(self, weight):
        yield fit_rows(weight)[0]


GRIDS = [
    lambda weight: fit_blocks(weight, "nf4", 64, False)[0],
    lambda weight: fit_blocks(weight, "nf4", 32, True)[0],
    lambda weight: fit_blocks(weight, "fp4", 64, False)[0],
    lambda weight: fit_blocks(weight, "fp4", 128, True)[0],
    lambda weight: fit_rows(weight)[0],
]


def negative_zeros(weight):
    return int((torch.signbit(weight) & (weight == 0)).sum())


def test_zero_has_its_own_code():
    weight = torch.zeros(32, 128)
    weight[:, 0] = 1.0
    for fit in GRIDS:
        grid = fit(weight)
        assert grid.zero == (7 if getattr(grid, "data_type", None) == "nf4" else 0)
        assert (grid.quantize(weight)[:, 1:] == grid.zero).all()
        for nothing in (1e-9, -1e-9):  # fp4 has a zero for each sign
            assert (grid.quantize(torch.full_like(weight, nothing)) == grid.zero).all()


def test_values_that_underflow_are_plus_zero():
    """SparseGPT rounds float32 values to a grid in half precision, where they may become -0.0."""
    for fit in GRIDS:
        grid = fit(torch.full((32, 128), 2.4e-7).half())
        values = -torch.linspace(0, 1e-7, 128).expand(32, 128)
        assert negative_zeros(grid.nearest(values)) == 0
        assert (grid.nearest(values) == 0).any() and (grid.nearest(values) < 0).any()


def test_nested_scales_never_reach_zero():
    """Rounding a small scale beside a huge one can give a negative one, and zeros a minus sign."""
    weight = gaussian(64, 256) * 1e-4
    weight[:4, 0] = 1.0
    state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)[1]
    library = NestedScales(state.absmax, state.state2.absmax, state.offset)
    assert (library.dequantize() < 0).any(), "the library's own would turn signs of weights as well"
    grid, codes = fit_blocks(weight, "nf4", 64, True)
    assert (grid.absmax > 0).all() and torch.equal(grid.absmax, grid.nested.dequantize())
    assert negative_zeros(grid.dequantize(codes)) == 0


class TestParts:
    def test_blocks_that_do_not_end_with_rows_cannot_be_taken_apart(self):
        grid = fit_blocks(gaussian(8, 96), "nf4", 64, False)[0]
        with pytest.raises(ValueError, match="blocks of 64 weights do not end with rows of 96"):
            grid.take(slice(0, 4))
        with pytest.raises(ValueError, match="blocks of 64 weights do not end with rows of 96"):
            BlockGrid.concat([grid, grid])
        assert same(BlockGrid.concat([grid]), grid)

    def test_the_block_that_a_selection_breaks_is_named(self):
        grid = fit_blocks(gaussian(8, 128), "nf4", 32, False)[0]
        with pytest.raises(ValueError, match="breaks block 1: the 32 weights of a block"):
            grid.take(columns=slice(0, 40))

    def test_scales_that_share_a_scale_cannot_be_taken_apart(self):
        grid = fit_blocks(gaussian(256, 64), "nf4", 32, True)[0]  # 512 blocks
        assert grid.take(slice(128, None)).nested.absmax.shape == (1,)
        with pytest.raises(ValueError, match="breaks group of scales 0: the 256 weights"):
            grid.take(slice(100, 240))
        with pytest.raises(ValueError, match="Nested scales can be stacked if they were parts"):
            BlockGrid.concat(
                [grid.take(slice(0, 128)), fit_blocks(gaussian(1, 64), "nf4", 32, True)[0]]
            )
        with pytest.raises(ValueError, match="nested, or of none"):
            BlockGrid.concat([grid, dataclasses.replace(grid, nested=None)])

    def test_grids_are_stacked_only_if_they_agree(self):
        grid = fit_blocks(gaussian(8, 128), "nf4", 32, False)[0]
        for name, other in {
            "data_type": fit_blocks(gaussian(8, 128), "fp4", 32, False)[0],
            "blocksize": fit_blocks(gaussian(8, 128), "nf4", 64, False)[0],
            "inputs": fit_blocks(gaussian(8, 64), "nf4", 32, False)[0],
            "dtype": fit_blocks(gaussian(8, 128).half(), "nf4", 32, False)[0],
        }.items():
            with pytest.raises(ValueError, match=f"same {name}, got"):
                BlockGrid.concat([grid, other])
        with pytest.raises(ValueError, match="A BlockGrid and a RowGrid cannot be stacked"):
            BlockGrid.concat([grid, fit_rows(gaussian(8, 128))[0]])

    def test_the_last_block_of_another_shape_may_be_short(self):
        grid = fit_blocks(gaussian(8, 128), "nf4", 32, True)[0]
        grown = grid.like(5, 2000)
        assert grown.absmax.shape == grown.nested.codes.shape == (313,)
        assert grown.nested.absmax.shape == (2,)
        assert torch.equal(grown.nested.offset, grid.nested.offset)
