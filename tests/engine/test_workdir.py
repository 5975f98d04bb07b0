"""A work dir is refused or resumed, and never left in a state that a run could not go on from."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from optimum_order.engine import snapshot, workdir
from optimum_order.engine.workdir import FollowedWorkDir, WorkDir, paused
from optimum_order.errors import OutputError
from optimum_order.layers.state import LayerState

UNITS = ["a", "b", "c"]
FINGERPRINT = {
    "order": "wanda:0.5",
    "model": {"digest": "12ab", "dtype": "float32"},
    "targets": None,
    "seeds": (1, 2),
    "versions": {"optimum_order": "1.2.3", "torch": "2.0"},
}


def value(number):
    states = {"layer": LayerState(torch.full((2, 3), float(number)))}
    return {"states": states, "records": {"layer": []}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "some" / "out.work"


@pytest.fixture
def begun(folder):
    """A work dir in which block "a" of the first pass was finished."""
    with WorkDir(folder, FINGERPRINT, resume=False) as work:
        work.passage(0, UNITS).save("a", "state", value(1))
        work.wait()
    return folder


def names(folder):
    return sorted(file.name for file in folder.glob("*.safetensors"))


def finished(passage):
    return [unit for unit in UNITS if passage.has(unit)]


class TestPassage:
    def test_what_is_saved_is_there_for_the_run_that_goes_on(self, begun):
        with WorkDir(begun, FINGERPRINT, resume=True) as work:
            first = work.passage(0, UNITS)
            assert finished(first) == ["a"]
            assert torch.equal(first.load("a")["states"]["layer"].weight, torch.ones(2, 3))
            assert finished(work.passage(1, UNITS)) == []

    def test_a_file_goes_once_another_takes_its_place(self, folder):
        with WorkDir(folder, FINGERPRINT, resume=False) as work:
            first = work.passage(0, UNITS)
            for number, unit in enumerate(UNITS):
                first.save(unit, "state", value(number))
            work.wait()
            assert names(folder) == [f"000-0000{i}.state.safetensors" for i in range(3)]
            work.passage(1, UNITS).save("b", "state", value(4))
            work.wait()
            assert names(folder) == [
                "000-00000.state.safetensors",
                "000-00002.state.safetensors",
                "001-00001.state.safetensors",
            ]
            again = work.passage(0, UNITS)
            assert finished(again) == UNITS
            assert again.load("b") is None, "a later pass has left something since"
            assert again.load("c") is not None
            assert finished(work.passage(1, UNITS)) == ["b"]

    def test_measurements_stay(self, folder):
        with WorkDir(folder, FINGERPRINT, resume=False) as work:
            work.passage(0, UNITS).save("a", "measured", [1.5])
            work.passage(1, UNITS).save("a", "state", value(1))
            work.wait()
            assert work.passage(0, UNITS).load("a") == (1.5,)

    def test_a_value_may_be_made_while_the_run_goes_on(self, folder):
        with WorkDir(folder, FINGERPRINT, resume=False) as work:
            passage = work.passage(0, UNITS)
            passage.save("a", "state", lambda: value(7))
            work.wait()
            assert torch.equal(passage.load("a")["states"]["layer"].weight, torch.full((2, 3), 7.0))

    def test_the_last_file_of_a_block_is_the_latest(self, begun):
        with WorkDir(begun, FINGERPRINT, resume=True) as work:
            assert work.latest(0).name == "000-00000.state.safetensors"
            work.passage(11, UNITS).save("a", "state", value(2))
            work.wait()
            assert work.latest(0).name == "011-00000.state.safetensors"
            assert work.latest(1) is None


class TestDurability:
    def test_a_file_is_on_the_disk_before_the_file_that_it_replaces_goes(self, begun, monkeypatch):
        """Else a stop of the machine in between would leave neither."""
        events = []
        sync = os.fsync
        unlink = type(begun).unlink

        def noted_sync(descriptor):
            events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
            sync(descriptor)

        def noted_unlink(path, **options):
            if path.exists():
                events.append(("remove", path.name))
            unlink(path, **options)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(type(begun), "unlink", noted_unlink)
        with WorkDir(begun, FINGERPRINT, resume=True) as work:
            events.clear()
            work.passage(1, UNITS).save("a", "state", value(2))
            work.wait()
        kinds = [(kind, name.lstrip(".").split(".state")[0]) for kind, name in events]
        assert kinds == [
            ("sync", "001-00000"),
            ("sync", begun.name.lstrip(".")),
            ("remove", "000-00000"),
        ]

    def test_the_disk_is_full(self, begun, monkeypatch):
        for error in (
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("I/O error: No space left on device"),
        ):

            def fail(*_, error=error, **__):
                raise error

            with WorkDir(begun, FINGERPRINT, resume=True) as work, monkeypatch.context() as full:
                full.setattr(snapshot, "save_file", fail)
                passage = work.passage(0, UNITS)
                passage.save("b", "state", value(2))
                message = r"No space left on device\. The finished part .* still there.*--resume"
                with pytest.raises(OutputError, match=message):
                    passage.save("c", "state", value(3))
            assert names(begun) == ["000-00000.state.safetensors"]
            assert not list(begun.glob(".*"))
            with WorkDir(begun, FINGERPRINT, resume=True) as work:
                assert finished(work.passage(0, UNITS)) == ["a"]

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"Cannot write the work dir .*: Not a directory"):
            WorkDir(tmp_path / "file" / "out.work", FINGERPRINT, resume=False)

    def test_damage_is_refused(self, begun):
        file = begun / "000-00000.state.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        with WorkDir(begun, FINGERPRINT, resume=True) as work:
            with pytest.raises(OutputError, match="is damaged: remove the work dir"):
                work.passage(0, UNITS).load("a")
            file.rename(begun / "001-00001.state.safetensors")
            with pytest.raises(OutputError, match="lacks block 0 of pass 0"):
                work.passage(0, UNITS).load("a")
        for text in ("{", ""):
            (begun / "fingerprint.json").write_text(text)
            with pytest.raises(OutputError, match="missing or damaged"):
                WorkDir(begun, FINGERPRINT, resume=True)
        (begun / "fingerprint.json").write_text("[1]")
        with pytest.raises(OutputError, match="cannot resume"):
            WorkDir(begun, FINGERPRINT, resume=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"order": "wanda:0.6"}, "whose order was 'wanda:0.5', and now is 'wanda:0.6'"),
            (
                {"model": {"digest": "34cd", "dtype": "float32"}},
                "whose model.digest was '12ab', and now is '34cd'",
            ),
            ({"model": {"dtype": "float32"}}, "whose model.digest was '12ab', and now is None"),
            ({"threads": 2}, "whose threads was None, and now is 2"),
            ({"seeds": [1]}, "whose seeds was [1, 2], and now is [1]"),
        ],
    )
    def test_another_run_is_refused_and_the_field_named(self, begun, change, message):
        with pytest.raises(OutputError) as refusal:
            WorkDir(begun, FINGERPRINT | change, resume=True)
        assert message in str(refusal.value)
        WorkDir(begun, FINGERPRINT, resume=True).close()  # and nothing has happened to it

    def test_another_version_is_named_whatever_else_differs(self, begun):
        other = {"order": "rtn:4", "versions": {"torch": "3.0", "optimum_order": "1.3.0"}}
        with pytest.raises(OutputError) as refusal:
            WorkDir(begun, FINGERPRINT | other, resume=True)
        message = str(refusal.value)
        assert "is a work dir of optimum-order 1.2.3, which version 1.3.0 cannot resume" in message
        assert "remove the folder, or give another" in message
        assert len(message.splitlines()) == 1
        torch_only = {"versions": {"torch": "3.0", "optimum_order": "1.2.3"}}
        with pytest.raises(OutputError, match=r"whose versions\.torch was '2\.0'"):
            WorkDir(begun, FINGERPRINT | torch_only, resume=True)

    def test_activations_that_only_old_versions_kept_are_named(self, begun):
        (begun / "000-00001.crossing.safetensors").write_bytes(b"")
        before = sorted(begun.iterdir())
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"a work dir of optimum-order 0\.1\.0, which"):
                WorkDir(begun, FINGERPRINT, resume=resume)
        assert sorted(begun.iterdir()) == before

    def test_a_run_is_neither_overwritten_nor_resumed_unasked(self, begun, tmp_path):
        with pytest.raises(OutputError, match=r"holds a run that was not finished\. .*--resume"):
            WorkDir(begun, FINGERPRINT, resume=False)
        with pytest.raises(OutputError, match="nothing to resume"):
            WorkDir(tmp_path / "elsewhere", FINGERPRINT, resume=True)
        assert not (tmp_path / "elsewhere").exists()
        assert names(begun) == ["000-00000.state.safetensors"]

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"holds 'thesis\.tex' and is no work dir"):
                WorkDir(tmp_path, FINGERPRINT, resume=resume)
        with pytest.raises(OutputError, match="is a file"):
            WorkDir(tmp_path / "thesis.tex", FINGERPRINT, resume=False)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_run_that_finished_nothing_leaves_nothing(self, folder):
        WorkDir(folder, FINGERPRINT, resume=False).close()
        assert not folder.exists()


class TestLock:
    def test_two_runs_cannot_share_a_folder(self, begun):
        with WorkDir(begun, FINGERPRINT, resume=True):
            for _ in range(2):  # a refusal takes nothing from the run that is there
                with pytest.raises(OutputError, match=rf"is in use by process {os.getpid()} "):
                    WorkDir(begun, FINGERPRINT, resume=True)
            with pytest.raises(OutputError, match="is in use"):
                workdir.remove(begun)
        assert workdir.is_ours(begun)
        workdir.remove(begun)
        assert list(begun.parent.iterdir()) == []

    def test_a_disk_that_fails_is_not_called_another_process(self, begun, monkeypatch):
        def fails(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

        monkeypatch.setattr("optimum_order.files.lock", fails)
        with pytest.raises(OutputError, match="Cannot write the work dir .*: Input/output error"):
            WorkDir(begun, FINGERPRINT, resume=True)

    def test_a_killed_process_holds_nothing(self, begun):
        code = f"""
