"""The superblocks of GGUF: 256 codes with scales of scales, packed as llama.cpp reads the K-quants.

Bytes of a superblock, in order:

    Q2_K  16 factors and factors of leasts, 4 bits each; codes; d, e
    Q3_K  highest bits of codes; other 2 bits; 16 factors of 6 bits in 12 bytes; d
    Q4_K  d, e; 8 factors and factors of leasts of 6 bits in 12 bytes; codes
    Q5_K  d, e; the same 12 bytes; highest bits of codes; other 4 bits
    Q6_K  low 4 bits of codes; high 2 bits; 16 factors of 8 bits; d

A layer goes into them as it is: nothing is rounded here.

Source: the layout, `block_q2_K` ... `block_q6_K` of the project ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.superblock_search import SUPERBLOCK, TYPES

_Bytes = NDArray[Any]


@dataclass(frozen=True)
class SuperblockLayout:
    """One way to store a superblock.

    Args:
        name: As llama.cpp calls it.
        number: Of the type in a file.
        bytes: Bytes of a superblock.
    """

    name: str
    number: int
    bytes: int
    weights = SUPERBLOCK

    @property
    def kind(self) -> str:
        """The name of the grid's type."""
        return self.name.lower()

    @property
    def bits(self) -> int:
        """Width of a code."""
        return TYPES[self.kind].bits


