"""`sparse`: which weights survived pruning, and the codes or values of the survivors alone.

The bytes of a layer, see `layer_bytes`, are, one after the other:

    header    28 bytes, see `_Header`
    scales    (out, groups) in the dtype of the weight, if the layer is quantized
    zeros     (out, groups) uint8, the zero points, if its grid is not symmetric
    mask      1 bit for each weight, row after row, 1 where it survived; or, if exactly N of every M
              inputs survived and that is shorter, ceil(log2(C(M, N))) bits for every M: the number
              of their mask among all masks that have N of M bits
    weights   for each survivor a code of 2 to 8 bits, symmetric ones counted from the lowest, or
              its value

A stream of bits fills each byte from the lowest, and leaves the rest of its last byte zero.
Altogether a layer takes `1 + (1 - s) * b` bits for each weight at a sparsity of s, plus scales; at
2:4, `3/4 + b/2`.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Size
from optimum_order.formats.layer_bytes import DTYPES, MOST_INPUTS, LayerBytes, checked_bytes
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState, integers
from optimum_order.models.units import Target

_Bytes = NDArray[np.uint8]
_Mask = NDArray[np.bool_]
_Numbers = NDArray[Any]

_NONE, _SURVIVORS, _INDEX, _NONZEROS = range(4)
"""Kinds of mask: every weight is stored; 1 where it survived; an N:M index; 1 where it is not zero.

The last leaves zeros out of a layer whose mask is unknown, and claims nothing about pruning."""
_LARGEST_M = 64
_MOST_MASKS = 2**16
"""Of an N:M index: its numbers have at most 16 bits, and a table of all its masks 3 MB."""
_CHUNK = 2**16
"""Weights decoded at a time, few enough for the processor's cache."""


class _Header(NamedTuple):
    """What the bytes after it are.

    Args:
        version: 1.
        precision: Of the weight: 0 for float32, 1 for bfloat16, 2 for float16.
        bits: Of a code, 2 to 8; 0 if values are stored.
        affine: 1 if there are zero points.
        mask: Kind of mask, see above.
        n, m: Of an N:M index, otherwise 0.
        reserved: 0.
        rows, inputs: Shape of the weight.
        group_size: Inputs that share a scale; 0 if values are stored.
        stored: Number of stored weights.
    """

    version: int
    precision: int
    bits: int
    affine: int
    mask: int
    n: int
    m: int
    reserved: int
    rows: int
    inputs: int
    group_size: int
    stored: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def weights(self) -> int:
        return self.rows * self.inputs

    @property
    def mask_bits(self) -> int:
        if self.mask == _INDEX:
            return self.weights // self.m * _index_bits(self.n, self.m)
        return 0 if self.mask == _NONE else self.weights

    @property
    def weight_bits(self) -> int:
        return self.bits or self.dtype.itemsize * 8

    def check(self) -> None:
        """Raise ArtifactError unless `encode` could have written this header."""
        if self.version != 1:
            raise ArtifactError(
                f"it is stored in version {self.version} of this format; 1 can be read, upgrade"
            )
        quantized = 2 <= self.bits <= 8 and self.affine < 2 and self.group_size > 0
        plain = self.bits == self.affine == self.group_size == 0
        index = 0 < self.n < self.m <= _LARGEST_M and math.comb(self.m, self.n) <= _MOST_MASKS
        if not (
            (quantized or plain)
            and (index if self.mask == _INDEX else self.mask <= _NONZEROS and self.n == self.m == 0)
            and self.precision < len(DTYPES)
            and self.reserved == 0
            and self.rows > 0
            and 0 < self.inputs <= MOST_INPUTS
            and self.inputs % (self.group_size or 1) == 0
            and self.inputs % (self.m or 1) == 0
        ):
            raise ArtifactError(f"no layer has the header {self._asdict()}")


_STRUCT = struct.Struct("<8B3IQ")


