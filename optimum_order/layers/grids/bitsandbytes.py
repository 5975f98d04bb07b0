"""The grids of the bitsandbytes library: NF4 and FP4 in blocks, LLM.int8 rows.

The library's own CPU kernels round. Their choice is held as a grid, so that a later stage can zero
or move single weights while the scales stay, and the same codes are what the format writes.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Selection, check_alike, whole_groups
from optimum_order.layers.tree import map_tensors

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share a scale in 4 bit."""
NESTED_BLOCKSIZE = 256
"""Scales that share a scale of their own under double quantization."""
_SMALLEST = 2.0**-100
"""A block or row whose largest weight is below this is all zeros: no reciprocal overflows, no
product is subnormal."""


@functools.cache
def levels(data_type: str, device: torch.device) -> Tensor:
    """Return the 16 values of a data type by code, (16,) float32, the largest of them 1.

    Args:
        data_type: "nf4" or "fp4".
        device: Where the values are resident.
    """
    from bitsandbytes.functional import get_4bit_type  # here: importing the library costs seconds

    values: Tensor = get_4bit_type(data_type, device=device)
    return values


@functools.cache
def nested_levels(device: torch.device) -> Tensor:
    """Return the values of a scale under double quantization, ascending by code, (256,) float32."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map()
    return values.to(device)


@functools.cache
def _ascending(data_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the codes in the order of their values, and the midpoints between neighbors."""
    table = levels(data_type, device)
    order = torch.argsort(table)
    return order, (table[order[:-1]] + table[order[1:]]) / 2


