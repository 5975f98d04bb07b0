"""Files of text: .txt, .csv, .tsv, .json, .jsonl (all of these also as .gz), and .parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_order.data.rows import SAMPLE, Rows, choose_column, numbered
from optimum_order.errors import DataError

KINDS = ".txt, .csv, .tsv, .json, .jsonl or .parquet"
"""The kinds of files, for messages."""

_FILE = re.compile(
    r"(?P<path>.+\.(?:(?P<kind>(?i:txt|csv|tsv|jsonl|ndjson|json))(?P<packed>\.(?i:gz))?"
    r"|(?P<parquet>(?i:parquet))))(?::(?P<column>[^:/\\]+))?"
)
_MOST_BYTES = 2**33
"""Of an unpacked .gz file: nobody waits for more to be tokenized."""
_AT_ONCE = 2**20


@dataclass(frozen=True)
class File:
    """A file that a source names.

    Args:
        path: The path.
        kind: The lower-case ending that says how to read the file.
        packed: Whether the file is a .gz file.
        column: The column that the source names, or None.
    """

    path: Path
    kind: str
    packed: bool
    column: str | None

    @classmethod
    def named(cls, source: str) -> File | None:
        """Return the file that a source names by its ending, or None."""
        match = _FILE.fullmatch(source)
        if match is None:
            return None
        kind = (match["kind"] or match["parquet"]).lower()
        return cls(Path(match["path"]), kind, bool(match["packed"]), match["column"])

    @property
    def name(self) -> str:
        """The name for messages and manifests, without the folder."""
        return self.path.name if self.column is None else f"{self.path.name}:{self.column}"

    def read(self) -> Rows | list[str]:
        """Return the rows of a table, or the one document of a .txt file.

        Raises:
            DataError: If the file is missing, damaged, or not what its ending says.
        """
        if not self.path.is_file():
            problem = "is a folder" if self.path.is_dir() else "does not exist"
            raise DataError(f"The file '{self.path}' {problem}. Give the path of a {KINDS} file.")
        if self.column is not None and self.kind == "txt":
            raise DataError(
                f"'{self.path.name}' is plain text and has no column '{self.column}'. Leave "
                f"':{self.column}' out."
            )
        try:
            if self.kind == "parquet":
                return self._parquet()
            text = self._text()
        except UnicodeDecodeError as error:
            raise DataError(
                f"'{self.path.name}' is not UTF-8 text: see byte {error.start}. Convert it to "
                "UTF-8."
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise DataError(
                f"'{self.path.name}' is not a .gz file, or it is damaged. Write it anew."
            ) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"'{self.path.name}' cannot be read: {reason}.") from None
        if self.kind == "txt":
            return [text]
        rows = {"csv": self._csv, "tsv": self._csv, "json": self._json}.get(
            self.kind, self._json_lines
        )(text)
        places = list(rows)
        sample = [row for _, row in places]
        return Rows(self.path.name, sample, lambda: places, self.column)

    def _text(self) -> str:
        if not self.packed:
            return self.path.read_text(encoding="utf-8-sig")
        parts = []
        size = 0
        with gzip.open(self.path) as file:
            while part := file.read(_AT_ONCE):
                parts.append(part)
                size += len(part)
                if size > _MOST_BYTES:
                    raise DataError(
                        f"'{self.path.name}' unpacks to more than {_MOST_BYTES / 2**30:.0f} GiB. "
                        "Give a part of it."
                    )
        return b"".join(parts).decode("utf-8-sig")

    def _json_lines(self, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the message and the cause would hold the line
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"'{self.path.name}', line {number}: expected a JSON object such as "
                    '{"text": ...}.'
                )
            yield f"line {number}", row

    def _json(self, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not text.strip():
            return
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            yield from self._json_lines(text)  # many call JSON lines .json
            return
        if isinstance(content, dict):
            tables = [value for value in content.values() if _is_table(value)]
            content = tables[0] if len(tables) == 1 else [content]
        if not _is_table(content):
            raise DataError(
                f"'{self.path.name}': expected a JSON list of objects such as "
                '[{"text": ...}, ...].'
            )
        yield from numbered(content)

    def _csv(self, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        limit = csv.field_size_limit(len(text) + 1)
        try:
            separator = "\t" if self.kind == "tsv" else ","
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            for number, row in enumerate(reader, 1):
                if None in row or any(value is None for value in row.values()):
                    raise DataError(
                        f"'{self.path.name}', row {number}: expected one value for each of the "
                        f"{len(reader.fieldnames or ())} columns of the first line."
                    )
                yield f"row {number}", row
        except csv.Error:
            raise DataError(
                f"'{self.path.name}' is not a table of values separated by "
                f"{'tabs' if self.kind == 'tsv' else 'commas'}, or a quote is not closed. Write it "
                "anew."
            ) from None
        finally:
            csv.field_size_limit(limit)

    def _parquet(self) -> Rows:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(self.path)
            columns = [field.name for field in file.schema_arrow if _may_be_read(field.type)]
            others = {name: None for name in file.schema_arrow.names if name not in columns}
            batches = file.iter_batches(SAMPLE, columns=columns)
            first = next(batches, None)
            sample = [] if first is None else [others | row for row in first.to_pylist()]
            if not sample:
                return Rows.of(self.path.name, [], self.column)
            column, _ = choose_column(Rows.of(self.path.name, sample, self.column))
        except (pyarrow.ArrowInvalid, OSError):
            raise self._damaged() from None

        def read() -> Iterable[tuple[str, Mapping[str, Any]]]:
            try:
                values = parquet.read_table(self.path, columns=[column])[0]
            except (pyarrow.ArrowInvalid, OSError):
                raise self._damaged() from None
            yield from numbered({column: value} for value in values.to_pylist())

        return Rows(self.path.name, sample, read, self.column)

    def _damaged(self) -> DataError:
        return DataError(
            f"'{self.path.name}' is not a parquet file, or it is damaged. Write it anew."
        )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _may_be_read(kind: Any) -> bool:
    """Return whether a column of an arrow type can hold text or conversations."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    text = types.is_string(kind) or types.is_large_string(kind)
    return bool(text or (is_list and types.is_struct(kind.value_type)))
