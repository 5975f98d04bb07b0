"""Superblocks hold a grid as it is, and the package `gguf` computes the values that were measured."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats import gguf_blocks, gguf_superblocks
from optimum_order.formats.gguf_superblocks import BY_KIND, BY_NUMBER, LAYOUTS
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.superblock_search import SUPERBLOCK, TYPES
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.testing import DTYPES, gaussian, same

gguf = pytest.importorskip("gguf")


def by_the_package(data, layout):
    """What the package `gguf` makes of bytes."""
    number = gguf.GGMLQuantizationType(layout.number)
    return torch.from_numpy(gguf.dequantize(data.numpy(), number))


def test_the_bits_of_a_weight_are_those_of_the_file():
    for kind, layout in BY_KIND.items():
        grid = SuperblockGrid.fit(gaussian(2, SUPERBLOCK), kind)
        assert grid.stored_bits == 8 * layout.bytes / SUPERBLOCK
    for block in gguf_blocks.TYPES:
        grid = UniformGrid.fit(
            gaussian(2, 64),
            bits=block.bits,
            group_size=block.weights,
            symmetric=not block.affine,
            clip="none",
            short_scales=True,
        )
        assert grid.stored_bits == 8 * block.bytes / block.weights


@given(
    kind=st.sampled_from(sorted(TYPES)),
    zero=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-6, 0.05, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_grid_comes_back_and_values_are_those_of_the_package(kind, zero, dtype, size, seed):
    weight = (gaussian(3, 2 * SUPERBLOCK, seed) * size).to(dtype)
    weight[1, :300] = 0
    layout = BY_KIND[kind]
    grid = SuperblockGrid.fit(weight, kind, zero=zero)
    codes = grid.quantize(weight)
    data = gguf_superblocks.pack(codes, grid)
    assert data.shape == (3, 2 * layout.bytes)
    # the contract: what llama.cpp multiplies with is the weight, before it is rounded to its dtype
    assert torch.equal(by_the_package(data, layout).to(dtype), grid.dequantize(codes))
    again, unpacked = gguf_superblocks.unpack(data, layout, dtype)
    assert torch.equal(unpacked, codes)
    # zeros may be there though nobody asked for them
    assert again.has_zero or not grid.has_zero
    assert same(dataclasses.replace(again, zero=grid.zero), grid)


@given(kind=st.sampled_from(sorted(TYPES)), seed=st.integers(0, 2**16))
@settings(max_examples=60)
def test_any_bytes_stand_for_what_the_package_says(kind, seed):
    """Those of others too: each bit has its place, and comes back there."""
    layout = BY_KIND[kind]
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (2, layout.bytes), generator=generator, dtype=torch.uint8)
    names = ["d"] if not TYPES[kind].affine else ["d", "e"]
    start = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208}[layout.name]
    numbers = torch.rand(2, len(names), generator=generator).half()
    data[:, start : start + 2 * len(names)] = numbers.view(torch.uint8)
    grid, codes = gguf_superblocks.unpack(data, layout, torch.float32)
    assert torch.equal(by_the_package(data, layout), grid.dequantize(codes))
    assert torch.equal(gguf_superblocks.pack(codes, grid), data)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_types_have_the_sizes_and_numbers_of_the_package(layout):
    number = gguf.GGMLQuantizationType[layout.name]
    assert number == layout.number and BY_NUMBER[layout.number] is layout
    assert gguf.GGML_QUANT_SIZES[number] == (layout.weights, layout.bytes)


def test_scales_that_are_no_numbers_are_refused():
    weight = gaussian(2, SUPERBLOCK)
    for number in (float("inf"), float("nan")):
        grid = SuperblockGrid.fit(weight, "q4_k")
        codes = grid.quantize(weight)
        grid = dataclasses.replace(grid, scale=torch.full_like(grid.scale, number))
        data = gguf_superblocks.pack(codes, grid)
        with pytest.raises(ArtifactError, match="a scale of its Q4_K"):
            gguf_superblocks.unpack(data, BY_KIND["q4_k"], torch.bfloat16)


def test_scales_of_either_sign_come_back_as_they_are():
    """llama.cpp makes negative ones, and zeros where all weights are zero."""
    for kind in ("q3_k", "q6_k"):
        weight = gaussian(2, SUPERBLOCK)
        grid = SuperblockGrid.fit(weight, kind)
        codes = grid.quantize(weight)
        grid = dataclasses.replace(grid, scale=torch.tensor([[-0.01], [0.0]]).half())
        data = gguf_superblocks.pack(codes, grid)
        again, same = gguf_superblocks.unpack(data, BY_KIND[kind], torch.float32)
        assert torch.equal(again.scale, grid.scale) and torch.equal(same, codes)
        values = again.dequantize(codes)
        assert again.has_zero and again.holds(values) and not values[1].any()
