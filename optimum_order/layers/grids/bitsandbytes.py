"""The grids of the bitsandbytes library: NF4 and FP4 in blocks, LLM.int8 rows.

The library's own CPU kernels do the rounding. What they chose is kept as a grid, so that a later stage can zero or
move single weights without the scales moving, and the same codes are what the format writes.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_order.layers.grids.base import Grid

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share a scale in 4 bit."""
NESTED_BLOCKSIZE = 256
"""Scales that share a scale of their own under double quantisation."""
_SMALLEST = 2.0**-100
"""A block or row whose largest weight is below this is all zeros: no reciprocal overflows, no product is subnormal."""


@functools.cache
def levels(data_type: str, device: torch.device) -> Tensor:
    """The 16 values of "nf4" or "fp4" by code, (16,) float32, the largest of them 1."""
    from bitsandbytes.functional import get_4bit_type  # here: importing the library costs seconds

    return get_4bit_type(data_type, device=device)


@functools.cache
def nested_levels(device: torch.device) -> Tensor:
    """The values a scale may take under double quantisation, ascending by code, (256,) float32."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


@functools.cache
def _ascending(data_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes in the order of their values, and the midpoints between neighbours."""
    table = levels(data_type, device)
    order = torch.argsort(table)
    return order, (table[order[:-1]] + table[order[1:]]) / 2


class _LibraryGrid(Grid):
    """What both grids share: a weight that comes out as zero, of either sign, has zero's own code."""

    @property
    @abstractmethod
    def zero(self) -> int:
        """The code of +0.0."""

    def settle(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """These codes, with zero's code wherever the value is zero: fp4 has two, and half precision underflows."""
        return codes.masked_fill(self.dequantize(codes, columns) == 0, self.zero)


@dataclass(frozen=True)
class BlockGrid(_LibraryGrid):
    """One of 16 values times the scale of a block of consecutive weights, row after row.

    Args:
        data_type: "nf4" or "fp4".
        absmax: (blocks,) float32, finite and positive: the scales as they are after loading.
        blocksize: Weights that share a scale.
        inputs: The number of columns of W.
        dtype: Of the dequantised weight.
        nested: The quantised scales that `absmax` was made from, or None.
    """

    data_type: str
    absmax: Tensor
    blocksize: int
    inputs: int
    dtype: torch.dtype
    nested: NestedScales | None = None
    bits = 4

    @property
    def zero(self) -> int:
        return 7 if self.data_type == "nf4" else 0

    @property
    def unit(self) -> int:
        return self.blocksize

    def _scale(self, rows: int, columns: Tensor | slice) -> Tensor:
        column = torch.arange(self.inputs, device=self.absmax.device)[columns]
        row = torch.arange(rows, device=self.absmax.device)
        return self.absmax[
            (row[:, None] * self.inputs + column).div_(self.blocksize, rounding_mode="floor")
        ]

    def quantize(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        order, midpoints = _ascending(self.data_type, weight.device)
        scaled = weight.float() * (
            1.0 / self._scale(len(weight), columns)
        )  # as the library does, not a division
        return self.settle(order[torch.bucketize(scaled, midpoints)].short(), columns)

    def dequantize(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        table = levels(self.data_type, codes.device)
        return (table[codes.int()] * self._scale(len(codes), columns)).to(self.dtype)


@dataclass(frozen=True)
class NestedScales:
    """Scales quantised in their turn: `nested_levels[codes] * absmax + offset`.

    Args:
        codes: (blocks,) uint8.
        absmax: (ceil(blocks / 256),) float32.
        offset: () float32.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The scales, (blocks,) float32, to the bit as the library computes them on loading."""
        spread = self.absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(self.codes)]
        return nested_levels(self.codes.device)[self.codes.int()] * spread + self.offset

    @classmethod
    def fit(cls, absmax: Tensor) -> NestedScales:
        """The library's own for these scales, except that none is rounded down to nothing.

        Rounding a small scale beside large ones can give one below zero, which would make -0.0 of the zeros.
        """
        from bitsandbytes.functional import quantize_blockwise

        offset = absmax.mean()
        codes, inner = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        scales = cls(codes, inner.absmax, offset)
        while (low := scales.dequantize() < _SMALLEST).any():
            scales = dataclasses.replace(scales, codes=scales.codes + low.to(torch.uint8))
        return scales


@dataclass(frozen=True)
class RowGrid(_LibraryGrid):
    """The integers -127 ... 127 times `absmax / 127` of each row.

    Args:
        absmax: (out,) float32, finite and positive.
        inputs: The number of columns of W.
        dtype: Of the dequantised weight.
    """

    absmax: Tensor
    inputs: int
    dtype: torch.dtype
    bits = 8

    @property
    def zero(self) -> int:
        return 0

    @property
    def unit(self) -> int:
        return self.inputs

    def quantize(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        codes = (weight.float() * (127.0 / self.absmax[:, None])).round_().clamp_(-127, 127)
        return self.settle(codes.short(), columns)

    def dequantize(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        # The library's own rounded 1/127, in its own order.
        return (codes.float() * self.absmax[:, None] * 7.874015718698502e-3).to(self.dtype)


def fit_blocks(
    weight: Tensor, data_type: str, blocksize: int, double_quant: bool
) -> tuple[BlockGrid, Tensor]:
    """The library's 4-bit grid for a weight (out, in), and the codes (out, in) int16 it chose."""
    from bitsandbytes.functional import quantize_4bit

    packed, found = quantize_4bit(
        weight.cpu().contiguous(), blocksize=blocksize, quant_type=data_type
    )
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[
        : weight.numel()
    ]
    codes = codes.view(weight.shape).short().to(weight.device)
    # A block of zeros can have any scale; an average one does not spoil the others' if they are quantised too.
    empty = found.absmax < _SMALLEST
    average = 1.0 if empty.all() else found.absmax[~empty].mean().item()
    absmax, nested = found.absmax.masked_fill(empty, average), None
    if double_quant:
        nested = NestedScales.fit(absmax)
        absmax = nested.dequantize()
        nested = NestedScales(
            *(getattr(nested, part.name).to(weight.device) for part in dataclasses.fields(nested))
        )
    grid = BlockGrid(
        data_type, absmax.to(weight.device), blocksize, weight.shape[1], weight.dtype, nested
    )
    empty = (
        empty.to(weight.device).repeat_interleave(blocksize)[: weight.numel()].view(weight.shape)
    )
    return grid, grid.settle(codes.masked_fill(empty, grid.zero))


def fit_rows(weight: Tensor) -> tuple[RowGrid, Tensor]:
    """The library's int8 grid for a weight (out, in), and the codes (out, in) int16 it chose."""
    from bitsandbytes.functional import int8_vectorwise_quant

    # transformers casts to float16 first, because the library's GPU kernel wants it; that only loses precision.
    codes, absmax, _ = int8_vectorwise_quant(weight.cpu().float().contiguous())
    codes, absmax = codes.short().to(weight.device), absmax.to(weight.device)
    empty = absmax < _SMALLEST
    grid = RowGrid(absmax.masked_fill(empty, 1.0), weight.shape[1], weight.dtype)
    return grid, grid.settle(codes.masked_fill(empty[:, None], 0))
