"""`sparse`: which weights survived pruning, and the codes or values of those alone.

A layer is one tensor of bytes under the name of the dense weight, `<layer>.weight`. So all that transformers does to
checkpoints of an architecture, renaming parameters and fusing experts, it does to these too; and a reader that does
not know the format stops, because one dimension of uint8 fits no matrix. In these bytes lie, one after the other:

    header    28 bytes, see `_Header`
    scales    (out, groups) in the dtype of the weight, if the layer is quantised
    zeros     (out, groups) uint8, the zero points, if its grid is not symmetric
    mask      1 bit for each weight, row after row, 1 where it survived; or, if exactly N of every M inputs did and that
              is shorter, ceil(log2(C(M, N))) bits for every M: the number of their mask among all that have N of M bits
    weights   for each survivor a code of 2 to 8 bits, symmetric ones counted from the lowest, or its value

A stream of bits fills each byte from the lowest, and leaves the rest of its last byte zero. Altogether these are
`1 + (1 - s) * b` bits for each weight at a sparsity of s, plus scales; at 2:4, `3/4 + b/2`.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Format, Layers, Layout, Piece
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONE, _SURVIVORS, _INDEX, _NONZEROS = range(4)
"""Kinds of mask: every weight is stored; 1 where it survived; an N:M index; 1 where it is not zero. The last keeps
zeros out of a layer of which nobody knows what was pruned, and claims nothing about that."""
_LARGEST_M = 64
_MOST_MASKS = 2**16
"""Of an N:M index: its numbers then have at most 16 bits, and a table of all its masks 3 MB."""
_MOST_INPUTS = 2**20
"""Whole rows are decoded at a time, so that nothing but one row bounds the memory which that takes."""
_CHUNK = 2**16
"""Weights decoded at a time, few enough for the processor's cache."""


