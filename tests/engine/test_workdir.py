"""What a work dir accepts, and that it is never left in a state that a run could not go on from."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from optimum_order.calibration.walk import Crossing
from optimum_order.engine import snapshot, workdir
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import OutputError
from optimum_order.layers.state import LayerState

UNITS = ["a", "b", "c"]
FINGERPRINT = {
    "order": "wanda:0.5",
    "model": {"digest": "12ab", "dtype": "float32"},
    "targets": None,
    "seeds": (1, 2),
}


def value(number):
    return {
        "states": {"layer": LayerState(torch.full((2, 3), float(number)))},
        "records": {"layer": []},
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "some" / "out.work"


@pytest.fixture
def begun(folder):
    """A work dir in which unit "a" of the first pass was finished."""
    with WorkDir(folder, FINGERPRINT, resume=False) as work:
        work.passage(0, UNITS).save("a", "state", value(1))
        work.wait()
    return folder


def names(folder):
    return sorted(file.name for file in folder.glob("*.safetensors"))


def test_what_is_saved_is_there_for_the_run_that_goes_on(begun):
    with WorkDir(begun, FINGERPRINT, resume=True) as work:
        first = work.passage(0, UNITS)
        assert first.finished(UNITS) == ["a"] and not first.over
        assert torch.equal(first.load("a")["states"]["layer"].weight, torch.ones(2, 3))
        assert first.crossing() is None
        assert work.passage(1, UNITS).finished(UNITS) == []


def test_a_file_goes_once_another_has_taken_its_place(folder):
    flowing = Crossing("a", (torch.ones(2),), "00")
    with WorkDir(folder, FINGERPRINT, resume=False, patience=0) as work:
        first = work.passage(0, UNITS)
        first.save("a", "state", value(1), lambda: flowing)
        first.save("b", "state", value(2), lambda: Crossing("b", (torch.zeros(2),), "01"))
        work.wait()
        assert names(folder) == [f"000-0000{i}.{kind}.safetensors" for i, kind in
                                 ((0, "state"), (1, "crossing"), (1, "state"))]  # fmt: skip
        assert work.passage(0, UNITS).crossing().unit == "b"
        first.save("c", "state", value(3))
        second = work.passage(1, UNITS)
        second.save("b", "state", value(4), lambda: flowing)
        work.wait()
        assert names(folder) == [f"00{at}-0000{i}.{kind}.safetensors" for at, i, kind in
                                 ((0, 0, "state"), (0, 2, "state"), (1, 1, "crossing"), (1, 1, "state"))]  # fmt: skip
        again = work.passage(0, UNITS)
        assert again.over and again.finished(UNITS) == UNITS
        assert again.load("b") is None, "a later pass has left something since"
        assert work.passage(1, UNITS).finished(UNITS) == ["b"]


def test_activations_are_kept_no_more_often_than_it_pays(folder):
    with WorkDir(folder, FINGERPRINT, resume=False, patience=1000) as work:
        first = work.passage(0, UNITS)
        first.save("a", "state", value(1), lambda: pytest.fail("too soon"))
        work.flowed -= 1000
        first.save("b", "state", value(2), lambda: Crossing("b", (torch.zeros(2),), "01"))
        first.save("c", "state", value(3), lambda: pytest.fail("too soon"))
        work.wait()
        assert first.crossing().unit == "b", "older activations are of use until there are others"


def test_what_was_measured_stays(folder):
    with WorkDir(folder, FINGERPRINT, resume=False) as work:
        work.passage(0, UNITS).save("a", "measured", [1.5])
        work.passage(1, UNITS).save("a", "state", value(1))
        work.wait()
        assert work.passage(0, UNITS).load("a") == (1.5,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"order": "wanda:0.6"}, "whose order was 'wanda:0.5', and now it is 'wanda:0.6'"),
        (
            {"model": {"digest": "34cd", "dtype": "float32"}},
            "whose model.digest was '12ab', and now it is '34cd'",
        ),
        ({"model": {"dtype": "float32"}}, "whose model.digest was '12ab', and now it is None"),
        ({"threads": 2}, "whose threads was None, and now it is 2"),
        ({"seeds": [1]}, "whose seeds was [1, 2], and now it is [1]"),
    ],
)
def test_another_run_is_refused_and_the_field_named(begun, change, says):
    with pytest.raises(OutputError) as caught:
        WorkDir(begun, FINGERPRINT | change, resume=True)
    assert says in str(caught.value)
    WorkDir(begun, FINGERPRINT, resume=True).close()  # and nothing has happened to it


def test_a_run_is_neither_overwritten_nor_resumed_unasked(begun, tmp_path):
    with pytest.raises(OutputError, match=r"holds a run that was not finished\. .*--resume"):
        WorkDir(begun, FINGERPRINT, resume=False)
    with pytest.raises(OutputError, match="nothing to resume"):
        WorkDir(tmp_path / "elsewhere", FINGERPRINT, resume=True)
    assert not (tmp_path / "elsewhere").exists()
    assert names(begun) == ["000-00000.state.safetensors"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"holds 'thesis\.tex' and is no work dir"):
            WorkDir(tmp_path, FINGERPRINT, resume=resume)
    with pytest.raises(OutputError, match="is a file"):
        WorkDir(tmp_path / "thesis.tex", FINGERPRINT, resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_has_finished_nothing_leaves_nothing(folder):
    WorkDir(folder, FINGERPRINT, resume=False).close()
    assert not folder.exists()


def test_two_runs_cannot_share_it(begun):
    with WorkDir(begun, FINGERPRINT, resume=True):
        for _ in range(2):  # being refused takes nothing from the one that is there
            with pytest.raises(OutputError, match=rf"is in use by process {os.getpid()} "):
                WorkDir(begun, FINGERPRINT, resume=True)
        with pytest.raises(OutputError, match="is in use"):
            workdir.remove(begun)
    workdir.remove(begun)
    assert list(begun.parent.iterdir()) == []


def test_a_killed_process_holds_nothing(begun):
    code = f"""
