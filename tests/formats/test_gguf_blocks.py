"""Blocks hold codes as they are, and the package `gguf` computes the values that were measured."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats import gguf_blocks
from optimum_order.formats.gguf_blocks import BLOCK, BY_NAME, TYPES
from optimum_order.layers.grids.uniform import UniformGrid

gguf = pytest.importorskip("gguf")


def by_the_package(data, kind):
    """What the package `gguf` makes of bytes."""
    number = gguf.GGMLQuantizationType(kind.number)
    return torch.from_numpy(gguf.dequantize(data.numpy(), number))


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    blocks=st.integers(1, 4),
    whole=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-4, 0.05, 30.0]),
    seed=st.integers(0, 99),
)
def test_codes_come_back_and_values_are_those_of_the_package(
    bits, symmetric, blocks, whole, dtype, size, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, blocks * BLOCK, generator=generator) * size).to(dtype)
    group = -1 if whole else BLOCK
    grid = UniformGrid.fit(
        weight, bits=bits, group_size=group, symmetric=symmetric, short_scales=True
    )
    assert not gguf_blocks.inexact_scales(grid)
    kind = gguf_blocks.type_of(grid)
    if not symmetric and bits > 5:
        assert kind is None
        return
    codes = grid.quantize(weight)
    data = gguf_blocks.pack(codes, grid, kind)
    assert data.shape == (3, blocks * kind.bytes)
    # the contract: what llama.cpp multiplies with is the weight, before it is rounded to its dtype
    assert torch.equal(by_the_package(data, kind).to(dtype), grid.dequantize(codes))
    again, unpacked = gguf_blocks.grid_of(gguf_blocks.unpack(data, kind), bits, group, dtype)
    assert torch.equal(unpacked, codes)
    assert torch.equal(again.scale, grid.scale) and again.bits == bits
    assert symmetric or torch.equal(again.zero_point, grid.zero_point)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_code_of_a_type_stands_where_the_package_looks_for_it(kind):
    number = gguf.GGMLQuantizationType(kind.number)
    assert gguf.GGML_QUANT_SIZES[number] == (BLOCK, kind.bytes)
    bits = kind.bits
    low = 0 if kind.affine else -(2 ** (bits - 1))
    codes = torch.arange(2**bits).repeat(BLOCK // 2).view(-1, BLOCK).short() + low
    zero = torch.full((len(codes), 1), 3, dtype=torch.int16) if kind.affine else None
    grid = UniformGrid(bits, torch.full((len(codes), 1), 0.5), zero, BLOCK)
    values = by_the_package(gguf_blocks.pack(codes, grid, kind), kind)
    assert torch.equal(values, (codes - (3 if kind.affine else 0)) * 0.5)


def test_narrow_codes_fit_a_wider_type():
    weight = torch.randn(2, 64)
    grid = UniformGrid.fit(weight, bits=3, group_size=32, short_scales=True)
    codes = grid.quantize(weight)
    for name in ("Q4_0", "Q5_0", "Q8_0"):
        data = gguf_blocks.pack(codes, grid, BY_NAME[name])
        assert torch.equal(by_the_package(data, BY_NAME[name]), grid.dequantize(codes))


def test_scales_that_float16_does_not_hold_are_seen():
    for scale, zero, inexact in [
        (1 / 3, None, True),
        (0.25, None, False),
        (2.0**-24, None, False),
        (2.0**-26, None, True),
        (1e6, None, True),
        (1 + 2**-10, 3, True),  # the scale fits, three of it do not
        (1 + 2**-8, 3, False),
    ]:
        zeros = None if zero is None else torch.tensor([[zero]], dtype=torch.int16)
        grid = UniformGrid(4, torch.tensor([[scale]]), zeros, 32)
        assert gguf_blocks.inexact_scales(grid) is inexact, scale


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.__setitem__((0, slice(0, 2)), 0), "no positive numbers"),
        (lambda data: data[0, :2].copy_(torch.tensor([0, 0x7C])), "no positive numbers"),
        (lambda data: data.__setitem__((0, 0), data[0, 0] + 1), "scales of their own"),
        (lambda data: data.__setitem__((0, 5), 0xFF), "out of range"),
    ],
)
def test_blocks_that_are_no_grid_are_refused(change, match):
    weight = torch.randn(2, 64).bfloat16()
    grid = UniformGrid.fit(weight, bits=3, short_scales=True)
    data = gguf_blocks.pack(grid.quantize(weight), grid, BY_NAME["Q4_0"])
    change(data)
    if "positive" in match:
        data[0, BY_NAME["Q4_0"].bytes :][:2] = data[0, :2]
    with pytest.raises(ArtifactError, match=match):
        gguf_blocks.grid_of(gguf_blocks.unpack(data, BY_NAME["Q4_0"]), 3, -1, torch.bfloat16)


def test_a_least_value_that_is_no_multiple_of_the_scale_is_refused():
    grid = UniformGrid(4, torch.ones(1, 1), torch.full((1, 1), 3, dtype=torch.int16), 32)
    data = gguf_blocks.pack(torch.zeros(1, 32, dtype=torch.int16), grid, BY_NAME["Q4_1"])
    for least in (-3.5, 1.0, -16.0, float("inf"), float("nan")):
        data[0, 2:4] = torch.from_numpy(np.float16([least]).view(np.uint8))
        with pytest.raises(ArtifactError, match="least value|zero point|of their own"):
            gguf_blocks.grid_of(gguf_blocks.unpack(data, BY_NAME["Q4_1"]), 4, 32, torch.float32)


@pytest.mark.parametrize("size", [16, 48, 96, 0, -2])
def test_groups_that_are_no_whole_blocks_are_refused(size):
    weight = torch.randn(2, 64)
    grid = UniformGrid.fit(weight, bits=4, short_scales=True)
    data = gguf_blocks.pack(grid.quantize(weight), grid, BY_NAME["Q4_0"])
    with pytest.raises(ArtifactError, match="whole blocks"):
        gguf_blocks.grid_of(gguf_blocks.unpack(data, BY_NAME["Q4_0"]), 4, size, torch.float32)
