"""Integer matrices there and back, in about as many bytes as their entropy."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats import entropy_coder as module
from optimum_order.formats.entropy_coder import (
    CodedMatrix,
    decode,
    decode_numbers,
    encode,
    encode_numbers,
    estimate,
)

HEADER = struct.Struct("<BBHIIIII")
FIELDS = module._Header._fields


def gaussian_codes(rows, inputs, size=1.5, rows_spread=0.3, columns_spread=0.7, seed=0):
    """Rounded normal numbers whose sizes vary by row and by column."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(rows_spread * torch.randn(rows, 1, generator=generator))
    spread = spread * torch.exp(columns_spread * torch.randn(inputs, generator=generator))
    codes = (torch.randn(rows, inputs, generator=generator) * spread * size).round()
    return codes.clamp(-128, 127).to(torch.int8)


def ideal_bits(rows, inputs, size=1.5, rows_spread=0.3, columns_spread=0.7, seed=0):
    """What a coder would take that knew the scale of each row and column of `gaussian_codes`."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(rows_spread * torch.randn(rows, 1, generator=generator))
    spread = spread * torch.exp(columns_spread * torch.randn(inputs, generator=generator))
    codes = (torch.randn(rows, inputs, generator=generator) * spread * size).round()
    scale = (spread * size).double()
    normal = torch.special.ndtr
    chance = normal((codes + 0.5) / scale) - normal((codes - 0.5) / scale)
    return float(-chance.clamp(min=1e-300).log2().sum())


@st.composite
def matrices(draw):
    """Any codes: of any size, rows and columns of zeros, single outliers, one value alone."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    size = draw(st.sampled_from([0.0, 0.2, 1.0, 3.0, 30.0, 1000.0]))
    spread = torch.exp(torch.randn(shape[0], 1, generator=generator) * draw(st.floats(0, 2)))
    codes = (torch.randn(shape, generator=generator) * spread * size).round().clamp(-128, 127)
    if draw(st.booleans()):
        codes[draw(st.integers(0, shape[0] - 1))] = 0
        codes[:, draw(st.integers(0, shape[1] - 1))] = 0
    codes.view(-1)[draw(st.integers(0, codes.numel() - 1))] = draw(st.integers(-128, 127))
    return codes.to(draw(st.sampled_from([torch.int8, torch.int16])))


@contextlib.contextmanager
def changed(**constants):
    """Other sizes of sections, bands and tables, so that small matrices have many."""
    before = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@settings(max_examples=150, deadline=None)
@given(
    matrices(), st.sampled_from([1, 100, 2**19]), st.sampled_from([1, 500, 2**24]), st.booleans()
)
def test_any_codes_come_back(codes, band, section, pack):
    with changed(_BAND=band, _SECTION=section, _WORTH_PACKING=1 if pack else 2**15):
        data = encode(codes)
        assert data.dtype == np.uint8 and data.ndim == 1
        assert np.array_equal(decode(data), codes.numpy())
        coded = CodedMatrix.of(data)
        assert (coded.rows, coded.inputs) == codes.shape
        for number in reversed(range(len(coded.bands))):
            part = codes[coded.bands[number]]
            assert np.array_equal(coded.decode_band(number), part.numpy())
        assert len(encode(codes)) == len(data) and np.array_equal(encode(codes), data)


def test_codes_of_one_value_and_of_all_come_back():
    every = torch.arange(-128, 128).repeat(40).view(64, -1)
    for codes in [torch.zeros(1, 1), torch.full((3, 5), -128), torch.zeros(300, 700), every]:
        assert np.array_equal(decode(encode(codes)), codes.numpy())


def test_bytes_are_close_to_the_entropy_of_codes_whose_scales_are_known():
    for shape, size, most in [
        ((1024, 1024), 0.7, 1.025),
        ((1024, 1024), 1.0, 1.02),
        ((1024, 1024), 3.0, 1.013),
        ((512, 700), 1.0, 1.03),
        ((512, 700), 3.0, 1.02),
    ]:
        bits = 8 * len(encode(gaussian_codes(*shape, size)))
        assert bits <= most * ideal_bits(*shape, size), (shape, size)