class Sparse(LayerBytes):
    """A bit or less for each weight, and the survivors."""

    name = "sparse"
    zeros_are_cheap = True
    summary = (
        "masks and the survivors' 2-8 bit codes or values; read by transformers after 'import "
        "optimum_order'"
    )
    nothing = "No layer is pruned or quantized."

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if state.grid is not None and not isinstance(state.grid, UniformGrid):
            return f"its {type(state.grid).__name__} is not a grid of equal steps"
        return super().why_not(target, state)

    def encodes(self, state: LayerState) -> bool:
        if state.grid is not None or _is_pruned(state):
            return True
        return not state.weight.is_meta and _nonzeros(state) is not None

    def size(self, state: LayerState) -> Size:
        weights = state.weight.numel()
        scales = 0
        if isinstance(state.grid, UniformGrid):
            scales = state.grid.scale.nbytes
            scales += 0 if state.grid.symmetric else state.grid.scale.numel()
        # A mask is there only if it makes up for itself, or if weights were pruned; and a stream of
        # bits may leave a part of its last byte empty.
        mask = _bytes_for(weights) if state.pruned is not None else 1
        most = _STRUCT.size + scales + mask + _bytes_for(weights * state.bits)
        return Size(most, exact=False)

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = state.grid
        weight = state.weight.cpu().contiguous()
        bits = affine = group_size = 0
        scales = []
        values: _Numbers
        if isinstance(grid, UniformGrid):
            bits = grid.bits
            affine = int(not grid.symmetric)
            group_size = grid.unit
            codes = grid.quantize(state.weight)
            scales.append(_bytes(grid.scale))
            if grid.zero_point is None:
                codes = codes + 2 ** (bits - 1)
            else:
                scales.append(_bytes(grid.zero_point.to(torch.uint8)))
            values = codes.to(torch.uint8).cpu().numpy()
        else:
            values = integers(weight).numpy()
        mask, n, m, stored = _mask(state)
        survivors = values.ravel() if stored is None else values[stored]
        precision = DTYPES.index(weight.dtype)
        rows, inputs = weight.shape
        header = _Header(
            1, precision, bits, affine, mask, n, m, 0, rows, inputs, group_size, survivors.size
        )
        parts = [
            np.frombuffer(_STRUCT.pack(*header), np.uint8),
            *scales,
            _pack_mask(header, stored),
            _pack(survivors, bits) if bits else survivors.view(np.uint8),
        ]
        return {"weight": torch.from_numpy(np.concatenate(parts))}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        parts = _Parts.of(self.payload(tensors))
        pruned = None
        if parts.header.mask in (_SURVIVORS, _INDEX):
            pruned = torch.empty(parts.header.rows, parts.header.inputs, dtype=torch.bool)
        return LayerState(parts.decode(pruned), pruned=pruned, grid=parts.grid)


def decode_weight(payload: Tensor) -> Tensor:
    """Return the weight (out, in) that the bytes of a layer stand for.

    Args:
        payload: (bytes,) uint8, on the CPU.

    Raises:
        ArtifactError: If the bytes do not fit together.
    """
    return _Parts.of(payload).decode()


