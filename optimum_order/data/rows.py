"""Rows with named columns, and which of these columns holds text or conversations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optimum_order.errors import DataError

Kind = Literal["text", "chat"]

ROLE_AND_CONTENT = (("role", "content"), ("from", "value"))
"""The keys of a turn of a conversation, as chat templates and as ShareGPT spell them."""

_USUAL_TEXT = ("text",)
_USUAL_CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
_NAME_OF_IDS = re.compile(
    r"(?:.*[_\-. ])?(?:id|ids|uid|uuid|guid|idx|index|hash|sha\d*|md5|url|uri)(?:[_\-]?\d+)?",
    re.IGNORECASE,
)
_NAME_OF_IDS_IN_CAMEL_CASE = re.compile(r".*[a-z](?:Id|ID|Uuid|UUID|Url|URL)")
_MOST_NAMES = 20
SAMPLE = 64
"""Rows of a large source by which the kinds of its columns are told."""


@dataclass(frozen=True)
class Rows:
    """Rows that are read at most once.

    Args:
        name: The name of the source, for messages and manifests.
        sample: The first rows, or all: the kinds of columns are told by them.
        read: Yields each row with its place, such as "line 3".
        wanted: The column that the user named, or None.
    """

    name: str
    sample: Sequence[Mapping[str, Any]]
    read: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]
    wanted: str | None = None

    @classmethod
    def of(cls, name: str, rows: Sequence[Mapping[str, Any]], wanted: str | None = None) -> Rows:
        """Return rows that are in memory."""
        return cls(name, rows, lambda: numbered(rows), wanted)

    @classmethod
    def streamed(cls, name: str, rows: Iterable[Any], wanted: str | None = None) -> Rows:
        """Return rows that come one by one; the first few are read at once."""
        iterator = iter(rows)
        sample = list(itertools.islice(iterator, SAMPLE))

        def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
            yield from numbered(sample)
            yield from numbered(iterator, len(sample))

        return cls(name, sample, read, wanted)

    def values(self) -> tuple[Kind, Iterator[tuple[str, Any]]]:
        """Return the kind of the column to read, and its values with their places.

        Raises:
            DataError: If there is no such column, or several and none is named.
        """
        if not self.sample:
            return "text", iter(())
        column, kind = choose_column(self)
        return kind, ((place, row.get(column)) for place, row in self.read())


def choose_column(rows: Rows) -> tuple[str, Kind]:
    """Return the column to read, and its kind.

    The column that the user named; else "text"; else the usual names of conversations; else the
    only column of text that is no column of ids; else the only one of conversations.

    Raises:
        DataError: If there is no such column, or several and none is named.
    """
    columns: dict[str, list[Any]] = {}
    for row in rows.sample:
        for name, value in row.items():
            columns.setdefault(str(name), []).append(value)
    texts = [name for name, values in columns.items() if _are_texts(values)]
    chats = [name for name, values in columns.items() if _are_chats(values)]
    ids = [name for name in texts if name not in _USUAL_TEXT and _are_ids(name, columns[name])]
    sure = [name for name in texts if name not in ids]
    if rows.wanted is not None:
        if rows.wanted in texts:
            return rows.wanted, "text"
        if rows.wanted in chats:
            return rows.wanted, "chat"
    else:
        for name in _USUAL_TEXT:
            if name in texts:
                return name, "text"
        for name in _USUAL_CHATS:
            if name in chats:
                return name, "chat"
        if len(sure) == 1 and not chats:
            return sure[0], "text"
        if len(chats) == 1 and not sure:
            return chats[0], "chat"
    if rows.wanted is not None:
        problem = f"no column '{rows.wanted}' of text"
    elif len(texts) + len(chats) > 1:
        problem = "several columns of text"
    elif ids:
        problem = f"no column of text but '{ids[0]}', whose values look like ids or names"
    else:
        problem = "no column 'text' of text"
    conversations = f"; of conversations: {_listed(chats)}" if chats else ""
    others = [name for name in columns if name not in texts and name not in chats]
    raise DataError(
        f"'{rows.name}' has {problem}. Its columns of text are: {_listed(texts)}{conversations}; "
        f"others: {_listed(others)}. Name one after the last colon of the source."
    )


def numbered(
    rows: Iterable[Mapping[str, Any]], before: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows with their places, "row 1" and so on.

    Args:
        rows: The rows.
        before: Rows that came before these.
    """
    for number, row in enumerate(rows, before + 1):
        yield f"row {number}", row


def _listed(columns: list[str]) -> str:
    return ", ".join(columns[:_MOST_NAMES]) or "none"


def _are_texts(values: list[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _are_chats(values: list[Any]) -> bool:
    return any(_is_chat(value) for value in values)


def _is_chat(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return False
    return any(role in value[0] and content in value[0] for role, content in ROLE_AND_CONTENT)


def _are_ids(name: str, values: list[Any]) -> bool:
    """Return whether a column of strings holds ids, links, labels or other single words."""
    if _NAME_OF_IDS.fullmatch(name) or _NAME_OF_IDS_IN_CAMEL_CASE.fullmatch(name):
        return True
    texts = [value for value in values if isinstance(value, str) and value]
    # of a script that writes words without blanks between them, nothing can be said
    return all(text.isascii() and len(text.split()) < 2 for text in texts)
