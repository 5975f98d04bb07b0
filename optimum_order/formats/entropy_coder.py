"""A lossless coder of integer matrices, which takes about as many bytes as their entropy.

The codes of a layer vary in size from row to row and from column to column. So every row and every
column has a *class*, its root mean square in steps of a third of a factor of two, and each code is
coded with the table of its *context*, which is the sum of both classes. Neighboring contexts share
a table where a table of their own would take more than it saves. A table and its codes are coded by
pcodec, with tANS.

A matrix is coded in sections of whole rows, one after the other, and each section is:

    header    24 bytes, see `_Header`
    starts    for each table the first context that it is for, uint8
    limits    for each table the largest absolute code if codes are packed, otherwise 0, uint8
    lengths   for each table the bytes that pcodec takes to describe it, uint16; then the bytes of
              the classes, of rows and of columns, 2 x uint32
    bands     for each band its bytes and their CRC-32, 2 x uint32
    tables    header of pcodec, 2 bytes; its description of each table
    classes   of rows, then of columns, see `encode_numbers`
    bands     see below
    padding   zeros, up to one byte for every 64 codes

A band is 2^19 codes or fewer, in whole rows, and can be decoded alone: for each table uint32, the
bytes of its page, then the pages. Rows are sorted by class within a band, columns within a section,
so that the codes of one table lie in rectangles; a page holds these row by row, for each class of
rows in turn. If no code of a table exceeds 7, 2 codes are packed into one number to be decoded
faster, or 4 if none exceeds 1.

Numbers are little-endian. Nothing is made larger than 64 codes for each byte that is there.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor
from torch import Tensor

from optimum_order.errors import ArtifactError

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]
_Classes = NDArray[np.uint8]
_Integers = NDArray[np.int64]

_VERSION = 1
MOST_NUMBERS = 2**24
"""Numbers under one table: pcodec takes no more."""
_SECTION = MOST_NUMBERS
"""Codes of a section."""
_BAND = 2**19
"""Codes of a band: enough that its pages need not be counted, few enough for many cores."""
_CODES_PER_BYTE = 64
"""Most codes for each byte of a section."""
_STEPS = 3
"""Classes for each factor of two."""
_CLASSES = 40
_LEAST = -5
"""Binary logarithm of the root mean square of class 0."""
_MOST_TABLES = 32
_WORTH_PACKING = 2**15
"""Codes under one table from which on speed counts for more than the bytes of a larger table."""
_TABLE_BITS = 60.0
_SYMBOL_BITS = 15.0
"""What one more table takes, and one more code in it."""
_PAGE_BITS = 120.0
"""What one more page takes: its length, four states of tANS, and what is left of its last byte."""
_TANS = 1.0012
"""Bits of tANS for each bit of entropy."""
_LEVEL = 12


class _Header(NamedTuple):
    """What the bytes after it are.

    Args:
        version: 1.
        tables: Number of tables, 1 to 32.
        reserved: 0.
        rows, inputs: Shape of the section.
        length: Bytes of the whole section.
        padding: Zeros at its end.
        checksum: CRC-32 of all bytes before the bands, where this field is 0.
    """

    version: int
    tables: int
    reserved: int
    rows: int
    inputs: int
    length: int
    padding: int
    checksum: int

    @property
    def band_rows(self) -> int:
        return _rows_of(_BAND, self.inputs)

    @property
    def bands(self) -> int:
        return -(-self.rows // self.band_rows)

    @property
    def lists(self) -> int:
        """Bytes of the lists after the header."""
        return 4 * self.tables + 8 + 8 * self.bands

    def check(self, available: int) -> None:
        """Raise ArtifactError unless `encode` could have written this header.

        Args:
            available: Bytes from the header on.
        """
        if self.version != _VERSION:
            raise ArtifactError(
                f"its codes are stored in version {self.version} of their coder; {_VERSION} can be "
                "read, upgrade"
            )
        codes = self.rows * self.inputs
        if not (
            0 < self.tables <= _MOST_TABLES
            and self.reserved == 0
            and 0 < codes <= max(_SECTION, self.inputs)
            and self.padding < self.length
            and codes <= self.length * _CODES_PER_BYTE
            and _STRUCT.size + self.lists + _PCODEC <= self.length - self.padding
        ):
            raise ArtifactError(f"no codes have the header {self._asdict()}")
        if self.length > available:
            raise ArtifactError(f"its codes take {self.length} bytes, and {available} are there")


_STRUCT = struct.Struct("<BBHIIIII")
_PCODEC = 2
"""Bytes of the header of pcodec."""


def encode(codes: Tensor, mark: int = 0) -> Bytes:
    """Return the bytes that stand for a matrix of codes.

    Args:
        codes: (out, in), integers from -128 to 127, at least one.
        mark: A code that stands for no size; rows and columns are classified as if it were zero.

    Returns:
        (bytes,) uint8.
    """
    return np.concatenate([_Encoder(part, mark).encoded() for part in _sections(codes)])


def estimate(codes: Tensor) -> float:
    """Return how many bits `encode` takes, without coding anything.

    Args:
        codes: (out, in), integers from -128 to 127, at least one.
    """
    return sum(_Encoder(part).estimated_bits() for part in _sections(codes))


def most_bytes(rows: int, inputs: int, bits: float) -> int:
    """Return more bytes than `encode` takes for any codes of this width.

    Args:
        rows: Outputs.
        inputs: Inputs.
        bits: Binary logarithm of the number of codes.
    """
    # A second table is there only if it is expected to make up for itself, so that all take what
    # one would; what pcodec takes for a table, a page and its codes differs from that a little.
    sections = -(-rows // _rows_of(_SECTION, inputs))
    bands = sections + -(-rows // _rows_of(_BAND, inputs))
    codes = max(bits * 1.02 / 8, 1 / _CODES_PER_BYTE) * rows * inputs
    table = 3 * min(2**bits, rows * inputs)
    return int(codes + rows + (inputs + table + 160) * sections) + 64 * bands


def decode(data: Bytes) -> Codes:
    """Return the codes, (out, in) int8, decoded by as many threads as torch has.

    Args:
        data: (bytes,) from `encode`.

    Raises:
        ArtifactError: If the bytes do not fit together.
    """
    coded = CodedMatrix.of(data)
    codes = np.empty((coded.rows, coded.inputs), np.int8)
    for rows, band in coded.decoded():
        codes[rows] = band
    return codes


class CodedMatrix:
    """The bytes of a matrix of codes, checked; its bands can be decoded one by one.

    Attributes:
        rows: Outputs.
        inputs: Inputs.
        bands: The rows of each band, first to last.
    """

    def __init__(self, sections: list[_Section]):
        self._bands: list[tuple[_Section, int]] = []
        self.bands: list[slice] = []
        self.inputs = sections[0].header.inputs
        self.rows = 0
        for section in sections:
            for number, rows in enumerate(section.bands):
                self._bands.append((section, number))
                self.bands.append(slice(self.rows + rows.start, self.rows + rows.stop))
            self.rows += section.header.rows

    @classmethod
    def of(cls, data: Bytes) -> CodedMatrix:
        """Check every length and every checksum, before anything is made of the codes.

        Args:
            data: (bytes,) uint8 from a file that nobody has checked.

        Raises:
            ArtifactError: If the bytes do not fit together.
        """
        sections: list[_Section] = []
        at = 0
        while at < len(data) or not sections:
            section = _Section.of(data[at:])
            sections.append(section)
            at += section.header.length
        if len({section.header.inputs for section in sections}) > 1:
            raise ArtifactError("its codes are in sections of different widths")
        return cls(sections)

    def decode_band(self, number: int) -> Codes:
        """Return the codes of one band, (rows, in).

        Raises:
            ArtifactError: If they cannot be decoded.
        """
        section, band = self._bands[number]
        return section.decode(band)

    def decoded(self) -> Iterator[tuple[slice, Codes]]:
        """Decode all bands by as many threads as torch has.

        Yields:
            The rows of each band and its codes, first to last. Few are held at a time.

        Raises:
            ArtifactError: If one cannot be decoded.
        """
        threads = min(torch.get_num_threads(), len(self.bands))
        if threads < 2:
            for number, rows in enumerate(self.bands):
                yield rows, self.decode_band(number)
            return
        # The threads call nothing of torch, which would start as many threads in each of them.
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Codes]] = deque()
            ahead = iter(range(len(self.bands)))
            for rows in self.bands:
                for number in islice(ahead, threads + 1 - len(waiting)):
                    waiting.append(pool.submit(self.decode_band, number))
                yield rows, waiting.popleft().result()


def _sections(codes: Tensor) -> Iterator[Codes]:
    """Yield the codes of each section."""
    for part in codes.split(_rows_of(_SECTION, codes.shape[1])):
        yield part.to(torch.int8).cpu().contiguous().numpy()


def _rows_of(most: int, inputs: int) -> int:
    """Return the rows that this many codes make, at least one."""
    return max(1, most // inputs)


def _bands(rows: int, inputs: int) -> list[slice]:
    step = _rows_of(_BAND, inputs)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


# Contexts


@dataclass(frozen=True)
class _Rectangles:
    """Where the codes of each table lie in a matrix whose rows and columns are sorted by class.

    Args:
        rows: (rows,) class of each row of a band.
        edges: (classes, tables + 1), for a class of rows the first column of each table.
    """

    rows: _Classes
    edges: _Integers

    def __iter__(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield table, rows and columns of each rectangle, in the order in which they are coded."""
        ends = np.bincount(self.rows, minlength=_CLASSES).cumsum().tolist()
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            if begin == end:
                continue
            for table, (left, right) in enumerate(pairwise(self.edges[number].tolist())):
                if left < right:
                    yield table, slice(begin, end), slice(left, right)


