"""Text and token ids -> windows of tokens, with the digest that goes into the manifest.

A source is a .txt, .jsonl or .parquet file, a Hub dataset `id[:config][:split][:column]`, `builtin`, a list of
strings or a tensor of ids. Text is only ever read: it is in no message, log or file of ours.

Calibration windows are drawn at random from one stream in which the documents follow one another, separated by the
BOS token, or by EOS where there is none. Evaluation windows are the whole text in order, its documents joined by
blank lines. Both begin with BOS where the tokenizer has one: a Llama or Gemma without it is not itself.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_order.data.samples import Windows
from optimum_order.errors import DataError

__all__ = ["Windows", "docstrings", "load", "reference_topics", "standard_library_docstrings"]

Purpose = Literal["calibration", "evaluation"]

_FILE = re.compile(r"(?P<path>.+\.(?P<kind>(?i:txt|jsonl|parquet)))(:(?P<column>[^:/\\]+))?")
_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation")}
_MOST_CHARACTERS = 2**26  # of a larger corpus a calibration reads a stretch: some 16 million tokens
_DOCUMENTS_AT_ONCE = 1024
_LONGEST_SOURCE = 500
_MOST_NAMES = 20


def load(
    source: str | Path | Sequence[str] | Tensor,
    processor: Any,
    *,
    samples: int | None,
    length: int,
    seed: int = 0,
    purpose: Purpose = "calibration",
    draw: int = 0,
) -> Windows:
    """Windows of tokens from wherever the user has text.

    Args:
        source: A .txt, .jsonl or .parquet path (the latter two may name their column: `path.jsonl:column`), a Hub
            dataset as `id[:config][:split][:column]`, "builtin", a list of strings (one document each), or ids as a
            (tokens,) or (samples, length) integer tensor, which are taken as they are.
        processor: The model's tokenizer, or a processor that has one; None will do for ids.
        samples: How many windows, or None for as many full ones as there are. A text that has at least one but
            fewer gives those, and a note that says so.
        length: Tokens in a window.
        seed: Which windows a calibration draws, without replacement. An evaluation takes the first.
        purpose: What the windows are for. It chooses between calibration and evaluation text where a source has
            both (`builtin`; the train or test split of a dataset), and how windows are cut.
        draw: Which block of `samples` windows of the seed's permutation. Two draws of one seed share no window.

    Raises:
        DataError: If the source cannot be read or has not one full window, or no window is left for this draw.
    """
    if length < 2 or (samples is not None and samples < 1) or draw < 0:
        raise DataError(
            "Windows need samples of 1 or more, a length of 2 or more and a draw of 0 or more, got "
            f"samples={samples}, length={length}, draw={draw}."
        )
    if isinstance(source, Tensor):
        name, begin = "ids in memory", None
        ids, widths = _given_ids(source, length), None
    else:
        name, documents = _documents(source, purpose)
        documents = [text for text in documents if text.strip()]
        tokenizer = _tokenizer(processor, name)
        begin = tokenizer.bos_token_id
        if purpose == "calibration":
            ids, widths = _encode(tokenizer, _stretch(documents, seed), name)
        else:
            ids, widths = _encode(tokenizer, ["\n\n".join(documents)] if documents else [], name)
    taken = length - (begin is not None)
    count = len(ids) // taken
    if count == 0:
        raise DataError(
            f"{name} has {len(ids)} tokens of text, and one window of {length} needs {taken}. Give more text"
            + (
                f", or a sequence length of at most {len(ids) + length - taken}."
                if len(ids) > 1
                else "."
            )
        )
    chosen, note = choose(
        count, samples, seed if purpose == "calibration" else None, draw, name, "windows"
    )
    windows = ids[: count * taken].view(count, taken)[chosen]
    if begin is not None:
        windows = torch.cat([torch.full((len(windows), 1), begin), windows], dim=1)
    size = None
    if widths is not None:
        predicted = widths[: count * taken].view(count, taken)[chosen]
        size = int((predicted if begin is not None else predicted[:, 1:]).sum())
    return Windows(windows, name, size, len(ids) - len(windows) * taken, note)


def choose(
    count: int, samples: int | None, seed: int | None, draw: int, name: str, unit: str
) -> tuple[Tensor, str]:
    """Indices of the samples to take, of `count`, and a note where they are fewer than asked for.

    Args:
        count: How many there are.
        samples: How many to take; None for all.
        seed: Which permutation they are taken from; None for their own order.
        draw: Which block of `samples` of it.
        name: Of the source, for messages.
        unit: What they are called there.

    Raises:
        DataError: If too few are left for this draw.
    """
    samples = count if samples is None else samples
    first = draw * samples
    if draw and first + samples > count:
        raise DataError(
            f"{name} has {count} {unit}, enough for {count // samples} disjoint draws of {samples}; asked for draw "
            f"{draw} (the first is 0). Give more data, or ask for fewer {unit}."
        )
    if seed is None:
        order = torch.arange(count)
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    note = f"{name} has {count} {unit}, {samples} were asked for" if samples > count else ""
    return order[first : first + samples], note


def _given_ids(ids: Tensor, length: int) -> Tensor:
    """Ids of the user's own as one stream (tokens,) that windows of `length` cut back into its rows."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(f"Token ids must be integers, got a tensor of {ids.dtype}.")
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[1] != length):
        raise DataError(
            f"Token ids must be (tokens,) or (samples, {length}), which is the sequence length asked for, got "
            f"{tuple(ids.shape)}."
        )
    if ids.numel() and int(ids.min()) < 0:
        raise DataError(f"Token ids must not be negative, got {int(ids.min())}. Leave padding out.")
    return ids.detach().cpu().long().flatten()


