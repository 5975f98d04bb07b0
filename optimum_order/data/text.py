"""Text and token ids -> windows of tokens.

A source is a .txt, .jsonl or .parquet file, a dataset `id[:config][:split][:column]`, `builtin`, a
list of strings or a tensor of ids. Text is only ever read: no message, log or file of ours holds
any.

Calibration windows are drawn at random from one stream in which the documents follow one another,
separated by the BOS token, or by EOS where the tokenizer has no BOS. Evaluation windows are the
whole text in order, its documents joined by blank lines. Both begin with BOS where the tokenizer
has one: without BOS, a Llama or Gemma is another model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_order.data.builtin import reference_topics, standard_library_docstrings
from optimum_order.data.draws import choose, shortage
from optimum_order.data.samples import Purpose, Windows
from optimum_order.data.splits import find_column, load_split
from optimum_order.errors import DataError

_FILE = re.compile(r"(?P<path>.+\.(?P<kind>(?i:txt|jsonl|parquet)))(:(?P<column>[^:/\\]+))?")
_MOST_CHARACTERS = 2**26
"""A calibration reads a stretch of a larger corpus: some 16 million tokens."""
_DOCUMENTS_AT_ONCE = 1024
_LONGEST_SOURCE = 500


@dataclass(frozen=True)
class _Stream:
    """A text as one stream of tokens.

    Args:
        name: The name of the source.
        ids: (tokens,) int64.
        widths: (tokens,) int64, the UTF-8 bytes that each token spells; None if not known.
        first: The token that begins each window, or None.
    """

    name: str
    ids: Tensor
    widths: Tensor | None = None
    first: int | None = None


def load(
    source: str | Path | Sequence[str] | Tensor,
    processor: Any,
    *,
    samples: int | None,
    length: int,
    seed: int = 0,
    purpose: Purpose = "calibration",
) -> Windows:
    """Return windows of tokens of any source of text.

    Args:
        source: A .txt, .jsonl or .parquet path (the latter two may name their column:
            `path.jsonl:column`), a dataset as `id[:config][:split][:column]`, "builtin", a list of
            strings (one document each), or ids as a (tokens,) or (samples, length) integer tensor,
            which are taken unchanged.
        processor: The model's tokenizer, or a processor that has one; ids need none.
        samples: Windows to take; None takes every full one. A text with fewer windows, but at least
            one, gives all of them and a note.
        length: Tokens in a window.
        seed: The permutation that a calibration draws from, without replacement. An evaluation
            takes the first windows.
        purpose: Chooses between calibration and evaluation text where a source has both
            (`builtin`; the train or test split of a dataset), and the way windows are cut.

    Raises:
        DataError: If the source cannot be read, or has not one full window.
    """
    if length < 2 or (samples is not None and samples < 1):
        raise DataError(
            "Windows need samples of 1 or more and a length of 2 or more, got "
            f"samples={samples}, length={length}."
        )
    if isinstance(source, Tensor):
        stream = _Stream("ids in memory", _checked_ids(source, length))
    else:
        stream = _read(source, processor, seed, purpose)
    return _cut(stream, samples, length, seed if purpose == "calibration" else None)


def _cut(stream: _Stream, samples: int | None, length: int, seed: int | None) -> Windows:
    begins = stream.first is not None
    content = length - begins
    count = len(stream.ids) // content
    if count == 0:
        tokens = len(stream.ids)
        shorter = f", or a sequence length of at most {tokens + begins}" if tokens > 1 else ""
        raise DataError(
            f"{stream.name} has {tokens} tokens of text, and one window of {length} needs "
            f"{content}. Give more text{shorter}."
        )
    index = choose(count, samples, seed)
    ids = stream.ids[: count * content].view(count, content)[index]
    if stream.first is not None:
        ids = torch.cat([torch.full((len(ids), 1), stream.first), ids], dim=1)
    size = None
    if stream.widths is not None:
        widths = stream.widths[: count * content].view(count, content)[index]
        # the first token of a window is not predicted
        size = int(widths.sum() if begins else widths[:, 1:].sum())
    dropped = len(stream.ids) - len(index) * content
    return Windows(ids, stream.name, size, dropped, shortage(stream.name, count, samples, "window"))


def _checked_ids(ids: Tensor, length: int) -> Tensor:
    """Return the user's ids as one stream (tokens,), which windows cut into its rows again."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(f"Token ids must be integers, got a tensor of {ids.dtype}.")
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[1] != length):
        raise DataError(
            f"Token ids must be (tokens,) or (samples, {length}), which is the sequence length "
            f"asked for, got {tuple(ids.shape)}."
        )
    if ids.numel() and int(ids.min()) < 0:
        raise DataError(f"Token ids must not be negative, got {int(ids.min())}. Leave padding out.")
    return ids.detach().cpu().long().flatten()


# --- text -> one stream of tokens ----------------------------------------------------------------


def _read(source: Any, processor: Any, seed: int, purpose: Purpose) -> _Stream:
    name, texts = _documents(source, purpose)
    documents = [text for text in texts if text.strip()]
    tokenizer = _tokenizer(processor, name)
    if purpose == "calibration":
        documents = _stretch(documents, seed)
    else:
        documents = ["\n\n".join(documents)] if documents else []
    ids, widths = _encode(tokenizer, documents, name)
    return _Stream(name, ids, widths, tokenizer.bos_token_id)


