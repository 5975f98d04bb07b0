"""The blocks of GGUF: 32 codes of a row with a float16 scale, packed as llama.cpp reads them.

A symmetric code q stands for q * d. An affine one stands for q * d + m, where m is minus the scale
times the zero point. Codes go into a block as they are: nothing is rounded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.layers.grids.block import BLOCK, ForeignBlockGrid
from optimum_order.layers.grids.uniform import UniformGrid

_HALF = BLOCK // 2
_Bytes = NDArray[Any]


@dataclass(frozen=True)
class BlockType:
    """One way to store a block.

    Args:
        name: As llama.cpp calls it.
        number: Of the type in a file.
        bits: Of a code.
        affine: Whether blocks have a least value beside the scale.
    """

    name: str
    number: int
    bits: int
    affine: bool
    weights = BLOCK

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return 2 * (2 if self.affine else 1) + self.bits * BLOCK // 8

    @property
    def offset(self) -> int:
        """What is added to a signed code, so that it is stored without sign."""
        return 0 if self.affine or self.bits == 8 else 2 ** (self.bits - 1)


TYPES = (
    BlockType("Q4_0", 2, 4, False),
    BlockType("Q4_1", 3, 4, True),
    BlockType("Q5_0", 6, 5, False),
    BlockType("Q5_1", 7, 5, True),
    BlockType("Q8_0", 8, 8, False),
)
BY_NUMBER = {kind.number: kind for kind in TYPES}
BY_NAME = {kind.name: kind for kind in TYPES}


def type_of(grid: UniformGrid | ForeignBlockGrid) -> BlockType | None:
    """Return the smallest type that holds the codes of a grid, or None if no type does."""
    fitting = [kind for kind in TYPES if kind.affine != grid.symmetric and kind.bits >= grid.bits]
    return min(fitting, key=lambda kind: kind.bits, default=None)


def inexact_scales(grid: UniformGrid) -> bool:
    """Return whether a scale, or a scale times its zero point, is no float16 number."""
    scale = grid.scale.float()
    numbers = [scale] if grid.zero_point is None else [scale, scale * grid.zero_point]
    return any(not torch.equal(number.half().float(), number) for number in numbers)


def pack(codes: Tensor, grid: UniformGrid | ForeignBlockGrid, kind: BlockType) -> Tensor:
    """Return the bytes of a layer.

    Args:
        codes: (out, in), of the grid.
        grid: A grid of blocks, or one whose scales float16 holds, in groups that are whole blocks.
        kind: A type that holds the codes.

    Returns:
        (out, bytes of a row) uint8.
    """
    rows, inputs = codes.shape
    blocks = inputs // BLOCK
    if codes.is_meta:
        return torch.empty(rows, blocks * kind.bytes, dtype=torch.uint8, device="meta")
    stored = (codes + kind.offset).to(torch.int16).cpu().numpy().astype(np.uint8)
    stored = stored.reshape(rows, blocks, BLOCK)
    parts = _numbers(grid, blocks)
    if kind.bits == 5:
        parts.append(np.packbits(stored >> 4, axis=-1, bitorder="little"))
    if kind.bits == 8:
        parts.append(stored)
    else:
        low = stored & 15
        parts.append(low[..., :_HALF] | low[..., _HALF:] << 4)
    return torch.from_numpy(np.concatenate(parts, axis=-1).reshape(rows, -1))


def _numbers(grid: UniformGrid | ForeignBlockGrid, blocks: int) -> list[_Bytes]:
    """Return the scale and, if there is one, the least of every block: (out, blocks, 2) uint8."""
    if isinstance(grid, ForeignBlockGrid):
        numbers = [grid.scale, grid.least]
    else:
        zero = grid.zero_point
        numbers = [grid.scale, None if zero is None else -grid.scale.float() * zero]
        # -0.0 is a value of its own in the file, and no scale times zero point
        numbers = [None if values is None else values + 0.0 for values in numbers]
    return [_half(values, blocks) for values in numbers if values is not None]


def _half(values: Tensor, blocks: int) -> _Bytes:
    """Return values (out, groups) as float16, repeated for each block: (out, blocks, 2) uint8."""
    repeated = values.half().repeat_interleave(blocks // values.shape[1], dim=1)
    numbers: _Bytes = repeated.contiguous().cpu().numpy()
    return numbers.view(np.uint8).reshape(*numbers.shape, 2)


@dataclass(frozen=True)
class Unpacked:
    """What the bytes of a layer hold.

    Args:
        codes: (out, in) int16, signed if the type is symmetric.
        scale: (out, blocks) float32.
        least: (out, blocks) float32, or None if the type is symmetric.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor | None


