"""Splits of local datasets, and the columns that are read."""

import json

import pytest

from optimum_order.data.splits import _split_name, find_column, load_split
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


def test_a_shortcut_names_a_dataset_its_config_and_its_splits(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or "data"
    )
    for source, purpose, arguments, split in [
        ("wikitext2:::x", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1"), None),
        ("c4::validation", "calibration", ("allenai/c4", "en"), "validation"),
        ("c4:de", "calibration", ("allenai/c4", "de"), None),
        ("ultrachat", "calibration", ("HuggingFaceH4/ultrachat_200k", None), "train_sft"),
        ("ultrachat", "evaluation", ("HuggingFaceH4/ultrachat_200k", None), "test_sft"),
    ]:
        loaded = load_split(source, purpose, "a file", stream=True)
        assert loaded.data == "data" and loaded.name == source
        assert asked.pop() == (arguments, {"split": split, "streaming": True})
    # a part of a split has no name in a stream
    load_split("c4::train[:9]", "calibration", "a file", stream=True)
    assert asked.pop() == (("allenai/c4", "en"), {"split": "train[:9]"})


def test_without_a_network_the_cache_is_read(monkeypatch):
    import datasets

    def load_dataset(*args, streaming=False, **options):
        if streaming:
            raise ConnectionError
        return {"train": "cached"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_split("a/b", "calibration", "a file", stream=True).data == "cached"


def test_a_split_with_a_longer_name_is_that_of_a_purpose():
    names = ["train_sft", "train_gen", "test_sft"]
    assert _split_name("a", names, "evaluation") == "test_sft"
    assert _split_name("a", ["train_sft", "test"], "calibration") == "train_sft"
    with pytest.raises(DataError, match="no split 'train' for calibration.*train_sft, train_gen"):
        _split_name("a", names, "calibration")


def test_a_folder_named_like_a_shortcut_is_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("c4")
    assert len(load_split("c4", "calibration", "a file", stream=True).data) == 20