LAYOUTS = (
    SuperblockLayout("Q2_K", 10, 84),
    SuperblockLayout("Q3_K", 11, 110),
    SuperblockLayout("Q4_K", 12, 144),
    SuperblockLayout("Q5_K", 13, 176),
    SuperblockLayout("Q6_K", 14, 210),
)
BY_KIND = {layout.kind: layout for layout in LAYOUTS}
BY_NUMBER = {layout.number: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class _Parts:
    """What n superblocks hold.

    Args:
        d: (n,) float16.
        f: (n, blocks), integers.
        e: (n,) float16; None where symmetric.
        m: (n, blocks), integers; None where symmetric.
        codes: (n, 256), integers, without sign.
    """

    d: _Bytes
    f: _Bytes
    e: _Bytes | None
    m: _Bytes | None
    codes: _Bytes


def pack(codes: Tensor, grid: SuperblockGrid) -> Tensor:
    """Return the bytes of a layer.

    Args:
        codes: (out, in), of the grid.
        grid: The grid.

    Returns:
        (out, bytes of a row) uint8.
    """
    layout = BY_KIND[grid.kind]
    rows, inputs = codes.shape
    if codes.is_meta:
        size = inputs // SUPERBLOCK * layout.bytes
        return torch.empty(rows, size, dtype=torch.uint8, device="meta")

    def listed(tensor: Tensor | None, *shape: int) -> Any:
        return None if tensor is None else tensor.cpu().numpy().reshape(*shape)

    blocks = grid.type.blocks
    parts = _Parts(
        d=listed(grid.scale, -1),
        f=listed(grid.factor, -1, blocks),
        e=listed(grid.least, -1),
        m=listed(grid.least_factor, -1, blocks),
        codes=listed(codes - grid.type.codes[0], -1, SUPERBLOCK).astype(np.uint8),
    )
    packed = np.concatenate(_PACK[layout.name](parts), axis=1)
    return torch.from_numpy(packed.reshape(rows, -1))


def unpack(
    data: Tensor, layout: SuperblockLayout, dtype: torch.dtype
) -> tuple[SuperblockGrid, Tensor]:
    """Return the grid of a layer, and the codes on it.

    Args:
        data: (out, bytes of a row) uint8 on the CPU, whole superblocks.
        layout: Their type.
        dtype: Of the weights.

    Raises:
        ArtifactError: If a scale is not finite.
    """
    rows = len(data)
    parts = _UNPACK[layout.name](data.numpy().reshape(-1, layout.bytes))
    for scales in (parts.d, parts.e):
        if scales is not None and not np.isfinite(scales).all():
            raise ArtifactError(f"a scale of its {layout.name} is not finite")

    def shaped(array: _Bytes | None, dtype: torch.dtype) -> Any:
        return None if array is None else torch.from_numpy(array.copy()).to(dtype).view(rows, -1)

    kind = TYPES[layout.kind]
    grid = SuperblockGrid(
        kind=layout.kind,
        scale=shaped(parts.d, torch.float16),
        factor=shaped(parts.f, torch.int8),
        least=shaped(parts.e, torch.float16),
        least_factor=shaped(parts.m, torch.int8),
        zero=not kind.affine,
        dtype=dtype,
    )
    return grid.with_zero_looked_for(), shaped(parts.codes, torch.int16) + kind.codes[0]


def _half(numbers: _Bytes | None) -> _Bytes:
    """Return float16 numbers (n,) as bytes, (n, 2)."""
    assert numbers is not None
    return numbers[:, None].view(np.uint8)


def _number(data: _Bytes) -> _Bytes:
    """Return the float16 numbers (n,) of bytes (n, 2)."""
    numbers: _Bytes = np.ascontiguousarray(data).view(np.float16)[:, 0]
    return numbers


def _interleaved(codes: _Bytes, bits: int, width: int) -> _Bytes:
    """Return codes as bytes: a byte holds the codes of one place in neighboring runs.

    Args:
        codes: (n, 256) uint8, each of so many bits.
        bits: 1, 2 or 4.
        width: Codes of a run.

    Returns:
        (n, 32 * bits) uint8. The first of the runs that share bytes lies in the lowest bits.
    """
    runs = codes.reshape(len(codes), -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: _Bytes = np.bitwise_or.reduce(runs << shifts, axis=2)
    return packed.reshape(len(codes), -1)


def _apart(data: _Bytes, bits: int, width: int) -> _Bytes:
    """Return the codes (n, 256) uint8 that `_interleaved` packed."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs: _Bytes = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return runs.reshape(len(data), -1)


def _pack_factors(parts: _Parts) -> _Bytes:
    """Return 8 factors and 8 factors of leasts, all of 6 bits, in 12 bytes."""
    assert parts.m is not None
    f, m = parts.f.astype(np.uint8), parts.m.astype(np.uint8)
    low = f[:, :4] | f[:, 4:] >> 4 << 6
    middle = m[:, :4] | m[:, 4:] >> 4 << 6
    high = f[:, 4:] & 15 | m[:, 4:] << 4
    return np.concatenate([low, middle, high], axis=1)


def _unpack_factors(data: _Bytes) -> tuple[_Bytes, _Bytes]:
    low, middle, high = np.split(data, 3, axis=1)
    f = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    m = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return f, m


def _pack_q2(parts: _Parts) -> list[_Bytes]:
    assert parts.m is not None
    factors = parts.f.astype(np.uint8) | parts.m.astype(np.uint8) << 4
    return [factors, _interleaved(parts.codes, 2, 32), _half(parts.d), _half(parts.e)]


def _unpack_q2(data: _Bytes) -> _Parts:
    factors, codes, d, e = np.split(data, [16, 80, 82], axis=1)
    return _Parts(_number(d), factors & 15, _number(e), factors >> 4, _apart(codes, 2, 32))


def _pack_q3(parts: _Parts) -> list[_Bytes]:
    f = (parts.f + 32).astype(np.uint8)
    low = f[:, :8] & 15 | f[:, 8:] << 4
    high = np.bitwise_or.reduce(
        (f >> 4).reshape(-1, 4, 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=1
    )
    return [
        _interleaved(parts.codes >> 2, 1, 32),
        _interleaved(parts.codes & 3, 2, 32),
        low,
        high,
        _half(parts.d),
    ]


def _unpack_q3(data: _Bytes) -> _Parts:
    top, codes, low, high, d = np.split(data, [32, 96, 104, 108], axis=1)
    f = np.concatenate([low & 15, low >> 4], axis=1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    f = f | (high[:, None] >> shifts & 3).reshape(-1, 16) << 4
    whole = _apart(codes, 2, 32) | _apart(top, 1, 32) << 2
    return _Parts(_number(d), f.astype(np.int8) - 32, None, None, whole)


def _pack_q4(parts: _Parts) -> list[_Bytes]:
    return [
        _half(parts.d),
        _half(parts.e),
        _pack_factors(parts),
        _interleaved(parts.codes, 4, 32),
    ]


def _unpack_q4(data: _Bytes) -> _Parts:
    d, e, factors, codes = np.split(data, [2, 4, 16], axis=1)
    f, m = _unpack_factors(factors)
    return _Parts(_number(d), f, _number(e), m, _apart(codes, 4, 32))


def _pack_q5(parts: _Parts) -> list[_Bytes]:
    return [
        _half(parts.d),
        _half(parts.e),
        _pack_factors(parts),
        _interleaved(parts.codes >> 4, 1, 32),
        _interleaved(parts.codes & 15, 4, 32),
    ]


def _unpack_q5(data: _Bytes) -> _Parts:
    d, e, factors, top, codes = np.split(data, [2, 4, 16, 48], axis=1)
    f, m = _unpack_factors(factors)
    return _Parts(_number(d), f, _number(e), m, _apart(codes, 4, 32) | _apart(top, 1, 32) << 4)


def _pack_q6(parts: _Parts) -> list[_Bytes]:
    return [
        _interleaved(parts.codes & 15, 4, 64),
        _interleaved(parts.codes >> 4, 2, 32),
        parts.f.astype(np.int8).view(np.uint8),
        _half(parts.d),
    ]


def _unpack_q6(data: _Bytes) -> _Parts:
    low, high, f, d = np.split(data, [128, 192, 208], axis=1)
    factors = np.ascontiguousarray(f).view(np.int8)
    return _Parts(_number(d), factors, None, None, _apart(low, 4, 64) | _apart(high, 2, 32) << 4)


_PACK: dict[str, Callable[[_Parts], list[_Bytes]]] = {
    "Q2_K": _pack_q2,
    "Q3_K": _pack_q3,
    "Q4_K": _pack_q4,
    "Q5_K": _pack_q5,
    "Q6_K": _pack_q6,
}
_UNPACK: dict[str, Callable[[_Bytes], _Parts]] = {
    "Q2_K": _unpack_q2,
    "Q3_K": _unpack_q3,
    "Q4_K": _unpack_q4,
    "Q5_K": _unpack_q5,
    "Q6_K": _unpack_q6,
}
