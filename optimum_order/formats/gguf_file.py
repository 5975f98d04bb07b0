"""Reading a GGUF file that nobody has checked: every length is held against the file's own size.

    magic, version, number of tensors, number of fields
    fields     key, kind of value, value; decoded when they are asked for, but for texts
    tensors    name, dimensions (the last first), type, offset
    data       from the next multiple of the alignment

The reader of the package `gguf` believes all of these.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats import gguf_superblocks
from optimum_order.formats.gguf_blocks import BY_NUMBER, BlockType
from optimum_order.formats.gguf_superblocks import SuperblockLayout

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""What `struct` calls the kinds of numbers and truth values."""
_U32, _TEXT, _LIST = 4, 8, 9
_MOST_TEXTS = 2**22
"""More than any vocabulary or list of merges has."""
_LONGEST_TEXT = 2**20
"""Bytes of a text; chat templates, the longest of them, have a few ten thousand."""
_MOST_TENSORS = 2**20
_MOST_DIMENSIONS = 4
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of tensors that are stored as they are."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Args:
        shape: In the order of torch.
        kind: Its dtype, or the type of its blocks.
        start: Its first byte in the file.
        bytes: Its size.
    """

    shape: tuple[int, ...]
    kind: torch.dtype | BlockType | SuperblockLayout
    start: int
    bytes: int


@dataclass(frozen=True)
class Field:
    """One field of a header.

    Args:
        value: A number, truth value, text, or list of these.
        kind: Number of its kind, as files have it.
        inner: Number of the kind of what a list holds; None if it is no list.
    """

    value: Any
    kind: int
    inner: int | None = None


class GGUFFile:
    """The header of a GGUF file, and its tensors one at a time.

    Args:
        path: The file.

    Attributes:
        texts: The fields that are text.
        tensors: The tensors by name.

    Raises:
        ArtifactError: If the file cannot be read, or its parts do not fit together.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._data: NDArray[Any] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise ArtifactError(f"'{path}' cannot be read: {error}.") from error
        self._at = 0
        self.texts: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            self._read()
        except struct.error as error:
            raise self._wrong("it ends before its header does") from error

    def _wrong(self, reason: str) -> ArtifactError:
        return ArtifactError(f"'{self._path}' is no sound GGUF file: {reason}.")

    def _read(self) -> None:
        magic, version, tensors, fields = self._unpack("<4sIQQ")
        if magic != _MAGIC or version != _VERSION:
            raise self._wrong(f"it begins with {magic!r}, version {version}")
        if tensors > _MOST_TENSORS:
            raise self._wrong(f"it says that it holds {tensors} tensors")
        self._texts_left = _MOST_TEXTS
        for _ in range(fields):
            self._field()
        entries = [self._entry() for _ in range(tensors)]
        start = -(-self._at // _ALIGNMENT) * _ALIGNMENT
        end = 0
        for name, shape, number, offset in sorted(entries, key=lambda entry: entry[3]):
            stored = self._stored(name, shape, number, start + offset)
            # tensors that overlap could make much out of a small file
            if name in self.tensors or offset < end or offset % _ALIGNMENT:
                raise self._wrong(f"tensor {name!r} is listed twice, or lies in another")
            end = offset + stored.bytes
            self.tensors[name] = stored

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data.data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise self._wrong("it ends before its header does")
        self._at += count

    def _skip_text(self) -> int:
        """Skip a text, and return how many bytes it has."""
        self._texts_left -= 1
        if self._texts_left < 0:
            raise self._wrong(f"it has more than {_MOST_TEXTS} texts")
        (count,) = self._unpack("<Q")
        if count > _LONGEST_TEXT:
            raise self._wrong(f"it says that it holds a text of {count} bytes")
        self._skip(count)
        return int(count)

    def _text(self) -> str:
        count = self._skip_text()
        try:
            return self._data[self._at - count : self._at].tobytes().decode()
        except UnicodeDecodeError as error:
            raise self._wrong("a text is no UTF-8") from error

    def _field(self) -> None:
        key = self._text()
        if key in self._places:
            raise self._wrong(f"the field {key!r} is listed twice")
        self._places[key] = self._at
        (kind,) = self._unpack("<I")
        if key == "general.alignment":
            if (kind, *self._unpack("<I")) != (_U32, _ALIGNMENT):
                raise self._wrong(f"its alignment is not {_ALIGNMENT}")
        elif kind == _TEXT:
            self.texts[key] = self._text()
        elif kind == _LIST:
            inner, count = self._unpack("<IQ")
            if inner == _TEXT:
                for _ in range(count):
                    self._skip_text()
            else:
                self._skip(count * self._width(inner))
        else:
            self._skip(self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in _NUMBERS:
            raise self._wrong(f"a field has the unknown kind {kind}")
        return struct.calcsize(f"<{_NUMBERS[kind]}")

    def fields(self) -> dict[str, Field]:
        """Return all fields by key.

        Raises:
            ArtifactError: If a text is no UTF-8.
        """
        self._texts_left = _MOST_TEXTS
        return {key: self._value(place) for key, place in self._places.items()}

    def _value(self, place: int) -> Field:
        """Return the field whose kind is at a place, which was walked over before."""
        self._at = place
        (kind,) = self._unpack("<I")
        if kind == _TEXT:
            return Field(self._text(), kind)
        if kind != _LIST:
            return Field(self._unpack(f"<{_NUMBERS[kind]}")[0], kind)
        inner, count = self._unpack("<IQ")
        if inner == _TEXT:
            return Field([self._text() for _ in range(count)], kind, inner)
        return Field(list(self._unpack(f"<{count}{_NUMBERS[inner]}")), kind, inner)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")[::-1]
        number, offset = self._unpack("<IQ")
        return name, shape, number, offset

    def _stored(self, name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
        kind = PLAIN.get(number) or BY_NUMBER.get(number) or gguf_superblocks.BY_NUMBER.get(number)
        if kind is None:
            raise self._wrong(
                f"tensor {name!r} has the type {number}, which is none that we write: F32, F16, "
                "BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and Q2_K to Q6_K"
            )
        count = math.prod(shape)
        if isinstance(kind, torch.dtype):
            size = count * kind.itemsize
        else:
            if shape[-1] % kind.weights:
                raise self._wrong(f"tensor {name!r} has rows of {shape[-1]}, no whole blocks")
            size = count // kind.weights * kind.bytes
        if not count or start + size > len(self._data):
            raise self._wrong(f"tensor {name!r} {list(shape)} is not all there")
        return Stored(shape, kind, start, size)

    def bytes_of(self, name: str) -> tuple[Stored, Tensor]:
        """Return a tensor as it is stored.

        Args:
            name: Its name.

        Returns:
            What it is; and its rows, (all dimensions but the last, bytes of a row) uint8.

        Raises:
            ArtifactError: If there is no such tensor.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise ArtifactError(f"there is no tensor {name!r}")
        data = self._data[stored.start : stored.start + stored.bytes]
        rows = math.prod(stored.shape[:-1])
        return stored, torch.from_numpy(np.array(data)).view(rows, -1)

    def values(self, name: str) -> Tensor:
        """Return a tensor of plain values.

        Args:
            name: Its name.

        Raises:
            ArtifactError: If there is no such tensor, or it has codes.
        """
        stored, data = self.bytes_of(name)
        if not isinstance(stored.kind, torch.dtype):
            raise ArtifactError(f"tensor {name!r} is quantized")
        return data.view(stored.kind).view(stored.shape)