from optimum_order.engine.workdir import FollowedWorkDir, WorkDir, paused
work = WorkDir({str(begun)!r}, {FINGERPRINT!r}, resume=True)
print("here", flush=True)
input()
"""
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"here\n"
        with pytest.raises(OutputError, match=rf"is in use by process {child.pid} "):
            WorkDir(begun, FINGERPRINT, resume=True)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not workdir.is_ours(begun)
        (begun / ".000-00001.state.safetensors.1.partial").write_bytes(b"half")
        (begun / ".tmp3NdYJp").write_bytes(b"half")  # of safetensors
        with WorkDir(begun, FINGERPRINT, resume=True) as work:
            assert finished(work.passage(0, UNITS)) == ["a"]
            assert not list(begun.glob(".*")), "an unfinished file is removed"


def test_a_saved_model_is_recognized_as_the_end_of_a_run(begun):
    manifest = {
        "order": "wanda:0.5",
        "schedule": None,
        "targets": None,
        "versions": FINGERPRINT["versions"],
        "base_model": {"digest": "12ab"},
        "calibration": None,
    }
    fingerprint = FINGERPRINT | {"calibration": None}
    (begun / "fingerprint.json").unlink()
    assert not workdir.led_to(begun, manifest)
    (begun / "fingerprint.json").write_text(json.dumps(fingerprint))
    assert workdir.led_to(begun, manifest)
    for change in (
        {"order": "wanda:0.6"},
        {"base_model": {"digest": "34cd"}},
        {"calibration": {"digest": "5"}},
        {"versions": {}},
        {"pause": "group"},
        {"schedule": "block"},
    ):
        assert not workdir.led_to(begun, manifest | change)


def test_a_process_that_follows_reads_and_never_writes(tmp_path):
    facts = {"order": "gptq:4", "processes": 2, "threads": 1}
    with pytest.raises(OutputError, match="not on a disk that all processes of the run see"):
        FollowedWorkDir(tmp_path / "work", facts)
    with WorkDir(tmp_path / "work", facts, resume=False) as work:
        follower = FollowedWorkDir(tmp_path / "work", facts)
        work.passage(0, ["a"]).save("a", "measured", {"x": 1})
        work.wait()
        before = sorted(file.name for file in work.folder.iterdir())
        with follower:
            passage = follower.passage(0, ["a", "b"])
            assert passage.has("a") and not passage.has("b")
            assert passage.load("a") == {"x": 1}
            passage.save("b", "state", {"x": 2})
            follower.wait()
        assert sorted(file.name for file in work.folder.iterdir()) == before
        with pytest.raises(OutputError, match="whose order was 'gptq:4', and now is 'gptq:3'"):
            FollowedWorkDir(tmp_path / "work", facts | {"order": "gptq:3"})


def test_threads_decide_what_one_process_computes_and_not_what_several_do(tmp_path):
    alone = {"pause": "group", "processes": 1, "threads": 2}
    with WorkDir(tmp_path / "work", alone, resume=False) as work:
        assert paused(work.folder) is None
        work.passage(0, ["a"]).save("a", "measured", {"x": 1})
    assert paused(work.folder) == "group"
    with pytest.raises(OutputError, match="whose threads was 2, and now is 1"):
        WorkDir(work.folder, alone | {"threads": 1}, resume=True)
    for facts in ({"processes": 3, "threads": 1}, {"processes": 2}, {}):
        WorkDir(work.folder, alone | facts, resume=True).close()