def test_rows_and_columns_of_many_sizes_are_coded_apart():
    """One table for all would take a tenth more."""
    for rows_spread, columns_spread in [(0.3, 0.7), (0.8, 0.0), (0.0, 0.8)]:
        codes = gaussian_codes(512, 1024, 1.5, rows_spread, columns_spread)
        counts = np.bincount(codes.view(torch.uint8).numpy().ravel())
        flat = -(counts[counts > 0] * np.log2(counts[counts > 0] / codes.numel())).sum()
        assert 8 * len(encode(codes)) < 0.91 * flat, (rows_spread, columns_spread)


def test_a_table_is_shared_where_its_own_would_take_more_than_it_saves():
    assert module._Section.of(encode(gaussian_codes(8, 16))).header.tables <= 2
    assert module._Section.of(encode(gaussian_codes(512, 1024))).header.tables > 6
    alike = gaussian_codes(512, 1024, 1.5, 0.0, 0.0)
    assert module._Section.of(encode(alike)).header.tables <= 3


@pytest.mark.parametrize("heavy", [False, True])
def test_an_estimate_is_within_one_percent(heavy):
    for shape in [(576, 576), (256, 2048), (1024, 1024)]:
        for size in (0.3, 0.7, 1.0, 2.0, 4.0):
            codes = gaussian_codes(*shape, size)
            if heavy:
                tail = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.001
                codes = torch.where(tail, 20 * codes.sign(), codes)
            bits = 8 * len(encode(codes))
            assert estimate(codes) == pytest.approx(bits, rel=0.01), (shape, size)


def test_a_mark_does_not_change_the_class_of_its_row():
    codes = gaussian_codes(512, 512, 1.0)
    generator = torch.Generator().manual_seed(3)
    marked = torch.where(torch.rand(512, 512, generator=generator) < 0.3, 100, codes.short())
    data = encode(marked, mark=100)
    assert np.array_equal(decode(data), marked.numpy())
    assert len(data) < 0.98 * len(encode(marked))
    rows = module._Section.of(data).rows
    assert rows.max() < (np.log2(30) - module._LEAST) * module._STEPS


def test_numbers_come_back():
    generator = np.random.default_rng(0)
    for name, dtype in module._DTYPES.items():
        info = np.iinfo(dtype)
        numbers = generator.integers(info.min, info.max, 1000, dtype, endpoint=True)
        for part in (numbers[:1], numbers):
            data = encode_numbers(part)
            assert np.array_equal(decode_numbers(data, name, len(part)), part)
        for count in (999, 1001):
            with pytest.raises(ArtifactError):
                decode_numbers(data, name, count)
    small = generator.integers(0, 4, 10000).astype(np.uint16)
    assert len(encode_numbers(small)) < 10000 / 4 * 1.02


def test_threads_decode_the_same(monkeypatch):
    codes = gaussian_codes(300, 200)
    with changed(_BAND=1000):
        data = encode(codes)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        for _ in range(5):
            assert np.array_equal(decode(data), codes.numpy())


# Damaged bytes


def payload():
    with changed(_BAND=600, _SECTION=1500, _WORTH_PACKING=1):
        return bytearray(encode(gaussian_codes(60, 50)).tobytes())


PAYLOAD = payload()


def decoded(data):
    with changed(_BAND=600, _SECTION=1500, _WORTH_PACKING=1):
        return decode(np.frombuffer(bytes(data), np.uint8))


def with_header(checksum=True, **changes):
    """The payload with other fields in its first header, and a checksum that is right."""
    data = bytearray(PAYLOAD)
    fields = dict(zip(FIELDS, HEADER.unpack(data[: HEADER.size]), strict=True)) | changes
    data[: HEADER.size] = HEADER.pack(*fields.values())
    return signed(data) if checksum else data


def signed(data):
    """The same bytes with the checksum of the first section's tables made right."""
    header = module._Header._make(HEADER.unpack(data[: HEADER.size]))
    tables = header.tables
    with changed(_BAND=600, _SECTION=1500):
        begin = HEADER.size + header.lists
    lists = bytes(data[HEADER.size : begin])
    lengths = np.frombuffer(lists, "<u2", tables, 2 * tables).astype(int).sum()
    lengths += np.frombuffer(lists, "<u4", 2, 4 * tables).astype(int).sum()
    blank = HEADER.pack(*header._replace(checksum=0))
    content = data[HEADER.size : begin + 2 + lengths]
    data[: HEADER.size] = HEADER.pack(*header._replace(checksum=zlib.crc32(blank + content)))
    return data