class _Header(NamedTuple):
    """What the bytes after it are.

    Args:
        version: 1.
        precision: Of the weight: 0 for float32, 1 for bfloat16, 2 for float16.
        bits: Of a code, 2 to 8; 0 if values are stored.
        affine: 1 if there are zero points.
        mask: Its kind, see above.
        n, m: Of an N:M index, otherwise 0.
        reserved: 0.
        rows, inputs: The shape of the weight.
        group_size: Inputs that share a scale; 0 if values are stored.
        stored: How many weights are stored.
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
        return _DTYPES[self.precision]

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
            and self.precision < len(_DTYPES)
            and self.reserved == 0
            and self.rows > 0
            and 0 < self.inputs <= _MOST_INPUTS
            and self.inputs % (self.group_size or 1) == 0
            and self.inputs % (self.m or 1) == 0
        ):
            raise ArtifactError(f"no layer has the header {self._asdict()}")


_STRUCT = struct.Struct("<8B3IQ")


class Sparse(Format):
    """A bit or less for each weight, and the survivors."""

    name = "sparse"
    summary = "masks and the survivors' 2-8 bit codes or values; read by transformers after 'import optimum_order'"
    stock = False
    packages = ("optimum-order",)
    import_first = "optimum_order"
    tensors = ("weight",)

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if state.grid is not None and not isinstance(state.grid, UniformGrid):
            return f"its {type(state.grid).__name__} is not a grid of equal steps"
        if state.weight.dtype not in _DTYPES:
            return (
                f"its weights are {state.weight.dtype}; they must be float32, bfloat16 or float16"
            )
        if state.weight.shape[1] > _MOST_INPUTS:
            return f"it has {state.weight.shape[1]} inputs, and may have {_MOST_INPUTS} at most"
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not layers:
            return "No layer is pruned or quantised."
        for name, (target, _) in layers.items():
            if not _stored_alone(layout, target, layout.pieces(name, target)):
                return f"Layer '{name}' is not stored in tensors of its own in this model's checkpoints."
        return None

    def encodes(self, state: LayerState) -> bool:
        return state.grid is not None or _is_pruned(state) or _nonzeros(state) is not None

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid, weight = state.grid, state.weight.cpu().contiguous()
        bits = affine = group_size = 0
        scales = []
        if isinstance(grid, UniformGrid):
            bits, affine, group_size = grid.bits, int(not grid.symmetric), grid.unit
            codes = grid.quantize(state.weight)
            scales.append(_bytes(grid.scale))
            if grid.zero_point is None:
                codes = codes + 2 ** (bits - 1)
            else:
                scales.append(_bytes(grid.zero_point.to(torch.uint8)))
            values = codes.to(torch.uint8).cpu().numpy()
        else:
            values = weight.view(_integer(weight.dtype)).numpy()
        mask, n, m, stored = _mask(state)
        survivors = values.ravel() if stored is None else values[stored]
        precision, (rows, inputs) = _DTYPES.index(weight.dtype), weight.shape
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
        if set(tensors) != set(self.tensors):
            raise ArtifactError(
                f"a sparse layer has the tensor 'weight' alone, got {', '.join(sorted(tensors))}"
            )
        parts = _Parts.of(tensors["weight"])
        pruned = None
        if parts.header.mask in (_SURVIVORS, _INDEX):
            pruned = torch.empty(parts.header.rows, parts.header.inputs, dtype=torch.bool)
        return LayerState(parts.decode(pruned), pruned=pruned, grid=parts.grid)

    def quantization_config(self, layout: Layout, layers: Layers) -> dict[str, Any] | None:
        return {"quant_method": self.name}

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {}  # every layer describes itself


def decode_weight(payload: Tensor) -> Tensor:
    """The weight (out, in) that the bytes of a layer stand for.

    Args:
        payload: (bytes,) uint8, on the CPU.

    Raises:
        ArtifactError: If they do not fit together.
    """
    return _Parts.of(payload).decode()


def _stored_alone(layout: Layout, target: Target, pieces: tuple[Piece, ...]) -> bool:
    """Whether the tensors that a layer is stored in hold rows of its matrix and nothing else."""
    one = len(pieces) == 1 and pieces[0].key not in layout.converted
    if target.kind == "conv2d":
        alone = one and target.rows is None
    elif target.transposed:  # after loading it is the module, a Conv1D, that says so
        alone = one and target.kind == "conv1d"
    else:
        alone = len(pieces) > 0 and all(piece.whole for piece in pieces)
    return alone and all(piece.key.endswith(".weight") for piece in pieces)


@dataclass(frozen=True)
class _Parts:
    """The bytes of a layer taken apart; `mask` and `weights` (bytes,) are still packed, and as long as they must be."""

    header: _Header
    grid: UniformGrid | None
    mask: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, payload: Tensor) -> _Parts:
        """Check all that can be checked before anything is made that is larger than the bytes are.

        Raises:
            ArtifactError: If they do not fit together.
        """
        if payload.dtype != torch.uint8 or payload.ndim != 1 or len(payload) < _STRUCT.size:
            raise ArtifactError(
                f"a sparse layer is one dimension of at least {_STRUCT.size} uint8, got {payload.dtype} "
                f"{tuple(payload.shape)}"
            )
        data = payload.numpy()
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
                f"a layer of {header.rows} x {header.inputs} that stores {header.stored} weights has {expected} bytes, "
                f"got {len(data)}"
            )
        if header.mask == _NONE:
            kept = header.weights
        elif header.mask == _INDEX:
            kept = header.weights // header.m * header.n
        else:
            parts = (mask[begin : begin + _CHUNK] for begin in range(0, len(mask), _CHUNK))
            kept = sum(int.from_bytes(part, "little").bit_count() for part in parts)
        if kept != header.stored:
            raise ArtifactError(f"its mask keeps {kept} weights, and {header.stored} are stored")
        for stream, used in (
            (mask, header.mask_bits),
            (weights, header.stored * header.weight_bits),
        ):
            if used % 8 and stream[-1] >> used % 8:
                raise ArtifactError("the bits after its last ones must be zero")
        return cls(header, _grid(header, scales, zeros) if header.bits else None, mask, weights)

    def decode(self, pruned: Tensor | None = None) -> Tensor:
        """The weight (out, in), a few rows at a time; `pruned` (out, in) bool is filled as well if it is given.

        Raises:
            ArtifactError: If an N:M index has a number that no mask has.
        """
        header = self.header
        weight = torch.empty(header.rows, header.inputs, dtype=header.dtype)
        step, first = max(1, _CHUNK // header.inputs), 0
        for row in range(0, header.rows, step):
            block = weight[row : row + step]
            mask = self._stored(row * header.inputs, block.numel())
            at = None if mask is None else np.flatnonzero(mask)
            count = block.numel() if at is None else len(at)
            if self.grid is None:
                self._place(block, at, first, count)
            else:
                self._dequantize(block, at, first, count, self.grid, slice(row, row + step))
            if pruned is not None and mask is not None:
                torch.logical_not(
                    torch.from_numpy(mask).view(block.shape), out=pruned[row : row + step]
                )
            first += count
        return weight

    def _stored(self, first: int, count: int) -> np.ndarray | None:
        """Which of these weights, row after row, are stored: (count,) bool; None if all are."""
        header = self.header
        if header.mask == _NONE:
            return None
        if header.mask != _INDEX:
            return _unpack(self.mask, 1, first, count).view(bool)
        n, m = header.n, header.m
        index = _unpack(self.mask, _index_bits(n, m), first // m, count // m)
        if index.max() >= math.comb(m, n):
            raise ArtifactError(
                f"there are {math.comb(m, n)} masks of {n}:{m}, got number {index.max()}"
            )
        # A table is faster, but no layer is to bring one along that is larger than itself.
        worth_it = math.comb(m, n) <= header.weights // m
        return (_table(n, m).take(index, axis=0) if worth_it else _masks(index, n, m)).ravel()

    def _place(self, block: Tensor, at: np.ndarray | None, first: int, count: int) -> None:
        """Put values into a block of rows, the rest of which is zero."""
        size = block.element_size()
        values = self.weights[first * size : (first + count) * size].copy()  # a copy is aligned
        block.view(_integer(block.dtype)).copy_(_spread(values.view(f"i{size}"), at, block))

    def _dequantize(
        self,
        block: Tensor,
        at: np.ndarray | None,
        first: int,
        count: int,
        grid: UniformGrid,
        rows: slice,
    ) -> None:
        """Put the values of codes into a block of rows, to the bit as the grid computes them."""
        codes = _unpack(self.weights, grid.bits, first, count)
        if grid.zero_point is None:
            steps = (codes - np.uint8(2 ** (grid.bits - 1))).view(np.int8)
        else:
            zeros = grid.zero_point[rows].repeat_interleave(grid.unit, dim=1).numpy().ravel()
            steps = codes - (zeros if at is None else zeros[at])
        groups = block.view(len(block), -1, grid.unit)
        groups.copy_(_spread(steps, at, groups))
        groups.mul_(grid.scale[rows, :, None])


def _spread(values: np.ndarray, at: np.ndarray | None, like: Tensor) -> Tensor:
    """Values at their places among zeros, in the shape of another tensor."""
    spread = values
    if at is not None:
        spread = np.zeros(like.numel(), values.dtype)
        spread[at] = values
    return torch.from_numpy(spread).view(like.shape)


def _grid(header: _Header, scales: np.ndarray, zeros: np.ndarray) -> UniformGrid:
    """The grid of a quantised layer.

    Raises:
        ArtifactError: If a scale or zero point is none.
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


