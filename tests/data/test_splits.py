"""Splits of local datasets, and the columns that are read."""

import json

import pytest

from optimum_order.data.splits import find_column, load_split
from optimum_order.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A dataset of two splits of twenty rows."""
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    for split, word in (("train", "learning"), ("test", "testing")):
        lines = [json.dumps({"title": f"{n}", "text": f"{word} number {n}"}) for n in range(20)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_the_purpose_chooses_the_split(folder):
    for purpose, word in (("calibration", "learning"), ("evaluation", "testing")):
        split = load_split(str(folder), purpose, "a file")
        assert all(word in text for text in split.data["text"])
        assert split.name == "corpus", "the path to the folder stays private"
        assert split.column is None


def test_config_split_and_column_may_be_named(folder):
    split = load_split(f"{folder}:default:test[:5]:title", "calibration", "a file")
    assert split.name == "corpus:default:test[:5]:title" and split.column == "title"
    assert list(split.data["title"]) == list("01234")


def test_a_dataset_or_part_that_does_not_exist_is_one_line(folder):
    for source, message in [
        (f"{folder}::nope", "nope"),
        (f"{folder}:nope", "nope"),
        (f"{folder}:a:b:c:d", r"is written id\[:config\]\[:split\]\[:column\], got"),
        (":default", r"is written id\[:config\]"),
        ("./nowhere", "The path './nowhere' does not exist"),
        ("a/b/c", "The path 'a/b/c' does not exist"),
        ("nobody/nothing:en", r"'nobody/nothing:en' is no file here.*Couldn't reach.*or give a f"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            load_split(source, "calibration", "a file")
        assert "\n" not in str(error.value)


def test_a_dataset_without_the_split_of_a_purpose(folder):
    (folder / "data" / "test.jsonl").unlink()
    message = r"no split 'test' or 'validation' for evaluation.*are: train\. Name one"
    with pytest.raises(DataError, match=message):
        load_split(str(folder), "evaluation", "a file")


def test_the_column_is_the_named_the_usual_or_the_only_one():
    names = {"usual": "text", "content": "text", "name": "a"}
    assert find_column({"text": True, "title": True}, None, **names) == "text"
    assert find_column({"text": True, "title": True}, "title", **names) == "title"
    assert find_column({"id": False, "body": True}, None, **names) == "body"
    for columns, wanted, message in [
        ({"title": True, "body": True, "year": False}, None, "'a' has several columns of text"),
        ({"title": True, "year": False}, "year", "no column 'year' of text"),
        ({"year": False}, None, "no column 'text' of text.*are: none; others: year"),
    ]:
        with pytest.raises(DataError, match=message):
            find_column(columns, wanted, **names)