def _tokenizer(processor: Any, name: str) -> PreTrainedTokenizerBase:
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    tokenizer: PreTrainedTokenizerBase | None = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise DataError(
            f"The text of {name} needs a tokenizer, and there is none with the model. Save one "
            "beside the model, pass one as 'processor', or give token ids."
        )
    return tokenizer


def _stretch(documents: list[str], seed: int) -> list[str]:
    """Return all documents, or from too large a corpus a stretch that begins anywhere."""
    if sum(map(len, documents)) <= _MOST_CHARACTERS:
        return documents
    begin = int(torch.randint(len(documents), (), generator=torch.Generator().manual_seed(seed)))
    stretch: list[str] = []
    characters = 0
    for text in documents[begin:] + documents[:begin]:
        stretch.append(text)
        characters += len(text)
        if characters >= _MOST_CHARACTERS:
            break
    return stretch


def _encode(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], name: str
) -> tuple[Tensor, Tensor | None]:
    """Return the ids (tokens,) of all documents, separated, and the bytes each token spells.

    The bytes are None for a tokenizer written in Python, which gives no offsets into the text.
    """
    separator = tokenizer.bos_token_id
    if separator is None:
        separator = tokenizer.eos_token_id
    ids: list[np.ndarray[Any, Any]] = [np.empty(0, np.int64)]
    widths = list(ids)
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
        for index, document in enumerate(encoded["input_ids"]):
            if not document:
                continue
            if len(ids) > 1 and separator is not None:
                ids.append(np.array([separator]))
                widths.append(np.array([0]))
            ids.append(np.array(document))
            if tokenizer.is_fast:
                offsets = np.array(encoded["offset_mapping"][index])
                stops = ends[index][offsets[:, 1]]
                # bytes that are stripped or normalized away belong to the token after them
                stops[-1] = ends[index][-1]
                widths.append(np.diff(np.maximum.accumulate(stops), prepend=0))
    spelled = torch.from_numpy(np.concatenate(widths)) if tokenizer.is_fast else None
    return torch.from_numpy(np.concatenate(ids)), spelled


def _byte_ends(text: str) -> np.ndarray[Any, Any]:
    """Return the UTF-8 bytes of the first 0, 1, 2, ... characters, (characters + 1,)."""
    code = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.concatenate([[0], np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF))])


# --- source -> documents -------------------------------------------------------------------------


def _documents(source: Any, purpose: Purpose) -> tuple[str, Sequence[str]]:
    """Return the name of a source, and its texts."""
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
        return f"{len(source)} documents in memory", source
    if not isinstance(source, (str, Path)):
        raise DataError(
            "Data is a .txt, .jsonl or .parquet path, a dataset of the Hub, 'builtin', a list of "
            f"strings or a tensor of ids, got {type(source).__name__}."
        )
    source = os.path.expanduser(str(source))
    _check_name(source)
    if source == "builtin":
        if purpose == "calibration":
            return source, standard_library_docstrings()
        return source, reference_topics()
    if match := _FILE.fullmatch(source):
        return _from_file(Path(match["path"]), match["kind"].lower(), match["column"])
    if Path(source).is_file():
        raise DataError(
            f"'{Path(source).name}' is not a .txt, .jsonl or .parquet file. Convert it to one."
        )
    split = load_split(source, purpose, "a .txt, .jsonl or .parquet file")
    textual = {
        name: getattr(feature, "dtype", None) in ("string", "large_string")
        for name, feature in split.data.features.items()
    }
    column = _text_column(textual, split.column, split.name)
    return split.name, [text for text in split.data[column] if text]


def _check_name(source: str) -> None:
    if not source.strip():
        got = "an empty name"
    elif len(source) > _LONGEST_SOURCE or "\n" in source:
        # very likely the text itself, which must not be repeated here
        got = "a long text. Text itself is given as a list of strings"
    else:
        return
    raise DataError(f"Data is named by a path, a dataset of the Hub or 'builtin', got {got}.")


def _from_file(path: Path, kind: str, column: str | None) -> tuple[str, Sequence[str]]:
    name = path.name if column is None else f"{path.name}:{column}"
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The file '{path}' {problem}. Give the path of a .txt, .jsonl or .parquet file."
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
        reason = error.strerror or type(error).__name__
        raise DataError(f"'{path.name}' cannot be read: {reason}.") from None
    return name, [text] if kind == "txt" else _from_json_lines(text, column, path.name)


def _from_json_lines(text: str, wanted: str | None, name: str) -> list[str]:
    rows: list[tuple[int, dict[str, Any]]] = []
    textual: dict[str, bool] = {}
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
        for key, value in row.items():
            textual[key] = textual.get(key, False) or isinstance(value, str)
    if not rows:
        return []
    column = _text_column(textual, wanted, name)
    for number, row in rows:
        value = row.get(column)
        if not isinstance(value, (str, type(None))):
            raise DataError(
                f"'{name}', line {number}: '{column}' must be a string, got {type(value).__name__}."
            )
    return [row[column] for _, row in rows if row.get(column)]


def _from_parquet(path: Path, wanted: str | None) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        textual = {field.name: any(is_(field.type) for is_ in kinds) for field in schema}
        column = _text_column(textual, wanted, path.name)
        texts: list[str] = parquet.read_table(path, columns=[column])[0].drop_null().to_pylist()
    except pyarrow.ArrowInvalid:
        raise DataError(
            f"'{path.name}' is not a parquet file, or it is damaged. Write it anew."
        ) from None
    return texts


def _text_column(textual: dict[str, bool], wanted: str | None, name: str) -> str:
    return find_column(textual, wanted, usual="text", content="text", name=name)