def _mask(state: LayerState) -> tuple[int, int, int, np.ndarray | None]:
    """The shortest mask a layer can have: its kind, its N and M, and which weights are stored (out, in) bool."""
    if _is_pruned(state):
        stored = state.mask.logical_not().cpu().numpy()
        n, m = _pattern(stored)
        return _INDEX if m else _SURVIVORS, n, m, stored
    stored = _nonzeros(state)
    return _NONE if stored is None else _NONZEROS, 0, 0, stored


def _is_pruned(state: LayerState) -> bool:
    return state.pruned is not None and bool(state.pruned.any())


def _nonzeros(state: LayerState) -> np.ndarray | None:
    """Which weights are not zero (out, in) bool, if leaving the others out makes up for saying so."""
    values = (
        state.weight.contiguous().view(_integer(state.weight.dtype))
        if state.grid is None
        else state.weight
    )
    zero = values == 0  # as a value, -0.0 is not
    return zero.logical_not().cpu().numpy() if int(zero.sum()) * state.bits > zero.numel() else None


def _pattern(mask: np.ndarray) -> tuple[int, int]:
    """The N and M with the shortest index among those a mask (out, in) keeps to; 0 and 0 if a bitmask is no longer."""
    best, shortest = (0, 0), _bytes_for(mask.size)
    for m in range(2, _LARGEST_M + 1):
        if mask.shape[1] % m:
            continue
        n = int(np.count_nonzero(mask[0, :m]))
        if not 0 < n < m or math.comb(m, n) > _MOST_MASKS:
            continue
        length = _bytes_for(mask.size // m * _index_bits(n, m))
        if length < shortest and all((row.reshape(-1, m).sum(1) == n).all() for row in mask):
            best, shortest = (n, m), length
    return best


def _pack_mask(header: _Header, stored: np.ndarray | None) -> np.ndarray:
    if stored is None:
        return np.empty(0, np.uint8)
    if header.mask != _INDEX:
        return np.packbits(stored, bitorder="little")
    return _pack(_numbers(stored.reshape(-1, header.m)), _index_bits(header.n, header.m))


def _numbers(masks: np.ndarray) -> np.ndarray:
    """Which of all N:M masks each of these (count, M) bool is, in the order of `_masks`: (count,) int64."""
    count, m = masks.shape
    numbers, seen = np.zeros(count, np.int64), np.zeros(count, np.intp)
    for bit in range(m):
        seen += masks[:, bit]
        numbers += np.where(masks[:, bit], _CHOOSE[bit, seen], 0)
    return numbers


def _masks(numbers: np.ndarray, n: int, m: int) -> np.ndarray:
    """The N:M masks with these numbers (count,), as (count, M) bool.

    They are numbered in ascending order of the integers whose bits they are, the first input's the lowest: so before
    one whose k-th survivor is input j lie those C(j, k) whose first k survivors are all before j.
    """
    masks = np.empty((len(numbers), m), bool)
    rest, left = numbers.astype(np.int64), np.full(len(numbers), n)
    for bit in reversed(range(m)):
        before = _CHOOSE[bit, left]
        has = np.greater_equal(rest, before, out=masks[:, bit])
        rest -= before * has
        left -= has
    return masks


@functools.lru_cache(maxsize=4)
def _table(n: int, m: int) -> np.ndarray:
    """All masks of N:M, (C(M, N), M) bool."""
    return _masks(np.arange(math.comb(m, n)), n, m)


_CHOOSE = np.array([[math.comb(m, n) for n in range(_LARGEST_M + 1)] for m in range(_LARGEST_M)])
"""C(m, n): the binomial coefficients, all below 2^63."""


def _index_bits(n: int, m: int) -> int:
    return (math.comb(m, n) - 1).bit_length()


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers (count,) below 2^bits as a stream of bits: (bytes,) uint8."""
    lanes = np.zeros((-(-len(values) // 8), 8), np.uint32)  # eight numbers fill `bits` bytes
    lanes.reshape(-1)[: len(values)] = values
    packed = np.zeros((len(lanes), bits), np.uint8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        for more in range(_bytes_for(shift + bits)):
            packed[:, byte + more] |= (lanes[:, lane] << shift >> 8 * more).astype(np.uint8)
    return packed.reshape(-1)[: _bytes_for(len(values) * bits)]


def _unpack(packed: np.ndarray, bits: int, first: int, count: int) -> np.ndarray:
    """Numbers `first` to `first + count` of a stream of bits: (count,) uint8, or uint16 if they have more bits."""
    skip = first % 8
    lanes = -(-(skip + count) // 8)
    packed = packed[first // 8 * bits :][: lanes * bits]
    if bits == 1:
        return np.unpackbits(packed, bitorder="little")[skip : skip + count]
    missing = np.zeros(lanes * bits - len(packed), np.uint8)
    packed = np.concatenate([packed, missing]).reshape(lanes, bits)
    dtype, wide = (np.uint8, np.uint16) if bits <= 8 else (np.uint16, np.uint32)
    planes = packed.T.astype(wide, order="C")
    values = np.empty((lanes, 8), dtype)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        number = planes[byte] >> shift
        for more in range(1, _bytes_for(shift + bits)):
            number |= planes[byte + more] << (8 * more - shift)
        values[:, lane] = number & (2**bits - 1)
    return values.reshape(-1)[skip : skip + count]


def _bytes_for(bits: int) -> int:
    return -(-bits // 8)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().ravel()


def _integer(dtype: torch.dtype) -> torch.dtype:
    """The integers of that size: numpy has no bfloat16, and their bits are all that matters."""
    return torch.int32 if dtype.itemsize == 4 else torch.int16