def _edges(columns: _Classes, starts: _Integers) -> _Integers:
    """Return the first column of each table for each class of rows, see `_Rectangles`.

    Args:
        columns: (in,) class of each column, sorted.
        starts: (tables,) first context of each table.
    """
    first = starts[None] - np.arange(_CLASSES)[:, None]
    edges = np.searchsorted(columns, first.ravel()).reshape(first.shape)
    edges[:, 0] = 0
    return np.concatenate([edges, np.full((_CLASSES, 1), len(columns))], 1)


def _classes(squares: NDArray[np.float64]) -> _Classes:
    """Return the class of each mean square."""
    with np.errstate(divide="ignore"):
        steps = np.rint((np.log2(squares) / 2 - _LEAST) * _STEPS)
    classes: _Classes = steps.clip(0, _CLASSES - 1).astype(np.uint8)
    return classes


def _tables(counts: _Integers, bands: int) -> tuple[list[int], float]:
    """Return which contexts share a table, so that all takes the fewest bits.

    Args:
        counts: (contexts, 256), how often each code occurs in each context.
        bands: Number of bands.

    Returns:
        The first context of each table, and the bits that tables and codes take.
    """
    present = np.flatnonzero(counts.any(1))
    sums: _Integers = np.zeros((len(present) + 1, 256), np.int64)
    np.cumsum(counts[present], axis=0, out=sums[1:])
    sums = sums[:, sums[-1] > 0]
    best: NDArray[np.float64] = np.zeros(len(present) + 1)
    begin: _Integers = np.zeros(len(present) + 1, np.int64)
    for end in range(1, len(present) + 1):
        bits = best[:end] + _bits(sums[end] - sums[:end]) + bands * _PAGE_BITS
        begin[end] = bits.argmin()
        best[end] = bits.min()
    starts: list[int] = []
    end = len(present)
    while end:
        end = int(begin[end])
        starts.append(int(present[end]))
    starts[-1] = 0
    return starts[::-1], float(best[-1])