# --- text -> one stream of ids ---------------------------------------------------------------------------------------


def _tokenizer(processor: Any, name: str) -> PreTrainedTokenizerBase:
    tokenizer = (
        processor
        if isinstance(processor, PreTrainedTokenizerBase)
        else getattr(processor, "tokenizer", None)
    )
    if tokenizer is None:
        raise DataError(
            f"The text of {name} needs a tokenizer, and there is none with the model. Save one beside the model, pass "
            "one as 'processor', or give token ids."
        )
    return tokenizer


def _stretch(documents: list[str], seed: int) -> list[str]:
    """All documents, or of a corpus too large to tokenize a stretch that begins anywhere."""
    if sum(map(len, documents)) <= _MOST_CHARACTERS:
        return documents
    begin = int(torch.randint(len(documents), (), generator=torch.Generator().manual_seed(seed)))
    kept, characters = [], 0
    for text in documents[begin:] + documents[:begin]:
        kept.append(text)
        characters += len(text)
        if characters >= _MOST_CHARACTERS:
            break
    return kept


def _encode(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], name: str
) -> tuple[Tensor, Tensor | None]:
    """The ids (tokens,) of all documents with a separator between any two, and the bytes each token spells.

    The bytes are None for a tokenizer written in Python, which does not say where in the text a token is.
    """
    between = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    ids: list[np.ndarray] = []
    widths: list[np.ndarray] = []
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = documents[first : first + _DOCUMENTS_AT_ONCE]
        try:
            ends = [_byte_ends(text) for text in texts]
        except UnicodeEncodeError:
            raise DataError(
                f"{name} has characters that are no Unicode text (lone surrogates). Repair it."
            ) from None
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,  # no warning about the model's length: windows are cut below
        )
        for index, found in enumerate(encoded["input_ids"]):
            if not found:
                continue
            if ids and between is not None:
                ids.append(np.array([between]))
                widths.append(np.array([0]))
            ids.append(np.array(found))
            if tokenizer.is_fast:
                at = ends[index][np.array(encoded["offset_mapping"][index])[:, 1]]
                at[-1] = ends[index][
                    -1
                ]  # what is stripped or normalised away belongs to the token after it
                widths.append(np.diff(np.maximum.accumulate(at), prepend=0))
    joined = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids]))
    return joined, torch.from_numpy(
        np.concatenate([np.empty(0, np.int64), *widths])
    ) if tokenizer.is_fast else None


def _byte_ends(text: str) -> np.ndarray:
    """How many UTF-8 bytes the first 0, 1, 2, ... characters take, (characters + 1,)."""
    code = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.concatenate([[0], np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF))])


# --- source -> documents ---------------------------------------------------------------------------------------------


def _documents(source: Any, purpose: Purpose) -> tuple[str, Sequence[str]]:
    """What to call the source, and its texts."""
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
        return f"{len(source)} documents in memory", source
    if not isinstance(source, (str, Path)):
        raise DataError(
            "Data is a .txt, .jsonl or .parquet path, a Hub dataset, 'builtin', a list of strings or a tensor of ids, "
            f"got {type(source).__name__}."
        )
    source = os.path.expanduser(str(source))
    if len(source) > _LONGEST_SOURCE or "\n" in source or not source.strip():
        # very likely the text itself, so it is not repeated here
        raise DataError(
            "Data is named by a path, a Hub dataset or 'builtin', got "
            + (
                "an empty name."
                if not source.strip()
                else "a long text. Text itself is given as a list of strings."
            )
        )
    if source == "builtin":
        return (
            source,
            standard_library_docstrings() if purpose == "calibration" else reference_topics(),
        )
    if found := _FILE.fullmatch(source):
        return _from_file(Path(found["path"]), found["kind"].lower(), found["column"])
    if Path(source).is_file():
        raise DataError(
            f"'{Path(source).name}' is not a .txt, .jsonl or .parquet file. Convert it to one of these."
        )
    name, found, column = dataset(source, purpose, "a .txt, .jsonl or .parquet file")
    textual = {
        key: getattr(f, "dtype", None) in ("string", "large_string")
        for key, f in found.features.items()
    }
    return name, [text for text in found[_column(textual, column, name)] if text]


