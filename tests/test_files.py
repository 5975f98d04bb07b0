"""Files: atomic writes, locks, digests, JSON of unknown origin, weight files, human sizes."""

import hashlib
import os
import sqlite3

import pytest

from optimum_order import files
from optimum_order.errors import ArtifactError


def test_sizes_are_in_units_that_people_read():
    for count, text in [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (11_720_000, "11.7 MB"),
        (5_000_000_000_000, "5e+03 GB"),
    ]:
        assert files.size(count) == text


def test_a_digest_is_the_sha256_of_all_parts(tmp_path):
    whole = b"abc" + "Gr\u00fc\u00dfe".encode() + b"\0" * 3_000_000
    expected = hashlib.sha256(whole).hexdigest()
    parts = [b"abc", "Gr\u00fc\u00dfe", memoryview(b"\0" * 3_000_000)]
    assert files.digest(parts) == expected
    (tmp_path / "file").write_bytes(whole)
    assert files.sha256(tmp_path / "file") == expected


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    for durable in (False, True):
        with files.atomic(file, durable=durable) as partial:
            partial.write_text("first")
            assert partial.match(files.PARTIAL) and partial.parent == tmp_path
        assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
        with pytest.raises(RuntimeError), files.atomic(file, durable=durable) as partial:
            partial.write_text("half")
            raise RuntimeError
        assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_what_must_survive_a_stop_is_synchronized_before_and_after_it_is_renamed(
    tmp_path, monkeypatch
):
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    for durable, expected in [(True, ["fsync", "replace", "fsync"]), (False, ["replace"])]:
        calls.clear()
        with files.atomic(tmp_path / "file", durable=durable) as partial:
            partial.write_text("")
        assert calls == expected


def test_a_lock_is_held_once(tmp_path):
    lock = files.lock(tmp_path / "lock")
    with pytest.raises(sqlite3.OperationalError):
        files.lock(tmp_path / "lock")
    lock.close()
    files.lock(tmp_path / "lock").close()


def test_json_that_is_no_object_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1.5}')
    assert files.read_json(file) == {"a": 1.5}
    for content in ["[]", "{", '"x"', "", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000]:
        file.write_text(content)
        with pytest.raises(ArtifactError, match=r"config\.json"):
            files.read_json(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.read_json(file)
    file.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.read_json(file)


def test_json_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 2**28 + 1)  # takes no room on the disk
    with pytest.raises(ArtifactError, match="has more than 268435456 bytes"):
        files.read_json(file)


def test_weight_files_are_those_that_the_index_names(tmp_path):
    (tmp_path / files.SINGLE).write_bytes(b"12345")
    assert files.weight_files(tmp_path) == [files.SINGLE]
    assert files.weight_bytes(tmp_path) == 5
    (tmp_path / files.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ArtifactError, match=r"b\.safetensors is missing"):
        files.weight_files(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"123")
    assert files.weight_files(tmp_path) == ["b.safetensors"]
    assert files.weight_bytes(str(tmp_path)) == 3
    for name in ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", "model.bin"]:
        (tmp_path / files.INDEX).write_text('{"weight_map": {"a": "%s"}}' % name)  # noqa: UP031
        with pytest.raises(ArtifactError, match=r"not a \.safetensors file beside it"):
            files.weight_files(tmp_path)
    for content in ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']:
        (tmp_path / files.INDEX).write_text(content)
        with pytest.raises(ArtifactError, match="no 'weight_map'"):
            files.weight_files(tmp_path)