def _bits(counts: _Integers) -> NDArray[np.float64]:
    """Return the bits of tables and their codes, without what pages take.

    Args:
        counts: (tables, codes), how often each code occurs.
    """
    total = counts.sum(1)
    entropy = _log(total) - _log(counts).sum(1)
    bits: NDArray[np.float64] = (
        entropy * _TANS + np.count_nonzero(counts, axis=1) * _SYMBOL_BITS + _TABLE_BITS
    )
    return bits


def _log(counts: _Integers) -> NDArray[np.float64]:
    """Return n log2(n) for each count."""
    floats = counts.astype(np.float64)
    return floats * np.log2(np.maximum(floats, 1))


# Encoding


class _Encoder:
    """Codes one section.

    Args:
        codes: (rows, in) int8.
        mark: As in `encode`.
    """

    def __init__(self, codes: Codes, mark: int = 0):
        self._codes = codes
        self._bands = _bands(*codes.shape)
        rows = np.empty(len(codes))
        columns = np.zeros(codes.shape[1])
        for band in self._bands:
            squares = np.square(codes[band], dtype=np.float32)
            if mark:
                squares[codes[band] == mark] = 0.0
            rows[band] = squares.mean(1)
            columns += squares.sum(0)
        self._rows = _classes(rows)
        self._columns = _classes(columns / len(codes))
        counts = self._counts()
        starts, bits = _tables(counts, len(self._bands))
        bits += self._classes_bits()
        alone = _bits(counts.sum(0)[None])[0] + len(self._bands) * _PAGE_BITS
        if alone <= bits:  # then nobody needs to know the classes
            starts = [0]
            bits = alone
            self._rows[:] = 0
            self._columns[:] = 0
        self._starts = np.array(starts)
        self._bits = float(bits)
        self._limits, self._sizes = self._extent(counts)

    def _counts(self) -> _Integers:
        """Return how often each code, as a byte, occurs in each context, (contexts, 256)."""
        contexts = 2 * _CLASSES - 1
        counts = np.zeros(contexts * 256, np.int64)
        columns = self._columns.astype(np.uint16) << 8
        for band in self._bands:
            keys = (self._rows[band].astype(np.uint16) << 8)[:, None] + columns
            keys |= self._codes[band].view(np.uint8)
            counts += np.bincount(keys.ravel(), minlength=len(counts))
        return counts.reshape(contexts, 256)

    def _classes_bits(self) -> float:
        """Return about how many bits the classes take."""
        counts = [np.bincount(classes, minlength=256) for classes in (self._rows, self._columns)]
        return float(_bits(np.stack(counts)).sum())

    def _extent(self, counts: _Integers) -> tuple[list[int], list[int]]:
        """Return the largest absolute code of each table, and how many codes it has."""
        sums = np.add.reduceat(counts, self._starts, axis=0)
        sizes = np.abs(np.arange(256, dtype=np.uint8).view(np.int8).astype(int))
        limits = [int(sizes[row > 0].max()) for row in sums]
        return limits, sums.sum(1).tolist()

    def estimated_bits(self) -> float:
        """Return about how many bits `encoded` takes."""
        fixed = _STRUCT.size + 8 * len(self._bands) + 4 * len(self._starts) + 8 + 3 * _PCODEC + 4
        bits = self._bits + 8 * fixed
        return max(bits, 8 * -(-self._codes.size // _CODES_PER_BYTE))

    def encoded(self) -> Bytes:
        """Return the bytes of the section."""
        limits = [
            limit if limit <= _PACKABLE and size >= _WORTH_PACKING else 0
            for limit, size in zip(self._limits, self._sizes, strict=True)
        ]
        writer = FileCompressor()
        descriptions = []
        pages = []
        for limit, parts in zip(limits, self._streams(), strict=True):
            description, written = _compressed(writer, [_packed(part, limit) for part in parts])
            descriptions.append(description)
            pages.append(written)
        maps = [encode_numbers(classes.view(np.int8)) for classes in (self._rows, self._columns)]
        bands = []
        for number in range(len(self._bands)):
            mine = [written[number] for written in pages]
            bands.append(b"".join([_numbers("u4", map(len, mine)), *mine]))
        middle = b"".join(
            [
                _numbers("u1", self._starts),
                _numbers("u1", limits),
                _numbers("u2", map(len, descriptions)),
                _numbers("u4", map(len, maps)),
                _numbers("u4", (x for band in bands for x in (len(band), zlib.crc32(band)))),
                writer.write_header(),
                *descriptions,
                *maps,
            ]
        )
        return self._framed(middle, b"".join(bands))

    def _framed(self, middle: bytes, bands: bytes) -> Bytes:
        """Return all bytes, with header and padding."""
        rows, inputs = self._codes.shape
        length = _STRUCT.size + len(middle) + len(bands)
        padding = max(0, -(-self._codes.size // _CODES_PER_BYTE) - length)
        header = _Header(_VERSION, len(self._starts), 0, rows, inputs, length + padding, padding, 0)
        checksum = zlib.crc32(_STRUCT.pack(*header) + middle)
        header = header._replace(checksum=checksum)
        data = _STRUCT.pack(*header) + middle + bands + bytes(padding)
        return np.frombuffer(data, np.uint8)

    def _streams(self) -> list[list[Codes]]:
        """Return the codes of each table, for each band."""
        order = np.argsort(self._columns, kind="stable")
        edges = _edges(self._columns[order], self._starts)
        streams: list[list[Codes]] = [[] for _ in self._starts]
        for band in self._bands:
            rows = self._rows[band]
            sorted_ = self._codes[band][np.argsort(rows, kind="stable")].take(order, axis=1)
            parts: list[list[Codes]] = [[] for _ in self._starts]
            for table, down, across in _Rectangles(rows, edges):
                parts[table].append(sorted_[down, across].ravel())
            for stream, mine in zip(streams, parts, strict=True):
                stream.append(np.concatenate(mine) if mine else np.empty(0, np.int8))
        return streams


def _numbers(dtype: str, values: Any) -> bytes:
    return np.array(list(values), f"<{dtype}").tobytes()


def _compressed(writer: Any, parts: list[NDArray[Any]]) -> tuple[bytes, list[bytes]]:
    """Return pcodec's description of a table, and a page for each part; of nothing, nothing.

    Args:
        writer: pcodec's.
        parts: Numbers.
    """
    config = ChunkConfig(
        compression_level=_LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes([part.size for part in parts if part.size]),
        enable_8_bit=True,
    )
    chunk = writer.chunk_compressor(np.concatenate(parts), config)
    numbers = iter(range(len(parts)))
    pages = [chunk.write_page(next(numbers)) if part.size else b"" for part in parts]
    return chunk.write_meta(), pages


# Packing

_PACKABLE = 7
"""Largest absolute code that is packed: 15 x 15 pairs fit a byte."""


def _packs(limit: int) -> int:
    """Return how many codes are packed into one number.

    Args:
        limit: The largest absolute code, or 0 if they are not packed.
    """
    if limit == 0:
        return 1
    return 4 if limit == 1 else 2


def _packed(codes: Codes, limit: int) -> Codes:
    """Return packed codes, see `_unpacked`."""
    many = _packs(limit)
    if many == 1:
        return codes
    digits = np.zeros((-(-len(codes) // many), many), np.uint8)
    digits.reshape(-1)[: len(codes)] = codes + limit
    numbers: Bytes = digits[:, 0].copy()
    for digit in range(1, many):
        numbers *= 2 * limit + 1
        numbers += digits[:, digit]
    return numbers.view(np.int8)


@lru_cache(maxsize=_PACKABLE)
def _unpacking(limit: int) -> NDArray[Any]:
    """Return for every number its codes, as one integer of as many bytes, (numbers,)."""
    base = 2 * limit + 1
    many = _packs(limit)
    powers = base ** np.arange(many)[::-1]
    digits = np.arange(base**many)[:, None] // powers % base
    table: NDArray[Any] = (digits - limit).astype(np.int8).view(f"i{many}")[:, 0]
    return table


def _unpacked(numbers: Codes, limit: int, count: int) -> Codes:
    """Return the codes that were packed, as digits of a base of 2 * limit + 1, the highest first.

    Args:
        numbers: Each holds `_packs(limit)` codes.
        limit: The largest absolute code, or 0 if codes are not packed.
        count: How many codes.

    Raises:
        ArtifactError: If a number holds none.
    """
    if limit == 0:
        return numbers
    table = _unpacking(limit)
    unsigned = numbers.view(np.uint8)
    if unsigned.max() >= len(table):
        raise ArtifactError(f"packed codes must be below {len(table)}, got {unsigned.max()}")
    codes: Codes = table.take(unsigned).view(np.int8)[:count]
    return codes


# Decoding


@dataclass(frozen=True)
class _Section:
    """A section taken apart.

    Args:
        header: What the other bytes are.
        starts: (tables,) first context of each table.
        limits: Largest absolute code of each table that packs its codes, otherwise 0.
        pcodec: Header of pcodec.
        descriptions: pcodec's description of each table.
        rows: (rows,) class of each row.
        columns: (in,) class of each column.
        pages: The bytes of each band.
    """

    header: _Header
    starts: _Integers
    limits: list[int]
    pcodec: bytes
    descriptions: list[bytes]
    rows: _Classes
    columns: _Classes
    pages: list[Bytes]

    @classmethod
    def of(cls, data: Bytes) -> _Section:
        """Check all lengths and checksums of the section that some bytes begin with.

        Raises:
            ArtifactError: If they do not fit together.
        """
        if len(data) < _STRUCT.size:
            raise ArtifactError(f"its codes take {_STRUCT.size} bytes or more, got {len(data)}")
        header = _Header._make(_STRUCT.unpack(data[: _STRUCT.size].tobytes()))
        header.check(len(data))
        tables = header.tables
        content = data[: header.length - header.padding]
        lists = content[_STRUCT.size : _STRUCT.size + header.lists].tobytes()
        starts = np.frombuffer(lists, np.uint8, tables).astype(np.int64)
        limits = np.frombuffer(lists, np.uint8, tables, tables)
        lengths = np.frombuffer(lists, "<u2", tables, 2 * tables).tolist()
        lengths += np.frombuffer(lists, "<u4", 2, 4 * tables).tolist()
        directory = np.frombuffer(lists, "<u4", offset=4 * tables + 8).reshape(-1, 2)
        sizes, checksums = directory.astype(np.int64).T.tolist()
        begin = _STRUCT.size + header.lists
        after = begin + _PCODEC + sum(lengths)
        if len(content) != after + sum(sizes):
            raise ArtifactError(
                f"its codes take {after + sum(sizes)} bytes, {len(content)} are there"
            )
        if data[len(content) : header.length].any():
            raise ArtifactError("padding must be zero")
        blank = _STRUCT.pack(*header._replace(checksum=0))
        if zlib.crc32(content[_STRUCT.size : after].data, zlib.crc32(blank)) != header.checksum:
            raise ArtifactError("the checksum of its tables is wrong")
        ends = list(accumulate(sizes, initial=after))
        pages = [content[slice(*pair)] for pair in pairwise(ends)]
        for number, (page, checksum) in enumerate(zip(pages, checksums, strict=True)):
            if zlib.crc32(page.data) != checksum:
                raise ArtifactError(f"the checksum of band {number} of its codes is wrong")
        if starts[0] != 0 or (np.diff(starts) <= 0).any() or limits.max() > _PACKABLE:
            raise ArtifactError("its tables are for no contexts")
        pcodec = content[begin : begin + _PCODEC].tobytes()
        at = accumulate(lengths, initial=begin + _PCODEC)
        *descriptions, rows, columns = (content[slice(*pair)].tobytes() for pair in pairwise(at))
        return cls(
            header,
            starts,
            limits.tolist(),
            pcodec,
            descriptions,
            _decoded_classes(rows, header.rows),
            _decoded_classes(columns, header.inputs),
            pages,
        )

    @property
    def bands(self) -> list[slice]:
        """The rows of each band."""
        return _bands(self.header.rows, self.header.inputs)

    @cached_property
    def _order(self) -> _Integers:
        """The columns in the order of their classes."""
        return np.argsort(self.columns, kind="stable")

    @cached_property
    def _places(self) -> _Integers:
        """The place of each column in that order."""
        return np.argsort(self._order)

    @cached_property
    def _edges(self) -> _Integers:
        return _edges(self.columns[self._order], self.starts)

    @cached_property
    def _local(self) -> threading.local:
        """What each thread has of its own: a decoder of pcodec does not serve two at a time."""
        return threading.local()

    def _decoders(self) -> list[_Pages]:
        """Return the decoder of each table, made once for each thread."""
        if not hasattr(self._local, "decoders"):
            self._local.decoders = [_Pages(self.pcodec, text) for text in self.descriptions]
        decoders: list[_Pages] = self._local.decoders
        return decoders

    def decode(self, number: int) -> Codes:
        """Return the codes of a band, (rows, in).

        Raises:
            ArtifactError: If they cannot be decoded.
        """
        rows = self.rows[self.bands[number]]
        rectangles = list(_Rectangles(rows, self._edges))
        counts = [0] * self.header.tables
        for table, down, across in rectangles:
            counts[table] += (down.stop - down.start) * (across.stop - across.start)
        streams = self._read(self.pages[number], counts)
        sorted_ = np.empty((len(rows), self.header.inputs), np.int8)
        at = [0] * len(counts)
        for table, down, across in rectangles:
            place = sorted_[down, across]
            begin = at[table]
            at[table] += place.size
            place[:] = streams[table][begin : at[table]].reshape(place.shape)
        codes = sorted_
        if (self.columns != self.columns[0]).any():
            codes = codes.take(self._places, axis=1)
        if (rows != rows[0]).any():
            codes = codes.take(np.argsort(np.argsort(rows, kind="stable")), axis=0)
        return codes

    def _read(self, page: Bytes, counts: list[int]) -> list[Codes]:
        """Return the codes of each table in a band.

        Args:
            page: The bytes of the band.
            counts: How many codes of each table it has.
        """
        tables = len(counts)
        lengths = np.frombuffer(page[: 4 * tables].tobytes(), "<u4").tolist()
        if len(page) < 4 * tables or 4 * tables + sum(lengths) != len(page):
            raise ArtifactError("the pages of a band do not fill it")
        ends = pairwise(accumulate(lengths, initial=4 * tables))
        streams = []
        for decoder, limit, count, span in zip(
            self._decoders(), self.limits, counts, ends, strict=True
        ):
            data = page[slice(*span)].tobytes()
            numbers = decoder.read(data, -(-count // _packs(limit)))
            streams.append(_unpacked(numbers, limit, count) if count else numbers)
        return streams


def _decoded_classes(data: bytes, count: int) -> _Classes:
    """Return the classes of rows or columns."""
    classes = decode_numbers(data, "i8", count).view(np.uint8)
    if classes.max() >= _CLASSES:
        raise ArtifactError(f"classes must be below {_CLASSES}, got {classes.max()}")
    return classes


_DTYPES: dict[str, Any] = {"i8": np.int8, "u16": np.uint16, "u32": np.uint32}
"""Numbers by pcodec's name for their dtype."""


def encode_numbers(numbers: NDArray[Any]) -> bytes:
    """Return the bytes that stand for some numbers, where there is one distribution for all.

    They are pcodec's header, 2 bytes; the length of its description of a table, uint16; the
    description; the page.

    Args:
        numbers: (count,) int8, uint16 or uint32, 1 to `MOST_NUMBERS`.
    """
    writer = FileCompressor()
    description, (page,) = _compressed(writer, [numbers])
    return b"".join([writer.write_header(), _numbers("u2", [len(description)]), description, page])


def decode_numbers(data: bytes, dtype: str, count: int) -> NDArray[Any]:
    """Return numbers, (count,).

    Args:
        data: From `encode_numbers`.
        dtype: "i8", "u16" or "u32".
        count: How many; the caller knows that they are not too many to be allocated.

    Raises:
        ArtifactError: If the bytes do not hold so many.
    """
    begin = _PCODEC + 2
    end = begin + int.from_bytes(data[_PCODEC:begin], "little")
    return _Pages(data[:_PCODEC], data[begin:end], dtype).read(data[end:], count)


class _Pages:
    """Decodes the pages of one table.

    Args:
        pcodec: Header of pcodec.
        description: pcodec's description of the table.
        dtype: Of the numbers: "i8", "u16" or "u32".

    Raises:
        ArtifactError: If there is no such table.
    """

    def __init__(self, pcodec: bytes, description: bytes, dtype: str = "i8"):
        reader, _ = _checked(FileDecompressor.new, pcodec)
        self._chunk, used = _checked(reader.chunk_decompressor, description, dtype)
        self._dtype = _DTYPES[dtype]
        if used != len(description):
            raise ArtifactError("a table of its codes has bytes left over")

    def read(self, page: bytes, count: int) -> NDArray[Any]:
        """Return the numbers of a page, (count,).

        Raises:
            ArtifactError: If it holds fewer or more.
        """
        numbers = np.empty(count, self._dtype)
        if not count:
            used = 0
        else:
            progress, used = _checked(self._chunk.read_page_into, page, count, numbers)
            if not progress.finished or progress.n_processed != count:
                raise ArtifactError("a page of its codes holds fewer codes than it should")
        if used != len(page):
            raise ArtifactError("a page of its codes has bytes left over")
        return numbers


def _checked(function: Callable[..., Any], *args: Any) -> Any:
    """Call pcodec, whose errors here say that a file is damaged.

    Raises:
        ArtifactError: If there is one.
    """
    try:
        return function(*args)
    except Exception as error:
        raise ArtifactError(f"its codes cannot be decoded: {error}") from error
    except BaseException as error:
        # A panic of Rust; its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(f"its codes cannot be decoded: {error}") from error
