"""A file is whole or absent; a lock goes with its process; JSON of unknown origin is not trusted."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from optimum_order import files
from optimum_order.errors import ArtifactError, OutputError


class TestAtomic:
    def test_takes_the_place_of_a_file_when_it_is_whole(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_text("before")
        with files.atomic(file) as partial:
            partial.write_text("after")
            assert file.read_text() == "before"
            assert files.is_unfinished(partial)
        assert file.read_text() == "after"
        assert list(tmp_path.iterdir()) == [file]

    def test_leaves_the_file_as_it_was_after_an_error(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_text("before")
        with pytest.raises(ZeroDivisionError), files.atomic(file) as partial:
            partial.write_text("half")
            raise ZeroDivisionError
        assert file.read_text() == "before"
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux names descriptors")
    def test_is_durable_if_told_so(self, tmp_path, monkeypatch):
        """First the content, then the name, then the folder that holds the name."""
        events = []
        sync = os.fsync
        replace = os.replace

        def noted_sync(descriptor):
            events.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
            sync(descriptor)

        def noted_replace(source, target):
            events.append("replace")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(os, "replace", noted_replace)
        for durable in (True, False):
            events.clear()
            with files.atomic(tmp_path / "a.txt", durable=durable) as partial:
                partial.write_text("after")
            if durable:
                assert events == [f"sync {partial}", "replace", f"sync {tmp_path}"]
            else:
                assert events == ["replace"]


class TestLock:
    def test_a_disk_that_fails_is_not_called_a_lock_of_others(self, tmp_path):
        with pytest.raises(OSError, match="No such file or directory"):
            files.lock(tmp_path / "missing" / "lock.sqlite")
        (tmp_path / "lock.sqlite").mkdir()
        with pytest.raises(OSError, match="Input/output error"):
            files.lock(tmp_path / "lock.sqlite")

    def test_is_held_until_it_is_closed(self, tmp_path):
        held = files.lock(tmp_path / "lock.sqlite")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            files.lock(tmp_path / "lock.sqlite")
        held.close()
        files.lock(tmp_path / "lock.sqlite").close()

    def test_goes_with_its_process(self, tmp_path):
        code = "import sys; from pathlib import Path; from optimum_order import files\n"
        code += "lock = files.lock(Path(sys.argv[1])); print('held', flush=True); input()"
        child = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "lock.sqlite"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(sqlite3.OperationalError):
            files.lock(tmp_path / "lock.sqlite")
        child.kill()
        child.communicate()
        files.lock(tmp_path / "lock.sqlite").close()


def test_a_digest_is_the_sha256_of_all_parts(tmp_path):
    data = bytes(range(256)) * 10_000
    expected = hashlib.sha256(data).hexdigest()
    assert files.digest([data[:5], memoryview(data[5:])]) == expected
    assert files.digest(["ä", b"b"]) == hashlib.sha256("äb".encode()).hexdigest()
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == expected


class TestJson:
    def test_is_an_object(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": [1, null]}')
        assert files.read_json(tmp_path / "a.json") == {"a": [1, None]}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[1]", "must hold a JSON object, got list"),
            ("{", "cannot be read"),
            ('{"a": NaN}', "NaN is not JSON"),
            ('{"a": -Infinity}', "-Infinity is not JSON"),
            ("[" * 100_000, "cannot be read"),
            (b"\xff\xfe", "cannot be read"),
        ],
    )
    def test_of_another_kind_is_refused(self, tmp_path, text, message):
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ArtifactError, match=message):
            files.read_json(tmp_path / "a.json")

    def test_that_is_missing_or_huge_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(ArtifactError, match="cannot be read"):
            files.read_json(tmp_path / "missing.json")
        (tmp_path / "a.json").write_text('{"a": 1}')
        monkeypatch.setattr(files, "_MAX_BYTES", 7)
        with pytest.raises(ArtifactError, match="more than 7 bytes"):
            files.read_json(tmp_path / "a.json")


class TestWeightFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("one.safetensors", "two.safetensors"):
            (tmp_path / name).write_bytes(name.encode())
        return tmp_path

    def write_index(self, folder, weight_map):
        (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def test_are_one_or_those_of_the_index(self, folder):
        with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
            files.weight_files(folder)
        (folder / files.SINGLE).write_bytes(b"12345")
        assert files.weight_files(folder) == [files.SINGLE]
        assert files.weight_bytes(folder) == 5
        self.write_index(folder, {"a": "two.safetensors", "b": "one.safetensors"})
        assert files.weight_files(folder) == ["one.safetensors", "two.safetensors"]
        assert files.weight_bytes(folder) == 30

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            ({"a": "../one.safetensors"}, "is not a .safetensors file beside it"),
            ({"a": "/etc/passwd"}, "is not a .safetensors file beside it"),
            ({"a": "three.safetensors"}, r"three\.safetensors is missing"),
            ({"a": 1}, "has no 'weight_map'"),
            ([], "has no 'weight_map'"),
        ],
    )
    def test_outside_of_the_folder_are_refused(self, folder, weight_map, message):
        self.write_index(folder, weight_map)
        with pytest.raises(ArtifactError, match=message):
            files.weight_files(folder)


def test_sizes_are_in_units_that_people_read():
    for count, text in [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (11_720_000, "11.7 MB"),
        (5_000_000_000_000, "5e+03 GB"),
    ]:
        assert files.size(count) == text


def test_times_are_said_as_people_say_them():
    said = [files.duration(seconds) for seconds in (0.2, 40, 100, 12 * 60, 3.5 * 3600, 2.1 * 86400)]
    assert said == ["1 second", "40 seconds", "1.7 minutes", "12 minutes", "3.5 hours", "2.1 days"]
    assert files.duration(187.3 * 86400) == "190 days"


def test_what_a_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda folder: usage if folder == tmp_path else 1 / 0
    )
    files.check_room(tmp_path / "new" / "out", 10**6)
    with pytest.raises(OutputError, match="1 MB free, and the result takes 2 MB"):
        files.check_room(tmp_path / "new" / "out", 2 * 10**6)