@dataclass(frozen=True)
class _Parts:
    """The bytes of a layer taken apart.

    Args:
        header: What the other bytes are.
        grid: The grid of a quantized layer.
        mask: (bytes,) still packed, and as long as it must be.
        weights: The same.
    """

    header: _Header
    grid: UniformGrid | None
    mask: _Bytes
    weights: _Bytes

    @classmethod
    def of(cls, payload: Tensor) -> _Parts:
        """Check all that can be checked before anything is made that is larger than the bytes.

        Raises:
            ArtifactError: If the bytes do not fit together.
        """
        data = checked_bytes(payload, "sparse", _STRUCT.size)
        header = _Header._make(_STRUCT.unpack(data[: _STRUCT.size].tobytes()))
        header.check()
        groups = header.weights // header.group_size if header.bits else 0
        sizes = [
            groups * header.dtype.itemsize,
            groups * header.affine,
            _bytes_for(header.mask_bits),
        ]
        ends = [_STRUCT.size, *(_STRUCT.size + end for end in itertools.accumulate(sizes))]
        scales, zeros, mask = (data[begin:end] for begin, end in itertools.pairwise(ends))
        weights = data[ends[-1] :]
        expected = ends[-1] + _bytes_for(header.stored * header.weight_bits)
        if len(data) != expected:
            raise ArtifactError(
                f"a layer of {header.rows} x {header.inputs} that stores {header.stored} weights "
                f"has {expected} bytes, got {len(data)}"
            )
        survivors = _survivors(header, mask)
        if survivors != header.stored:
            raise ArtifactError(
                f"its mask keeps {survivors} weights, and {header.stored} are stored"
            )
        used = {"mask": header.mask_bits, "weights": header.stored * header.weight_bits}
        for stream, bits in zip((mask, weights), used.values(), strict=True):
            if bits % 8 and stream[-1] >> bits % 8:
                raise ArtifactError("the bits after its last ones must be zero")
        return cls(header, _grid(header, scales, zeros) if header.bits else None, mask, weights)

    def decode(self, pruned: Tensor | None = None) -> Tensor:
        """Return the weight (out, in), decoded a few rows at a time.

        Args:
            pruned: (out, in) bool to be filled with the mask, or None.

        Raises:
            ArtifactError: If an N:M index has a number that no mask has.
        """
        header = self.header
        weight = torch.empty(header.rows, header.inputs, dtype=header.dtype)
        step = max(1, _CHUNK // header.inputs)
        first = 0
        for row in range(0, header.rows, step):
            rows = slice(row, row + step)
            block = weight[rows]
            mask = self._stored(row * header.inputs, block.numel())
            at = None if mask is None else np.flatnonzero(mask)
            count = block.numel() if at is None else len(at)
            if self.grid is not None:
                codes = _unpack(self.weights, header.bits, first, count)
                _dequantize(block, at, codes, self.grid, rows)
            else:
                values = self._values(first, count)
                integers(block).copy_(_spread(values, at, block))
            if pruned is not None and mask is not None:
                torch.logical_not(torch.from_numpy(mask).view(block.shape), out=pruned[rows])
            first += count
        return weight

    def _stored(self, first: int, count: int) -> _Mask | None:
        """Return which weights are stored, (count,) bool, or None if all are.

        Args:
            first: The first weight, row after row.
            count: How many weights to look at.
        """
        header = self.header
        if header.mask == _NONE:
            return None
        if header.mask != _INDEX:
            return _unpack(self.mask, 1, first, count).view(bool)
        n = header.n
        m = header.m
        index = _unpack(self.mask, _index_bits(n, m), first // m, count // m)
        if index.max() >= math.comb(m, n):
            raise ArtifactError(
                f"there are {math.comb(m, n)} masks of {n}:{m}, got number {index.max()}"
            )
        # A table is faster, but no layer is to bring one along that is larger than itself.
        worth_it = math.comb(m, n) <= header.weights // m
        masks = _table(n, m).take(index, axis=0) if worth_it else _masks(index, n, m)
        return masks.ravel()

    def _values(self, first: int, count: int) -> _Numbers:
        """Return the bits of these stored values, (count,) integers."""
        size = self.header.dtype.itemsize
        part = self.weights[first * size : (first + count) * size].copy()  # a copy is aligned
        values: _Numbers = part.view(f"i{size}")
        return values


def _survivors(header: _Header, mask: _Bytes) -> int:
    """Return how many weights a packed mask says are stored."""
    if header.mask == _NONE:
        return header.weights
    if header.mask == _INDEX:
        return header.weights // header.m * header.n
    parts = (mask[begin : begin + _CHUNK] for begin in range(0, len(mask), _CHUNK))
    return sum(int.from_bytes(part.tobytes(), "little").bit_count() for part in parts)


def _dequantize(
    block: Tensor, at: _Numbers | None, codes: _Numbers, grid: UniformGrid, rows: slice
) -> None:
    """Put the values of codes into rows of a weight, to the bit as the grid computes them.

    Args:
        block: (rows, in) to be filled.
        at: Where the codes belong, row after row, or None if every weight has one.
        codes: (count,) codes.
        grid: The grid of the layer.
        rows: The rows of the layer that the block is.
    """
    if grid.zero_point is None:
        steps = (codes - np.uint8(2 ** (grid.bits - 1))).view(np.int8)
    else:
        zeros = grid.zero_point[rows].repeat_interleave(grid.unit, dim=1).numpy().ravel()
        steps = codes - (zeros if at is None else zeros[at])
    groups = block.view(len(block), -1, grid.unit)
    groups.copy_(_spread(steps, at, groups))
    groups.mul_(grid.scale[rows, :, None])


def _spread(values: _Numbers, at: _Numbers | None, like: Tensor) -> Tensor:
    """Return values at their places among zeros.

    Args:
        values: (count,) values.
        at: Their places, row after row, or None if there is one for every place.
        like: A tensor of the shape of the result.
    """
    spread = values
    if at is not None:
        spread = np.zeros(like.numel(), values.dtype)
        spread[at] = values
    return torch.from_numpy(spread).view(like.shape)


def _grid(header: _Header, scales: _Bytes, zeros: _Bytes) -> UniformGrid:
    """Return the grid of a quantized layer.

    Args:
        header: Of the layer.
        scales: The bytes of its scales.
        zeros: Its zero points, if it has any.

    Raises:
        ArtifactError: If a scale or zero point is not allowed.
    """
    scale = torch.from_numpy(scales.copy()).view(header.dtype).view(header.rows, -1)
    if not ((scale > 0) & torch.isfinite(scale)).all():
        raise ArtifactError("scales must be finite and positive")
    zero = torch.from_numpy(zeros.copy()).view(header.rows, -1).short() if header.affine else None
    if zero is not None and zero.max() >= 2**header.bits:
        raise ArtifactError(
            f"zero points of {header.bits} bits must be below {2**header.bits}, got {zero.max()}"
        )
    return UniformGrid(bits=header.bits, scale=scale, zero_point=zero, inputs=header.inputs)


def _mask(state: LayerState) -> tuple[int, int, int, _Mask | None]:
    """Return the shortest mask of a layer.

    Returns:
        Its kind, its N and M, and which weights are stored, (out, in) bool, or None for all.
    """
    if _is_pruned(state):
        survived = state.mask.logical_not().cpu().numpy()
        n, m = _pattern(survived)
        return _INDEX if m else _SURVIVORS, n, m, survived
    stored = _nonzeros(state)
    return _NONE if stored is None else _NONZEROS, 0, 0, stored


def _is_pruned(state: LayerState) -> bool:
    """Return whether any weight was pruned; a mask without values may be of any weight."""
    return state.pruned is not None and (state.pruned.is_meta or bool(state.pruned.any()))


def _nonzeros(state: LayerState) -> _Mask | None:
    """Return which weights are not zero, (out, in) bool, if a mask of them makes up for itself."""
    # As a value, -0.0 is not the zero that a mask gives back; a grid has no -0.0.
    zero = (integers(state.weight.contiguous()) if state.grid is None else state.weight) == 0
    if int(zero.sum()) * state.bits <= zero.numel():
        return None
    nonzero: _Mask = zero.logical_not().cpu().numpy()
    return nonzero


def _pattern(mask: _Mask) -> tuple[int, int]:
    """Return the N and M with the shortest index among those that a mask keeps to.

    Args:
        mask: (out, in), True where a weight survived.

    Returns:
        N and M, or 0 and 0 if a bitmask is no longer.
    """
    best = (0, 0)
    shortest = _bytes_for(mask.size)
    for m in range(2, _LARGEST_M + 1):
        if mask.shape[1] % m:
            continue
        n = int(np.count_nonzero(mask[0, :m]))
        if not 0 < n < m or math.comb(m, n) > _MOST_MASKS:
            continue
        length = _bytes_for(mask.size // m * _index_bits(n, m))
        if length < shortest and all((row.reshape(-1, m).sum(1) == n).all() for row in mask):
            best = (n, m)
            shortest = length
    return best


def _pack_mask(header: _Header, stored: _Mask | None) -> _Bytes:
    if stored is None:
        return np.empty(0, np.uint8)
    if header.mask != _INDEX:
        return np.packbits(stored, bitorder="little")
    return _pack(_numbers(stored.reshape(-1, header.m)), _index_bits(header.n, header.m))


def _numbers(masks: _Mask) -> _Numbers:
    """Return the number of each mask among all N:M masks, in the order of `_masks`.

    Args:
        masks: (count, M) bool.

    Returns:
        (count,) int64.
    """
    count, m = masks.shape
    numbers = np.zeros(count, np.int64)
    seen = np.zeros(count, np.intp)
    for bit in range(m):
        seen += masks[:, bit]
        numbers += np.where(masks[:, bit], _CHOOSE[bit, seen], 0)
    return numbers


def _masks(numbers: _Numbers, n: int, m: int) -> _Mask:
    """Return the N:M masks with these numbers.

    Masks are numbered in ascending order of the integers whose bits they are, the first input's the
    lowest: so before a mask whose k-th survivor is input j lie the C(j, k) masks whose first k
    survivors are all before j.

    Args:
        numbers: (count,) integers.
        n: Survivors in a mask.
        m: Inputs in a mask.

    Returns:
        (count, M) bool.
    """
    masks = np.empty((len(numbers), m), bool)
    rest = numbers.astype(np.int64)
    left = np.full(len(numbers), n)
    for bit in reversed(range(m)):
        before = _CHOOSE[bit, left]
        has = np.greater_equal(rest, before, out=masks[:, bit])
        rest -= before * has
        left -= has
    return masks


@functools.lru_cache(maxsize=4)
def _table(n: int, m: int) -> _Mask:
    """Return all masks of N:M, (C(M, N), M) bool."""
    return _masks(np.arange(math.comb(m, n)), n, m)


_CHOOSE = np.array([[math.comb(m, n) for n in range(_LARGEST_M + 1)] for m in range(_LARGEST_M)])
"""C(m, n): the binomial coefficients, all below 2^63."""


def _index_bits(n: int, m: int) -> int:
    return (math.comb(m, n) - 1).bit_length()


def _pack(values: _Numbers, bits: int) -> _Bytes:
    """Pack numbers into a stream of bits.

    Args:
        values: (count,) below 2^bits.
        bits: Width of a number.

    Returns:
        (bytes,) uint8.
    """
    lanes = np.zeros((-(-len(values) // 8), 8), np.uint32)  # eight numbers fill `bits` bytes
    lanes.reshape(-1)[: len(values)] = values
    packed = np.zeros((len(lanes), bits), np.uint8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        for more in range(_bytes_for(shift + bits)):
            packed[:, byte + more] |= (lanes[:, lane] << shift >> 8 * more).astype(np.uint8)
    return packed.reshape(-1)[: _bytes_for(len(values) * bits)]


def _unpack(packed: _Bytes, bits: int, first: int, count: int) -> _Numbers:
    """Return some numbers of a stream of bits.

    Args:
        packed: (bytes,) from `_pack`.
        bits: Width of a number.
        first: The first number.
        count: How many numbers.

    Returns:
        (count,) uint8, or uint16 if the numbers have more than 8 bits.
    """
    skip = first % 8
    lanes = -(-(skip + count) // 8)
    packed = packed[first // 8 * bits :][: lanes * bits]
    if bits == 1:
        return np.unpackbits(packed, bitorder="little")[skip : skip + count]
    missing = np.zeros(lanes * bits - len(packed), np.uint8)
    packed = np.concatenate([packed, missing]).reshape(lanes, bits)
    dtype: Any = np.uint8 if bits <= 8 else np.uint16
    wide: Any = np.uint16 if bits <= 8 else np.uint32
    planes = packed.T.astype(wide, order="C")
    values = np.empty((lanes, 8), dtype)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        number = planes[byte] >> shift
        for more in range(1, _bytes_for(shift + bits)):
            number |= planes[byte + more] << (8 * more - shift)
        values[:, lane] = number & (2**bits - 1)
    numbers: _Numbers = values.reshape(-1)[skip : skip + count]
    return numbers


def _bytes_for(bits: int) -> int:
    return -(-bits // 8)


def _bytes(tensor: Tensor) -> _Bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().ravel()