from optimum_order.engine.workdir import WorkDir
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
    (begun / ".000-00001.state.safetensors.1.partial").write_bytes(b"half")
    with WorkDir(begun, FINGERPRINT, resume=True) as work:
        assert work.passage(0, UNITS).finished(UNITS) == ["a"]
        assert not list(begun.glob(".*")), "what was not finished is removed"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_said_and_spoils_nothing(begun, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with WorkDir(begun, FINGERPRINT, resume=True) as work, monkeypatch.context() as full:
        full.setattr(snapshot, "save_file", fail)
        passage = work.passage(0, UNITS)
        passage.save("b", "state", value(2))
        with pytest.raises(
            OutputError,
            match=r"No space left on device\. What was finished before is kept .*--resume",
        ):
            passage.save("c", "state", value(3))
    assert names(begun) == ["000-00000.state.safetensors"] and not list(begun.glob(".*"))
    with WorkDir(begun, FINGERPRINT, resume=True) as work:
        assert work.passage(0, UNITS).finished(UNITS) == ["a"]


def test_what_is_damaged_is_refused(begun):
    file = begun / "000-00000.state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with WorkDir(begun, FINGERPRINT, resume=True) as work:
        with pytest.raises(OutputError, match="is damaged: remove the work dir"):
            work.passage(0, UNITS).load("a")
        file.rename(begun / "001-00001.state.safetensors")
        with pytest.raises(OutputError, match="lacks unit 0 of pass 0"):
            work.passage(0, UNITS).load("a")
    (begun / "fingerprint.json").write_text("{")
    with pytest.raises(OutputError, match="missing or damaged"):
        WorkDir(begun, FINGERPRINT, resume=True)
