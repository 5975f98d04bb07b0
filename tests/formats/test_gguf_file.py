"""A GGUF file is believed in nothing that its own size does not bear out."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats.gguf_file import GGUFFile

gguf = pytest.importorskip("gguf")


def write(file):
    """A file of every kind of field, and of three tensors."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("a.number", 3)
    writer.add_float64("a.wide", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_array("a.texts", ["one", "two", "drei ä"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_string("optimum_order", "rtn:4")
    writer.add_tensor("values", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    codes = np.arange(2 * 36, dtype=np.uint8).reshape(2, 36)
    writer.add_tensor("codes", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def test_what_the_package_wrote_is_read(tmp_path):
    file = GGUFFile(write(tmp_path / "model.gguf"))
    assert file.texts == {"general.architecture": "llama", "optimum_order": "rtn:4"}
    assert torch.equal(file.values("values"), torch.arange(6.0).view(2, 3))
    assert torch.equal(file.values("vector"), torch.arange(5).half())
    stored, data = file.bytes_of("codes")
    assert stored.shape == (2, 64) and stored.kind.name == "Q4_0"
    assert torch.equal(data, torch.arange(72, dtype=torch.uint8).view(2, 36))
    with pytest.raises(ArtifactError, match="is quantized"):
        file.values("codes")
    with pytest.raises(ArtifactError, match="no tensor 'other'"):
        file.bytes_of("other")


def read(data, folder):
    file = folder / "model.gguf"
    file.write_bytes(data)
    opened = GGUFFile(file)
    for name in opened.tensors:
        opened.bytes_of(name)


@pytest.mark.parametrize("name", ["missing", "empty", "folder"])
def test_what_is_no_file_is_one_error(tmp_path, name):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        GGUFFile(tmp_path / name)


def test_a_file_that_was_cut_is_refused_at_every_length(sound, tmp_path):
    for length in range(1, len(sound) - 31):  # padding at the end holds nothing
        with pytest.raises(ArtifactError):
            read(sound[:length], tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    at=st.integers(0, 700),
    patch=st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"]),
    ),
)
def test_a_file_that_was_changed_is_read_or_refused(sound, tmp_path, at, patch):
    """Nothing else is raised, and nothing is allocated that the file does not hold."""
    data = sound[:at] + patch + sound[at + len(patch) :]
    tracemalloc.start()
    try:
        read(data, tmp_path)
    except ArtifactError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 2**22


def tensors(*entries, texts=0):
    """A file of nothing but a list of tensors, and 4 kB of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), texts)
    for name, shape, number, offset in entries:
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", number, offset)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(4096)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (tensors((b"a", (2**62, 2**62), 0, 0)), "not all there"),
        (tensors((b"a", (2**32, 2**32), 2, 0)), "not all there"),
        (tensors((b"a", (0, 4), 0, 0)), "not all there"),
        (tensors((b"a", (8,), 0, 2**63)), "not all there"),
        (tensors((b"a", (8, 8), 0, 0), (b"b", (8, 8), 0, 32)), "lies in another"),
        (tensors((b"a", (8,), 0, 0), (b"a", (8,), 0, 32)), "listed twice"),
        (tensors((b"a", (8,), 0, 4)), "lies in another"),
        (tensors((b"a", (33,), 2, 0)), "no whole blocks"),
        (tensors((b"a", (32,), 12, 0)), "no whole blocks"),
        (tensors((b"a", (256,), 16, 0)), "none that we write"),
        (tensors((b"a", (1,) * 5, 0, 0)), "5 dimensions"),
        (tensors((b"\xff", (8,), 0, 0)), "no UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "holds 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "version 2"),
        (b"GGML" + struct.pack("<IQQ", 3, 0, 0), "b'GGML'"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a text of 1152921504606846976 bytes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**10), "ends before"),
    ],
)
def test_headers_that_ask_for_too_much(data, match, tmp_path):
    with pytest.raises(ArtifactError, match=match):
        read(data, tmp_path)


def listed(*texts):
    """A file of one field, a list of texts."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    head += struct.pack("<IIQ", 9, 8, len(texts))
    return head + b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def test_a_text_as_long_as_the_file_is_not_copied(tmp_path):
    """One of 100,000 damaged files had such a length, and took three times its memory."""
    (tmp_path / "f").write_bytes(listed(b"one", b"\xb4" * 3 * 2**20))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="a text of 3145728 bytes"):
        GGUFFile(tmp_path / "f")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20


def test_texts_of_a_list_are_decoded_when_they_are_asked_for(tmp_path):
    (tmp_path / "f").write_bytes(listed(b"one", b"\xb4"))
    file = GGUFFile(tmp_path / "f")
    with pytest.raises(ArtifactError, match="no UTF-8"):
        file.fields()


def test_lists_without_end_are_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_order.formats.gguf_file._MOST_TEXTS", 100)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    head += struct.pack("<IIQ", 9, 8, 2**50) + bytes(8 * 200)
    with pytest.raises(ArtifactError, match="more than 100 texts"):
        read(head, tmp_path)
    nested = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1)
    with pytest.raises(ArtifactError, match="unknown kind 9"):
        read(nested, tmp_path)
    aligned = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 17) + b"general.alignment"
    with pytest.raises(ArtifactError, match="alignment"):
        read(aligned + struct.pack("<II", 4, 0), tmp_path)