def unpack(data: Tensor, kind: BlockType) -> Unpacked:
    """Take the bytes of a layer apart.

    Args:
        data: (out, bytes of a row) uint8 on the CPU, whole blocks.
        kind: Their type.
    """
    rows = len(data)
    blocks = data.numpy().reshape(rows, -1, kind.bytes)
    numbers = np.ascontiguousarray(blocks[..., : 4 if kind.affine else 2]).view(np.float16)
    stored = blocks[..., numbers.shape[-1] * 2 :]
    codes: _Bytes
    if kind.bits == 8:
        codes = np.ascontiguousarray(stored).view(np.int8).astype(np.int16)
    else:
        packed = stored[..., -_HALF:]
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)
        if kind.bits == 5:
            high = np.unpackbits(stored[..., :4], axis=-1, bitorder="little")
            codes |= high.astype(np.int16) << 4
        codes -= kind.offset
    halves = torch.from_numpy(numbers.astype(np.float32))
    return Unpacked(
        torch.from_numpy(codes.reshape(rows, -1)),
        halves[..., 0].contiguous(),
        halves[..., 1].contiguous() if kind.affine else None,
    )


def as_they_are(
    parts: Unpacked, kind: BlockType, dtype: torch.dtype
) -> tuple[ForeignBlockGrid, Tensor]:
    """Return the grid that blocks have whoever made them, and the codes on it.

    Args:
        parts: What a file holds.
        kind: The type of the blocks.
        dtype: Of the weights.

    Raises:
        ArtifactError: If a scale is not finite.
    """
    least = parts.least
    for numbers in (parts.scale, least):
        if numbers is not None and not torch.isfinite(numbers).all():
            raise ArtifactError(f"a scale of its {kind.name} is not finite")
    grid = ForeignBlockGrid(
        kind.bits, parts.scale.half(), None if least is None else least.half(), dtype
    )
    return grid, parts.codes


def grid_of(
    parts: Unpacked, bits: int, group_size: int, dtype: torch.dtype
) -> tuple[UniformGrid, Tensor]:
    """Return the grid on which unpacked codes lie, and the codes on it.

    Args:
        parts: What a file holds.
        bits: Width of a code on the grid, which a type may be wider than.
        group_size: Inputs that share a scale, -1 for whole rows.
        dtype: Of the weights.

    Raises:
        ArtifactError: If there is no such grid.
    """
    inputs = parts.codes.shape[1]
    size = inputs if group_size == -1 else group_size
    if size < BLOCK or size % BLOCK or inputs % size:
        raise ArtifactError(f"groups of {group_size} are no whole blocks of {inputs} inputs")
    scale = _shared(parts.scale, size // BLOCK)
    if not ((scale > 0) & torch.isfinite(scale)).all() or not torch.equal(
        scale.to(dtype).float(), scale
    ):
        raise ArtifactError(f"its scales are no positive numbers of {dtype}")
    zero = None
    codes = parts.codes
    low = -(2 ** (bits - 1))
    if parts.least is not None:
        least = _shared(parts.least, size // BLOCK)
        steps = -least / scale
        zero = steps.nan_to_num(-1).round().clamp(-1, 2**15 - 1).short()
        if not torch.equal(zero * scale, -least):
            raise ArtifactError("the least value of a group is no multiple of its scale")
        if not ((zero >= 0) & (zero < 2**bits)).all():
            raise ArtifactError(f"a zero point is out of the range of {bits} bits")
        low = 0
    if not ((codes >= low) & (codes < low + 2**bits)).all():
        raise ArtifactError(f"a code of {bits} bits is out of range")
    return UniformGrid(bits, scale.to(dtype), zero, inputs), codes


def _shared(values: Tensor, blocks: int) -> Tensor:
    """Return the value of each group, (out, groups).

    Args:
        values: (out, blocks), of each block.
        blocks: Blocks in a group.

    Raises:
        ArtifactError: If the blocks of a group differ.
    """
    grouped = values.view(len(values), -1, blocks)
    if not (grouped == grouped[..., :1]).all():
        raise ArtifactError(f"blocks in groups of {blocks} have scales of their own")
    return grouped[..., 0].contiguous()
