"""`coded`: the codes of quantized layers in about as many bytes as their entropy.

The bytes of a layer, see `layer_bytes`, are, one after the other:

    header    28 bytes, see `_Header`
    scales    the bits of the scales as integers, row after row, coded by `encode_numbers`
    offsets   the zero points of an affine grid, or the column exponents of a dual-scale grid, one
              byte each, coded likewise
    mask      at most 1 bit for each zero weight, 1 where it was pruned; see below
    codes     (out, in), coded by `entropy_coder.encode`

Codes of an affine grid are counted from the zero point, modulo 256, so that zero is zero in every
layer. If all zero weights were pruned, the header says so. If some were, a pruned weight has a code
that no other weight has, the *mark*; only if all 256 codes occur there are bits in its place.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats.base import Size
from optimum_order.formats.entropy_coder import (
    MOST_NUMBERS,
    CodedMatrix,
    decode_numbers,
    encode,
    encode_numbers,
    most_bytes,
)
from optimum_order.formats.layer_bytes import DTYPES, MOST_INPUTS, LayerBytes, checked_bytes
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState, integers
from optimum_order.models.units import Target

_Grid = UniformGrid | DualScaleGrid
_Bytes = NDArray[np.uint8]

_SYMMETRIC, _AFFINE, _DUAL = range(3)
"""Kinds of grid."""
_NONE, _ZEROS, _MARK, _BITS = range(4)
"""Kinds of mask: none; every zero weight was pruned; pruned weights have the mark; bits."""


class _Header(NamedTuple):
    """What the bytes after it are.

    Args:
        version: 1.
        precision: Of the weight: 0 for float32, 1 for bfloat16, 2 for float16.
        bits: Of a code, 2 to 8.
        grid: Kind of grid, see above.
        mask: Kind of mask, see above.
        mark: The code of pruned weights, if they have one, otherwise 0.
        reserved: 0.
        group_size: Inputs that share a scale.
        scales: Bytes of the scales.
        offsets: Bytes of zero points or exponents.
        masks: Bytes of the mask.
        checksum: CRC-32 of all bytes before the codes, where this field is 0.
    """

    version: int
    precision: int
    bits: int
    grid: int
    mask: int
    mark: int
    reserved: int
    group_size: int
    scales: int
    offsets: int
    masks: int
    checksum: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def check(self) -> None:
        """Raise ArtifactError unless `encode` could have written this header."""
        if self.version != 1:
            raise ArtifactError(
                f"it is stored in version {self.version} of this format; 1 can be read, upgrade"
            )
        if not (
            self.precision < len(DTYPES)
            and 2 <= self.bits <= 8
            and self.grid <= _DUAL
            and self.mask <= _BITS
            and (self.mark != 0) == (self.mask == _MARK)
            and self.reserved == 0
            and self.group_size > 0
            and (self.offsets > 0) == (self.grid != _SYMMETRIC)
            and (self.masks > 0) == (self.mask == _BITS)
        ):
            raise ArtifactError(f"no layer has the header {self._asdict()}")


_STRUCT = struct.Struct("<5BbH5I")


class Coded(LayerBytes):
    """Entropy-coded codes."""

    name = "coded"
    zeros_are_cheap = True
    summary = "entropy-coded codes of 2-8 bits; read by transformers after 'import optimum_order'"
    nothing = "No layer is quantized."
    made_for = (DualScaleGrid,)
    codes_rates = True

    def why_not(self, target: Target, state: LayerState) -> str | None:
        grid = state.grid
        if grid is not None and not isinstance(grid, (UniformGrid, DualScaleGrid)):
            return f"its {type(grid).__name__} is not a grid of equal steps"
        if grid is not None and grid.scale.numel() > MOST_NUMBERS:
            return f"it has {grid.scale.numel()} scales, and may have {MOST_NUMBERS} at most"
        return super().why_not(target, state)

    def size(self, state: LayerState) -> Size:
        grid = _grid_of(state)
        # One code more, the mark, is less than half a bit more where codes have 2 bits.
        bits = grid.bits + (0.5 if state.pruned is not None else 0)
        mask = state.weight.numel() // 8 + 1 if grid.bits == 8 and state.pruned is not None else 0
        numbers = [grid.scale, *([] if (offsets := _offsets(grid)) is None else [offsets])]
        stored = sum(_most_number_bytes(tensor) for tensor in numbers)
        rows, inputs = state.weight.shape
        most = _STRUCT.size + stored + mask + most_bytes(rows, inputs, bits)
        return Size(most, exact=False)

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = _grid_of(state)
        offsets = _offsets(grid)
        codes = grid.quantize(state.weight)
        kind = _SYMMETRIC
        if isinstance(grid, DualScaleGrid):
            kind = _DUAL
        elif grid.zero_point is not None:
            kind = _AFFINE
            codes = codes - grid.zero_point.repeat_interleave(grid.unit, dim=1)
        codes = codes.to(torch.uint8).view(torch.int8)  # modulo 256
        mask, mark, masks = _mask(codes, state.pruned)
        if state.pruned is not None and mark:
            codes = codes.masked_fill(state.pruned, mark)
        parts = [
            encode_numbers(_unsigned(grid.scale)),
            b"" if offsets is None else encode_numbers(offsets.cpu().numpy().ravel()),
            masks,
        ]
        precision = DTYPES.index(state.weight.dtype)
        scales, middle, last = map(len, parts)
        header = _Header(
            1, precision, grid.bits, kind, mask, mark, 0, grid.unit, scales, middle, last, 0
        )
        start = _STRUCT.pack(*header) + b"".join(parts)
        header = header._replace(checksum=zlib.crc32(start))
        start = _STRUCT.pack(*header) + start[_STRUCT.size :]
        data = np.concatenate([np.frombuffer(start, np.uint8), encode(codes, mark)])
        return {"weight": torch.from_numpy(data)}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        parts = _Parts.of(self.payload(tensors))
        pruned = None
        if parts.header.mask != _NONE:
            pruned = torch.empty(parts.codes.rows, parts.codes.inputs, dtype=torch.bool)
        return LayerState(parts.decode(pruned), pruned=pruned, grid=parts.grid)


def decode_weight(payload: Tensor) -> Tensor:
    """Return the weight (out, in) that the bytes of a layer stand for.

    Args:
        payload: (bytes,) uint8, on the CPU.

    Raises:
        ArtifactError: If the bytes do not fit together.
    """
    return _Parts.of(payload).decode()


def _grid_of(state: LayerState) -> _Grid:
    """Return the grid of a layer that no `why_not` refuses."""
    if not isinstance(state.grid, (UniformGrid, DualScaleGrid)):
        raise FormatError(f"A grid of equal steps is needed, got {type(state.grid).__name__}.")
    return state.grid


def _offsets(grid: _Grid) -> Tensor | None:
    """Return zero points or exponents as int8, if there are any."""
    if isinstance(grid, DualScaleGrid):
        return grid.exponent
    return None if grid.zero_point is None else grid.zero_point.to(torch.uint8).view(torch.int8)


def _unsigned(scale: Tensor) -> NDArray[Any]:
    """Return the bits of scales as integers, row after row."""
    bits = integers(scale.cpu().contiguous()).numpy().ravel()
    return bits.view(f"u{bits.itemsize}")


def _most_number_bytes(numbers: Tensor) -> int:
    """Return more bytes than `encode_numbers` takes."""
    return numbers.nbytes + 64


def _mask(codes: Tensor, pruned: Tensor | None) -> tuple[int, int, bytes]:
    """Return how to store which weights were pruned.

    Args:
        codes: (out, in) int8.
        pruned: (out, in) bool, or None.

    Returns:
        The kind of mask, the mark or 0, and the bytes of a mask of bits.
    """
    if pruned is None or not pruned.any():
        return _NONE, 0, b""
    zero = codes == 0
    if torch.equal(zero, pruned):
        return _ZEROS, 0, b""
    # 0, 1, -1, 2, ..., 127, -127, -128: a small mark is packed as other small codes are
    marks = sorted(range(-128, 128), key=lambda code: (abs(code), -code))
    used = set(codes.unique().tolist()) | {0}
    unused = [mark for mark in marks if mark not in used]
    if unused:
        return _MARK, unused[0], b""
    return _BITS, 0, np.packbits(pruned[zero].cpu().numpy(), bitorder="little").tobytes()


# Decoding


@dataclass(frozen=True)
class _Parts:
    """The bytes of a layer taken apart.

    Args:
        header: What the other bytes are.
        grid: The grid.
        mask: (bytes,) of a mask of bits.
        codes: The codes, not yet decoded.
    """

    header: _Header
    grid: _Grid
    mask: _Bytes
    codes: CodedMatrix

    @classmethod
    def of(cls, payload: Tensor) -> _Parts:
        """Check all that can be checked before the codes are decoded.

        Raises:
            ArtifactError: If the bytes do not fit together.
        """
        data = checked_bytes(payload, Coded.name, _STRUCT.size)
        header = _Header._make(_STRUCT.unpack(data[: _STRUCT.size].tobytes()))
        header.check()
        sizes = (header.scales, header.offsets, header.masks)
        ends = list(accumulate(sizes, initial=_STRUCT.size))
        if len(data) <= ends[-1]:
            raise ArtifactError(f"a layer with this header has over {ends[-1]} bytes")
        blank = _STRUCT.pack(*header._replace(checksum=0))
        if zlib.crc32(data[_STRUCT.size : ends[-1]].data, zlib.crc32(blank)) != header.checksum:
            raise ArtifactError("the checksum of its scales is wrong")
        scales, offsets, mask = (data[slice(*pair)] for pair in pairwise(ends))
        codes = CodedMatrix.of(data[ends[-1] :])
        grid = _grid(header, scales.tobytes(), offsets.tobytes(), codes)
        return cls(header, grid, mask, codes)

    def decode(self, pruned: Tensor | None = None) -> Tensor:
        """Return the weight (out, in), decoded a band of rows at a time.

        Args:
            pruned: (out, in) bool to be filled with the mask, or None.

        Raises:
            ArtifactError: If a code is out of range, or the mask does not fit the codes.
        """
        weight = torch.empty(self.codes.rows, self.codes.inputs, dtype=self.header.dtype)
        for rows, codes in self.codes.decoded():
            if self.header.mask == _MARK:
                marked = codes == self.header.mark
                codes[marked] = 0
                if pruned is not None:
                    pruned[rows] = torch.from_numpy(marked)
            self._dequantize(weight[rows], torch.from_numpy(codes), rows)
        if pruned is not None and self.header.mask in (_ZEROS, _BITS):
            torch.eq(weight, 0, out=pruned)
        if pruned is not None and self.header.mask == _BITS:
            pruned[pruned.clone()] = torch.from_numpy(self._bits(int(pruned.sum())))
        return weight

    def _bits(self, zeros: int) -> NDArray[np.bool_]:
        """Return the mask of zero weights, (zeros,).

        Raises:
            ArtifactError: If there are more bits or fewer.
        """
        bits = np.unpackbits(self.mask, bitorder="little")
        if -(-zeros // 8) != len(self.mask) or bits[zeros:].any():
            raise ArtifactError(f"its mask must have {zeros} bits, one for each zero weight")
        return bits[:zeros].view(bool)

    def _dequantize(self, block: Tensor, codes: Tensor, rows: slice) -> None:
        """Put the values of codes into rows of a weight, to the bit as the grid computes them.

        Args:
            block: (rows, in) to be filled.
            codes: (rows, in) int8.
            rows: The rows of the layer that the block is.
        """
        grid = self.grid
        groups = block.view(len(block), -1, grid.unit)
        steps = codes.view(groups.shape)
        if isinstance(grid, UniformGrid) and grid.zero_point is not None:
            zero = grid.zero_point[rows, :, None]
            unsigned = (steps + zero).bitwise_and_(255)
            self._check(int(unsigned.max()) < 2**grid.bits)
            steps = unsigned.sub_(zero)
        else:
            half = 2 ** (grid.bits - 1)
            low, high = codes.aminmax()
            self._check(-half <= int(low) and int(high) < half)
        groups.copy_(steps).mul_(grid.scale[rows, :, None])
        if isinstance(grid, DualScaleGrid):
            # no digit changes; float16 does not hold every power
            power = torch.ldexp(torch.ones(grid.unit), grid.exponent.int())
            if block.dtype == torch.float16:
                block.copy_(block.float().mul_(power))
            else:
                block.mul_(power.to(block.dtype))

    def _check(self, fits: bool) -> None:
        """Raise ArtifactError unless codes fit the grid."""
        if not fits:
            raise ArtifactError(f"a code of {self.header.bits} bits is out of range")


def _grid(header: _Header, scales: bytes, offsets: bytes, codes: CodedMatrix) -> _Grid:
    """Return the grid of a layer.

    Args:
        header: Of the layer.
        scales: The bytes of its scales.
        offsets: The bytes of its zero points or exponents.
        codes: Its codes.

    Raises:
        ArtifactError: If there is no such grid.
    """
    rows, inputs = codes.rows, codes.inputs
    dual = header.grid == _DUAL
    if (
        inputs > MOST_INPUTS
        or inputs % header.group_size
        or (dual and header.group_size != inputs)
        or rows * (inputs // header.group_size) > MOST_NUMBERS
    ):
        raise ArtifactError(f"no layer of {rows} x {inputs} has groups of {header.group_size}")
    groups = inputs // header.group_size
    size = header.dtype.itemsize
    numbers = decode_numbers(scales, f"u{8 * size}", rows * groups)
    scale = torch.from_numpy(numbers.view(f"i{size}")).view(header.dtype).view(rows, groups)
    if not ((scale > 0) & torch.isfinite(scale)).all():
        raise ArtifactError("scales must be finite and positive")
    if dual:
        exponent = torch.from_numpy(decode_numbers(offsets, "i8", inputs))
        grid = DualScaleGrid(header.bits, scale, exponent)
        try:
            grid.check()
        except ValueError as error:
            raise ArtifactError(f"its grid is none: {error}") from error
        return grid
    zero = None
    if header.grid == _AFFINE:
        unsigned = decode_numbers(offsets, "i8", rows * groups).view(np.uint8)
        zero = torch.from_numpy(unsigned).view(rows, groups).short()
        if zero.max() >= 2**header.bits:
            raise ArtifactError(
                f"zero points of {header.bits} bits must be below {2**header.bits}, got "
                f"{zero.max()}"
            )
    return UniformGrid(header.bits, scale, zero, inputs)