class _LibraryGrid(Grid):
    """A grid on which a weight that comes out as zero, of either sign, has zero's own code."""

    @property
    @abstractmethod
    def zero(self) -> int:
        """The code of +0.0."""

    def settle(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        """Return codes with zero's own wherever the value is zero.

        FP4 has two zeros, and a small value underflows in half precision.

        Args:
            codes: (out, k).
            columns: The k columns of W that the codes belong to.
        """
        return codes.masked_fill(self.dequantize(codes, columns) == 0, self.zero)


@dataclass(frozen=True)
class BlockGrid(_LibraryGrid):
    """One of 16 values times the scale of a block of consecutive weights, row after row.

    Args:
        data_type: "nf4" or "fp4".
        absmax: (blocks,) float32, finite and positive: the scales as they are after loading.
        blocksize: Weights that share a scale.
        inputs: Number of columns of W.
        dtype: Of the dequantized weight.
        nested: The quantized scales that `absmax` was made from, or None.

    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
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

    def _scale(self, rows: int, columns: Selection) -> Tensor:
        """Return the scale of each weight in the first rows and in some columns, (rows, k)."""
        column = torch.arange(self.inputs, device=self.absmax.device)[columns]
        row = torch.arange(rows, device=self.absmax.device)
        place = row[:, None] * self.inputs + column
        return self.absmax[place.div_(self.blocksize, rounding_mode="floor")]

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        order, midpoints = _ascending(self.data_type, weight.device)
        # times the reciprocal, as in the library, which does not divide
        scaled = weight.float() * (1.0 / self._scale(len(weight), columns))
        return self.settle(order[torch.bucketize(scaled, midpoints)].short(), columns)

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        table = levels(self.data_type, codes.device)
        return (table[codes.int()] * self._scale(len(codes), columns)).to(self.dtype)

    @property
    def _in_rows(self) -> bool:
        """True if no block holds weights of two rows."""
        return self.inputs % self.blocksize == 0

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        if not self._in_rows:
            raise ValueError(
                f"No part can be taken: blocks of {self.blocksize} weights do not end with rows of "
                f"{self.inputs}."
            )
        across = self.inputs // self.blocksize
        owners = torch.arange(self.inputs, device=self.absmax.device)[columns]
        blocks = torch.arange(len(self.absmax), device=self.absmax.device).view(-1, across)[rows]
        blocks = blocks[:, whole_groups(owners // self.blocksize, self.blocksize, "block")]
        chosen = blocks.flatten()
        return dataclasses.replace(
            self,
            absmax=self.absmax[chosen],
            inputs=len(owners),
            nested=None if self.nested is None else self.nested.take(chosen),
        )

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "data_type", "blocksize", "inputs", "dtype")
        if len(grids) > 1 and not grids[0]._in_rows:
            raise ValueError(
                f"Grids cannot be stacked: blocks of {grids[0].blocksize} weights do not end with "
                f"rows of {grids[0].inputs}."
            )
        scales = [grid.nested for grid in grids if grid.nested is not None]
        if scales and len(scales) < len(grids):
            raise ValueError("Grids can be stacked if the scales of all are nested, or of none.")
        return dataclasses.replace(
            grids[0],
            absmax=torch.cat([grid.absmax for grid in grids]),
            nested=NestedScales.concat(scales) if scales else None,
        )

    def like(self, rows: int, inputs: int) -> Self:
        blocks = -(-rows * inputs // self.blocksize)
        return dataclasses.replace(
            self,
            absmax=self.absmax.new_empty(blocks, device="meta"),
            inputs=inputs,
            nested=None if self.nested is None else self.nested.like(blocks),
        )


@dataclass(frozen=True)
class NestedScales:
    """Scales quantized in their turn: `nested_levels[codes] * absmax + offset`.

    Args:
        codes: (blocks,) uint8.
        absmax: (ceil(blocks / 256),) float32.
        offset: () float32.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """Return the scales, (blocks,) float32, to the bit as the library computes them."""
        spread = self.absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(self.codes)]
        return nested_levels(self.codes.device)[self.codes.int()] * spread + self.offset

    @classmethod
    def fit(cls, absmax: Tensor) -> Self:
        """Return the library's own for these scales, except that none is rounded down to nothing.

        Rounding a small scale beside large ones can give one below zero, which would make -0.0 of
        the zeros.

        Args:
            absmax: (blocks,) float32, positive.
        """
        from bitsandbytes.functional import quantize_blockwise

        offset = absmax.mean()
        codes, inner = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        scales = cls(codes, inner.absmax, offset)
        while (low := scales.dequantize() < _SMALLEST).any():
            scales = dataclasses.replace(scales, codes=scales.codes + low.to(torch.uint8))
        return scales

    def take(self, blocks: Tensor) -> Self:
        """Return the scales of some blocks.

        Args:
            blocks: (n,) int64.

        Raises:
            ValueError: If the selection separates scales that share a scale.
        """
        owners = blocks // NESTED_BLOCKSIZE
        missing = -len(owners) % NESTED_BLOCKSIZE  # the last may be shared by fewer
        owners = torch.cat([owners, owners[-1:].expand(missing)])
        groups = whole_groups(owners, NESTED_BLOCKSIZE, "group of scales")
        return dataclasses.replace(self, codes=self.codes[blocks], absmax=self.absmax[groups])

    @classmethod
    def concat(cls, scales: Sequence[Self]) -> Self:
        """Return the scales of all blocks, the first ones first.

        Raises:
            ValueError: If the scales do not share scales and an offset as those of one layer do.
        """
        first = scales[0]
        if any(len(part.codes) % NESTED_BLOCKSIZE for part in scales[:-1]) or any(
            not torch.equal(part.offset, first.offset) for part in scales
        ):
            raise ValueError("Nested scales can be stacked if they were parts of one layer's.")
        return dataclasses.replace(
            first,
            codes=torch.cat([part.codes for part in scales]),
            absmax=torch.cat([part.absmax for part in scales]),
        )

    def like(self, blocks: int) -> Self:
        """Return scales for so many blocks on the meta device; the offset is as it was.

        The offset has the same size for every shape, and the format writes it as text.
        """
        shared = -(-blocks // NESTED_BLOCKSIZE)
        return dataclasses.replace(
            self,
            codes=self.codes.new_empty(blocks, device="meta"),
            absmax=self.absmax.new_empty(shared, device="meta"),
        )


@dataclass(frozen=True)
class RowGrid(_LibraryGrid):
    """The integers -127 ... 127 times `absmax / 127` of each row.

    Args:
        absmax: (out,) float32, finite and positive.
        inputs: Number of columns of W.
        dtype: Of the dequantized weight.

    Source: Dettmers et al. 2022, LLM.int8, arXiv 2208.07339, section 3.1.
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

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        codes = (weight.float() * (127.0 / self.absmax[:, None])).round_().clamp_(-127, 127)
        return self.settle(codes.short(), columns)

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        # the library's own rounded 1/127, in its own order
        return (codes.float() * self.absmax[:, None] * 7.874015718698502e-3).to(self.dtype)

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        owners = self.absmax.new_zeros(self.inputs, dtype=torch.int64)[columns]
        whole_groups(owners, len(owners))
        return dataclasses.replace(self, absmax=self.absmax[rows], inputs=len(owners))

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "inputs", "dtype")
        return dataclasses.replace(grids[0], absmax=torch.cat([grid.absmax for grid in grids]))

    def like(self, rows: int, inputs: int) -> Self:
        absmax = self.absmax.new_empty(rows, device="meta")
        return dataclasses.replace(self, absmax=absmax, inputs=inputs)


def fit_blocks(
    weight: Tensor, data_type: str, blocksize: int, double_quant: bool
) -> tuple[BlockGrid, Tensor]:
    """Return the library's 4-bit grid for a weight, and the codes (out, in) int16 it chose.

    Args:
        weight: (out, in).
        data_type: "nf4" or "fp4".
        blocksize: Weights that share a scale, one of `BLOCKSIZES`.
        double_quant: Whether the scales are quantized in their turn.
    """
    from bitsandbytes.functional import quantize_4bit

    device = weight.device
    packed, state = quantize_4bit(
        weight.cpu().contiguous(), blocksize=blocksize, quant_type=data_type
    )
    pairs = packed.flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.numel()]
    codes = codes.view(weight.shape).short().to(device)
    # A block of zeros can have any scale; an average one does not spoil the others' if they are
    # quantized too.
    empty = state.absmax < _SMALLEST
    average = 1.0 if empty.all() else state.absmax[~empty].mean().item()
    absmax = state.absmax.masked_fill(empty, average)
    nested = None
    if double_quant:
        nested = NestedScales.fit(absmax)
        absmax = nested.dequantize()
        nested = map_tensors(lambda tensor: tensor.to(device), nested)
    grid = BlockGrid(data_type, absmax.to(device), blocksize, weight.shape[1], weight.dtype, nested)
    empty = empty.to(device).repeat_interleave(blocksize)[: weight.numel()].view(weight.shape)
    return grid, grid.settle(codes.masked_fill(empty, grid.zero))


@functools.cache
def computes_right(rows: int, inputs: int, data_type: str, blocksize: int) -> bool:
    """Return whether the library's kernels for this processor compute a layer of a shape right.

    The library takes any shape on a GPU. Its kernels for some processors (with AVX512-BF16) stop at
    some shapes and decode others wrongly, those of other processors do not: so they are tried.

    Args:
        rows: Outputs of a layer; a small one will do that leaves the same rest when it is divided
            by 32.
        inputs: Inputs of the layer.
        data_type: "nf4" or "fp4".
        blocksize: Weights that share a scale.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, inputs, generator=generator)
    grid, codes = fit_blocks(weight, data_type, blocksize, double_quant=False)
    expected = grid.dequantize(codes)
    try:
        decoded = dequantize_4bit(*quantize_4bit(weight, blocksize=blocksize, quant_type=data_type))
        layer = Linear4bit(inputs, rows, bias=False, quant_type=data_type)
        layer.weight = Params4bit(
            weight, requires_grad=False, blocksize=blocksize, quant_type=data_type
        )
        layer = layer.to("cpu").eval()
        with torch.no_grad():
            outputs = layer(torch.eye(inputs)).T
    except (AssertionError, RuntimeError):
        return False
    limit = 0.02 * expected.abs().max()  # a kernel may compute in bfloat16
    return all(bool((tried - expected).abs().max() < limit) for tried in (decoded, outputs))


def fit_rows(weight: Tensor) -> tuple[RowGrid, Tensor]:
    """Return the library's int8 grid for a weight, and the codes (out, in) int16 it chose.

    Args:
        weight: (out, in).
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    # transformers casts to float16 first, because the library's GPU kernel wants it; that only
    # loses precision
    codes, absmax, _ = int8_vectorwise_quant(weight.cpu().float().contiguous())
    codes = codes.short().to(weight.device)
    absmax = absmax.to(weight.device)
    empty = absmax < _SMALLEST
    grid = RowGrid(absmax.masked_fill(empty, 1.0), weight.shape[1], weight.dtype)
    return grid, grid.settle(codes.masked_fill(empty[:, None], 0))
