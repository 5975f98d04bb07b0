"""One split of a dataset of the Hub, or of a local folder, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_order.data.samples import Purpose
from optimum_order.errors import DataError

_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("test", "validation"),
}
_SPELLING = "id[:config][:split][:column]"
_COLON_OUTSIDE_BRACKETS = r":(?![^\[]*\])"  # train[:100] is one part
_LONGEST_REASON = 300
_MOST_NAMES = 20


@dataclass(frozen=True)
class Split:
    """A split of a dataset.

    Args:
        name: The name for messages and manifests; only the last part of a local path.
        data: The `datasets.Dataset`, or an `IterableDataset`, which has no length.
        column: The column that the source names, or None.
    """

    name: str
    data: Any
    column: str | None


def load_split(source: str, purpose: Purpose, alternative: str, *, stream: bool = False) -> Split:
    """Load one split of a dataset.

    Args:
        source: `id[:config][:split][:column]`, where the id may be a local folder, also one that
            `save_to_disk` wrote, or a shortcut: wikitext2, c4, ultrachat.
        purpose: Chooses the split where the source names none.
        alternative: Another kind of source, for messages.
        stream: Whether a dataset of the Hub may come as an iterable, of which only the rows that
            are read are downloaded.

    Raises:
        DataError: If there is no such dataset or split.
    """
    parts = re.split(_COLON_OUTSIDE_BRACKETS, source)
    identifier, config, split, column = (part or None for part in (parts + [""] * 3)[:4])
    if len(parts) > 4 or identifier is None:
        raise DataError(f"A dataset of the Hub is written {_SPELLING}, got '{source}'.")
    local = Path(identifier).is_dir()
    is_path = identifier.startswith((".", "/", "~")) or "\\" in identifier
    if not local and (is_path or identifier.count("/") > 1):
        raise DataError(f"The path '{identifier}' does not exist. Give one that does.")
    name = ":".join([Path(identifier).name, *parts[1:]]) if local else source
    if not local and identifier in SHORTCUTS:
        shortcut = SHORTCUTS[identifier]
        identifier = shortcut.identifier
        config = config or shortcut.config
        split = split or shortcut.splits.get(purpose)
    data = _load(_Request(name, identifier, config, split, alternative), stream and not local)
    if isinstance(data, dict):
        data = data[_split_name(name, list(data), purpose)]
    return Split(name, data, column)


@dataclass(frozen=True)
class _Shortcut:
    identifier: str
    config: str | None
    splits: Mapping[Purpose, str] = field(default_factory=dict)


SHORTCUTS = {
    "wikitext2": _Shortcut("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": _Shortcut("allenai/c4", "en"),
    "ultrachat": _Shortcut(
        "HuggingFaceH4/ultrachat_200k",
        None,
        {"calibration": "train_sft", "evaluation": "test_sft"},
    ),
}
"""Datasets that many papers calibrate on, under the names that these use."""


@dataclass(frozen=True)
class _Request:
    """What `_load` loads, and what its errors say."""

    name: str
    identifier: str
    config: str | None
    split: str | None
    alternative: str


def _load(request: _Request, stream: bool) -> Any:
    """Return a dataset, or a dict of its splits."""
    import datasets

    folder = Path(request.identifier)
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    # a part of a split, such as train[:100], cannot be streamed by that name
    stream = stream and "[" not in (request.split or "")
    try:
        if saved:
            return _saved(request)
        if stream:
            try:
                return datasets.load_dataset(
                    request.identifier, request.config, split=request.split, streaming=True
                )
            except ConnectionError:
                pass  # without a network the dataset may be in the cache as a whole
        return datasets.load_dataset(request.identifier, request.config, split=request.split)
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"'{request.name}' is no file here, and as a dataset {_SPELLING} it could not be "
            f"loaded: {_reason(error)}. Check the name and the connection, or give "
            f"{request.alternative}."
        ) from None


def _saved(request: _Request) -> Any:
    """Return what `save_to_disk` wrote into a folder: a dataset, or a dict of its splits."""
    import datasets

    data = datasets.load_from_disk(request.identifier)
    if request.split is None:
        return data
    if isinstance(data, dict) and request.split in data:
        return data[request.split]
    splits = f"the splits {', '.join(data)}" if isinstance(data, dict) else "one split without name"
    raise DataError(
        f"'{request.name}' has {splits}, got '{request.split}'. Name one of these: folder::split."
    )


def find_column(
    fitting: Mapping[str, bool], wanted: str | None, *, usual: str, content: str, name: str
) -> str:
    """Return the column to read: the wanted one, else the usual one, else the only one that fits.

    Args:
        fitting: Each column, and whether it holds the content.
        wanted: The column that the user named, or None.
        usual: The usual name of such a column.
        content: The word for the content, for messages: "text", "images".
        name: The name of the source, for messages.

    Raises:
        DataError: If there is no such column, or several and none is named.
    """
    columns = [column for column, fits in fitting.items() if fits]
    others = [column for column in fitting if column not in columns]
    column = wanted or usual
    if column in columns:
        return column
    if wanted is None and len(columns) == 1:
        return columns[0]
    several = wanted is None and columns
    problem = f"several columns of {content}" if several else f"no column '{column}' of {content}"
    raise DataError(
        f"'{name}' has {problem}. Its columns of {content} are: {_listed(columns)}; others: "
        f"{_listed(others)}. Name one after the last colon of the source."
    )


def _listed(columns: list[str]) -> str:
    return ", ".join(columns[:_MOST_NAMES]) or "none"


def _reason(error: Exception) -> str:
    # Plain errors are about names and connections; the message of a parser may hold the data.
    is_plain = type(error) is ValueError or isinstance(error, (ConnectionError, FileNotFoundError))
    if not is_plain:
        return type(error).__name__
    return str(error).strip().split("\n")[0][:_LONGEST_REASON].rstrip(".")


def _split_name(name: str, splits: list[str], purpose: Purpose) -> str:
    for split in _SPLITS[purpose]:
        if split in splits:
            return split
    for split in _SPLITS[purpose]:
        variants = [name for name in splits if name.startswith((f"{split}_", f"{split}-"))]
        if len(variants) == 1:
            return variants[0]
    wanted = " or ".join(map(repr, _SPLITS[purpose]))
    raise DataError(
        f"The dataset '{name}' has no split {wanted} for {purpose}. Its splits are: "
        f"{', '.join(splits)}. Name one: id:config:split."
    )