def _from_file(path: Path, kind: str, column: str | None) -> tuple[str, Sequence[str]]:
    name = path.name if column is None else f"{path.name}:{column}"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The file '{path}' {what}. Give the path of a .txt, .jsonl or .parquet file."
        )
    if column is not None and kind == "txt":
        raise DataError(
            f"'{path.name}' is plain text and has no column '{column}'. Leave ':{column}' out."
        )
    try:
        if kind == "parquet":
            return name, _from_parquet(path, column)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path.name}' is not UTF-8 text: see byte {error.start}. Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise DataError(
            f"'{path.name}' cannot be read: {error.strerror or type(error).__name__}."
        ) from None
    return name, [text] if kind == "txt" else _from_json_lines(text, column, path.name)


def _from_json_lines(text: str, column: str | None, name: str) -> list[str]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # its message and its cause would hold the line
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"'{name}', line {number}: expected a JSON object such as {{\"text\": ...}}."
            )
        rows.append((number, row))
    if not rows:
        return []
    textual: dict[str, bool] = {}
    for _, row in rows:
        for key, value in row.items():
            textual[key] = textual.get(key, False) or isinstance(value, str)
    column = _column(textual, column, name)
    for number, row in rows:
        if not isinstance(row.get(column), (str, type(None))):
            raise DataError(
                f"'{name}', line {number}: '{column}' must be a string, got {type(row[column]).__name__}."
            )
    return [row[column] for _, row in rows if row.get(column)]


def _from_parquet(path: Path, column: str | None) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        column = _column(
            {field.name: any(is_(field.type) for is_ in kinds) for field in schema},
            column,
            path.name,
        )
        return parquet.read_table(path, columns=[column]).column(0).drop_null().to_pylist()
    except pyarrow.ArrowInvalid:
        raise DataError(
            f"'{path.name}' is not a parquet file, or it is damaged. Write it anew."
        ) from None


def _column(textual: Mapping[str, bool], wanted: str | None, name: str) -> str:
    """The column that holds the text, of columns that are `textual` or not: `wanted`, "text", or the only one."""
    strings = [column for column, is_text in textual.items() if is_text]
    column = wanted or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if column in strings:
        return column
    several = wanted is None and strings
    others = [column for column in textual if column not in strings]
    raise DataError(
        f"'{name}' has "
        + ("several columns of text. " if several else f"no column '{wanted or 'text'}' of text. ")
        + f"Its columns of text are: {', '.join(strings[:_MOST_NAMES]) or 'none'}; others: "
        f"{', '.join(others[:_MOST_NAMES]) or 'none'}. Name one after the last colon of the source."
    )


def dataset(source: str, purpose: Purpose, instead: str) -> tuple[str, Any, str | None]:
    """One split of a dataset of the Hub, or of a local folder, that the `datasets` library can load.

    Args:
        source: `id[:config][:split][:column]`.
        purpose: Chooses the split where none is named.
        instead: What else could be given, for messages.

    Returns:
        What to call it, the split, and the column that is named, if one is.

    Raises:
        DataError: If there is no such dataset or split.
    """
    import datasets

    parts = re.split(r":(?![^\[]*\])", source)  # train[:100] is a split
    identifier, config, split, column = (part or None for part in (parts + [""] * 3)[:4])
    if len(parts) > 4 or identifier is None:
        raise DataError(f"A Hub dataset is written id[:config][:split][:column], got '{source}'.")
    local = Path(identifier).is_dir()
    if not local and (
        identifier.startswith((".", "/", "~")) or identifier.count("/") > 1 or "\\" in identifier
    ):
        raise DataError(f"The path '{identifier}' does not exist.")
    name = ":".join([Path(identifier).name, *parts[1:]]) if local else source
    try:
        found = datasets.load_dataset(identifier, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # only plain errors are about names and connections; what a parser says may hold the text
        plain = type(error) is ValueError or isinstance(error, (ConnectionError, FileNotFoundError))
        reason = str(error).strip().split("\n")[0][:300] if plain else type(error).__name__
        raise DataError(
            f"'{name}' is no file here, and as a dataset id[:config][:split][:column] it could not be loaded: "
            f"{reason.rstrip('.')}. Check the name and the connection, or give {instead}."
        ) from None
    if isinstance(found, dict):
        choice = next((s for s in _SPLITS[purpose] if s in found), None)
        if choice is None:
            raise DataError(
                f"The dataset '{name}' has no split {' or '.join(map(repr, _SPLITS[purpose]))} for {purpose}. Its "
                f"splits are: {', '.join(found)}. Name one: id:config:split."
            )
        found = found[choice]
    return name, found, column


# --- the built-in text -----------------------------------------------------------------------------------------------


def docstrings(file: Path) -> Iterator[str]:
    """Yield every docstring of a Python source file, outermost first; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not our business
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text.encode("utf-8", "replace").decode()


@functools.cache
def standard_library_docstrings() -> tuple[str, ...]:
    """Every distinct docstring of the running Python's standard library, in one order; its tests are left out."""
    root, files = sysconfig.get_path("stdlib"), []
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "pydoc_data",
        "__pycache__",
    }
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - skipped)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return tuple(dict.fromkeys(text for file in files for text in docstrings(file)))


def reference_topics() -> tuple[str, ...]:
    """The reference manual that CPython carries for `help()`, one document for each topic."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))