def test_the_payload_has_many_parts():
    with changed(_BAND=600, _SECTION=1500):
        coded = CodedMatrix.of(np.frombuffer(bytes(PAYLOAD), np.uint8))
    assert len(coded.bands) == 6 and len({id(section) for section, _ in coded._bands}) == 2
    assert np.array_equal(decoded(PAYLOAD), gaussian_codes(60, 50).numpy())
    assert signed(bytearray(PAYLOAD)) == PAYLOAD


def test_every_changed_byte_is_seen():
    for at in range(len(PAYLOAD)):
        for flip in (1, 0x80, 0xFF):
            data = bytearray(PAYLOAD)
            data[at] ^= flip
            with pytest.raises(ArtifactError):
                decoded(data)


def test_too_few_and_too_many_bytes_are_refused():
    for cut in range(len(PAYLOAD)):
        if cut == HEADER.unpack(PAYLOAD[: HEADER.size])[FIELDS.index("length")]:
            assert len(decoded(PAYLOAD[:cut])) == 30  # the first section alone is a matrix
            continue
        with pytest.raises(ArtifactError):
            decoded(PAYLOAD[:cut])
    with pytest.raises(ArtifactError):
        decoded(PAYLOAD + b"\0")


def test_headers_of_no_codes_are_refused():
    none = "no codes have the header"
    for changes, reason in [
        ({"version": 2}, "version 2 .* upgrade"),
        ({"tables": 0}, none),
        ({"tables": 33}, none),
        ({"reserved": 1}, none),
        ({"rows": 0}, none),
        ({"inputs": 0}, none),
        ({"rows": 2**32 - 1, "inputs": 2**32 - 1}, none),
        ({"rows": 2**12, "inputs": 2**12}, none),
        ({"inputs": 2**31}, none),
        ({"length": 10}, none),
        ({"length": 2**32 - 1}, "bytes, and .* are there"),
        ({"padding": 2**32 - 1}, none),
    ]:
        with pytest.raises(ArtifactError, match=reason):
            decode(np.frombuffer(bytes(with_header(False, **changes)), np.uint8))


def test_nothing_is_made_that_is_much_larger_than_the_bytes():
    zeros = torch.zeros(2000, 2000)
    data = encode(zeros)
    assert len(data) == zeros.numel() // 64
    assert not decode(data).any()
    section = module._Header._make(HEADER.unpack(data[: HEADER.size].tobytes()))
    short = bytearray(data[: -section.padding].tobytes())
    fields = section._replace(length=len(short), padding=0)
    short[: HEADER.size] = HEADER.pack(*fields)
    with pytest.raises(ArtifactError, match="no codes have the header"):
        decode(np.frombuffer(bytes(short), np.uint8))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 20),
)
def test_changed_bytes_with_right_checksums_are_refused_or_other_codes(changes, longer):
    """What passes every checksum still cannot break the coder."""
    data = bytearray(PAYLOAD) + bytes(longer)
    for at, byte in changes:
        data[at % len(data)] = byte
    with changed(_BAND=600, _SECTION=1500), contextlib.suppress(ArtifactError):
        with contextlib.suppress(
            struct.error, ValueError, IndexError, ZeroDivisionError
        ):  # of signing
            data = signed(data)
        with changed(zlib=NoChecksums):
            assert decode(np.frombuffer(bytes(data), np.uint8)).size <= 64 * len(data)


class NoChecksums:
    """In place of `zlib`: every checksum is right, as a file made on purpose has it."""

    class Any(int):
        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

        __hash__ = int.__hash__

    @staticmethod
    def crc32(data, value=0):
        return NoChecksums.Any()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_codes(data):
    with contextlib.suppress(ArtifactError):
        assert decode(np.frombuffer(data, np.uint8)).ndim == 2


def test_a_panic_of_the_library_is_an_error_of_the_file():
    class PanicException(BaseException):
        pass

    def panics():
        raise PanicException("index out of bounds")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(ArtifactError, match="cannot be decoded: index out of bounds"):
        module._checked(panics)
    with pytest.raises(KeyboardInterrupt):
        module._checked(interrupted)
