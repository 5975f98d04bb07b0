"""Files of text: every kind gives the same documents, and a damaged one is one line."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from optimum_order.data.rows import Rows
from optimum_order.data.tables import File
from optimum_order.errors import DataError

SECRET = "Zanzibar"
TEXTS = ["the first, of three", 'the "second"\ndocument', "Größe 日本語"]
TURNS = [[{"role": "user", "content": text}] for text in TEXTS]


def read(path):
    content = File.named(str(path)).read()
    assert isinstance(content, Rows)
    kind, values = content.values()
    return kind, [value for _, value in values]


def rows(column, values):
    return [{"id": f"a{n}", column: value} for n, value in enumerate(values)]


def as_csv(table, delimiter=","):
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, table[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    for column, values, kind in (("body", TEXTS, "text"), ("messages", TURNS, "chat")):
        table = rows(column, values)
        lines = "\n".join(json.dumps(row) for row in table)
        contents = {
            "a.jsonl": lines,
            "a.ndjson": lines,
            "a.json": json.dumps(table),
            "b.json": lines,
            "c.json": json.dumps({"version": 1, "data": table}),
        }
        if kind == "text":
            contents |= {"a.csv": as_csv(table), "A.TSV": as_csv(table, "\t")}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
            assert read(tmp_path / name) == (kind, values), name
            packed = tmp_path / f"{name}.gz"
            packed.write_bytes(gzip.compress(content.encode()))
            assert read(packed) == (kind, values), packed.name
            assert read(f"{packed}:{column}") == (kind, values)
        parquet.write_table(pyarrow.Table.from_pylist(table * 40), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == (kind, values * 40)


def test_plain_text_may_be_packed(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    file = File.named(str(tmp_path / "a.txt.gz"))
    assert file.read() == [TEXTS[2]] and file.name == "a.txt.gz"


def test_names_that_are_no_files_of_text():
    for name in ("allenai/c4", "a.xml", "a.jsonl.zst", "wikitext2", "a.parquet.gz"):
        assert File.named(name) is None, name


def test_damaged_files_are_one_line_and_hold_no_text(tmp_path, monkeypatch):
    packed = gzip.compress(SECRET.encode() * 999)
    for name, content, message in (
        ("a.jsonl.gz", packed[:-9], "'a.jsonl.gz' is not a .gz file, or it is damaged"),
        ("a.csv.gz", SECRET.encode(), "not a .gz file"),
        ("a.txt.gz", packed[:20] + b"xxxx" + packed[24:], "not a .gz file"),
        ("a.json", f'[{{"text": "{SECRET}"'.encode(), "'a.json', line 1: expected a JSON object"),
        ("a.json", f'["{SECRET}"]'.encode(), "'a.json': expected a JSON list of objects"),
        ("a.json", b"[" * 10**5, "line 1: expected a JSON object"),
        ("a.csv", f'id,body\n1,{SECRET}\n2\n'.encode(), "row 2: expected one value for each of the 2"),
        ("a.csv", f'body\n"{SECRET}'.encode(), "separated by commas, or a quote is not closed"),
        ("a.csv", SECRET.encode() + b"\xff", "'a.csv' is not UTF-8 text: see byte 8"),
        ("a.parquet", SECRET.encode(), "'a.parquet' is not a parquet file"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value) and SECRET not in str(error.value)
    monkeypatch.setattr("optimum_order.data.tables._MOST_BYTES", 100)
    (tmp_path / "a.csv.gz").write_bytes(packed)
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path / "a.csv.gz")


def test_a_long_field_of_a_table_is_read_and_the_limit_of_the_process_is_left(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(as_csv(rows("body", ["a word " * 50_000])), encoding="utf-8")
    assert len(read(tmp_path / "a.csv")[1][0]) == 350_000
    assert csv.field_size_limit() == limit
