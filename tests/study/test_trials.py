"""The SQLite file of a study."""

import sqlite3

import pytest

from optimum_order.errors import OutputError
from optimum_order.study.trials import TRIALS, Trials, check_folder


def test_rows_are_read_as_they_were_stored(tmp_path):
    rows = {("trials", "rtn:4", 0): {"x": [1, 0.1]}, ("pairs", "a | b", 2): {"layer": [1, 2, 3]}}
    Trials(tmp_path, {"model": "m"}).add(rows)
    trials = Trials.open(tmp_path)
    assert trials.settings == {"model": "m"}
    assert trials.rows("trials") == {("rtn:4", 0): {"x": [1, 0.1]}}
    assert trials.rows("pairs") == {("a | b", 2): {"layer": [1, 2, 3]}}
    assert trials.done() == {("rtn:4", 0)}


def test_settings_without_a_trial_are_replaced(tmp_path):
    Trials(tmp_path, {"model": "a"})
    trials = Trials(tmp_path, {"model": "b"})
    trials.plan([("rtn:4", 0)])
    assert trials.planned() == [("rtn:4", 0)]
    with pytest.raises(OutputError, match="'model' is 'b' there and 'c' now"):
        Trials(tmp_path, {"model": "c"})
    with pytest.raises(OutputError, match="'calibration' is None there and 3 now"):
        Trials(tmp_path, {"model": "b", "calibration": 3})


def test_the_error_names_what_people_chose_before_digests(tmp_path):
    settings = {"weights": "0", "evaluation": {"digest": "0", "samples": 4}}
    Trials(tmp_path, settings).plan([("rtn:4", 0)])
    other = {"weights": "1", "evaluation": {"digest": "1", "samples": "3" * 100}}
    with pytest.raises(OutputError) as error:
        Trials(tmp_path, other)
    message = str(error.value)
    assert "'evaluation.samples' is 4 there and '333" in message
    assert "... now (weights, evaluation.digest differ too)" in message
    assert len(message) < 400


def test_a_study_does_not_go_on_with_another_version_or_machine(tmp_path):
    settings = {"model": "m", "threads": 2, "versions": {"torch": "2.13.0", "optimum_order": "0.2"}}
    Trials(tmp_path, settings).plan([("rtn:4", 0)])
    for change, advice in [
        ({"threads": 4}, r"'threads' is 2 there and 4 now.*--num-threads"),
        ({"versions": settings["versions"] | {"torch": "2.14.0"}}, r"the version of torch that"),
        ({"threads": 4, "model": "n"}, r"'model' is 'm'.*\(threads differ too\).*the same model"),
    ]:
        with pytest.raises(OutputError, match=advice):
            Trials(tmp_path, settings | change)


def test_commands_are_kept_each_once(tmp_path):
    trials = Trials(tmp_path, {})
    assert trials.commands() == []
    for command in ("study a", "study b", "study a"):
        trials.note_command(command)
    assert Trials.open(tmp_path).commands() == ["study a", "study b"]


def test_rows_are_stored_all_or_none(tmp_path):
    trials = Trials(tmp_path, {})
    with pytest.raises(OutputError):
        trials.add({("trials", "a", 0): {"x": 1}, ("trials", "b", 0): {"x": float("nan")}})
    assert Trials.open(tmp_path).rows("trials") == {}


def test_a_folder_without_trials_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no study was run there"):
        Trials.open(tmp_path)
    for content in (b"", b"hello, this is no database at all"):
        (tmp_path / TRIALS).write_bytes(content)
        with pytest.raises(OutputError, match="cannot hold a study"):
            Trials.open(tmp_path)


def test_trials_of_an_earlier_version_can_be_read(tmp_path):
    """Such a file does not say which trials were planned."""
    with sqlite3.connect(tmp_path / TRIALS) as db:
        db.execute("CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT)")
        for table in ("trials", "pairs"):
            key = "PRIMARY KEY (orders, draw)"
            db.execute(f"CREATE TABLE {table} (orders TEXT, draw INTEGER, data TEXT, {key})")
        db.execute("INSERT INTO settings VALUES ('model', '\"m\"')")
        db.execute("INSERT INTO trials VALUES ('rtn:4', 0, '{}')")
    trials = Trials.open(tmp_path)
    assert trials.settings == {"model": "m"}
    assert trials.planned() == []
    assert trials.done() == {("rtn:4", 0)}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Not a directory.*can be written"):
        check_folder(tmp_path / "file" / "study")
