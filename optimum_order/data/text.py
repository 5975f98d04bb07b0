"""Text and token ids -> windows of tokens.

A source is a file (`tables.KINDS`), a dataset `id[:config][:split][:column]`, `builtin`, a list of
strings, of rows or of conversations, or a tensor of ids. Conversations become text through the chat
template of the tokenizer. Of a dataset of the Hub only as many documents are downloaded as are
needed. Text is only ever read: no message, log or file of ours holds any.

Calibration windows are drawn at random from one stream in which the documents follow one another,
separated by the BOS token, or by EOS where the tokenizer has no BOS. Evaluation windows are the
whole text in order, its documents joined by blank lines. Both begin with BOS where the tokenizer
has one: without BOS, a Llama or Gemma is another model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_order.data.builtin import reference_topics, standard_library_docstrings
from optimum_order.data.chat import Conversations
from optimum_order.data.draws import choose, shortage
from optimum_order.data.rows import SAMPLE, Rows, choose_column, numbered
from optimum_order.data.samples import MissingProcessorError, Purpose, Windows
from optimum_order.data.splits import Split, load_split
from optimum_order.data.tables import KINDS, File
from optimum_order.errors import DataError

LITERATURE = "literature"
"""The source by which papers on compression state perplexity: the test split of WikiText-2, all of
its lines joined by blank lines, tokenized at once with the tokenizer's own special tokens, and cut
into windows of 2048 tokens (Frantar et al. 2022, GPTQ, and those that compare with GPTQ)."""
_LITERATURE_LENGTH = 2048
_MOST_CHARACTERS = 2**26
"""A calibration reads a stretch of a larger corpus: some 16 million tokens."""
_STREAMED_CHARACTERS = 2**22
"""Of a dataset that is streamed: some million tokens, enough for many draws."""
_CHARACTERS_PER_TOKEN = 8
_SHUFFLED_ROWS = 1000
_DOCUMENTS_AT_ONCE = 1024
_LONGEST_SOURCE = 500
_NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class _Stream:
    """A text as one stream of tokens.

    Args:
        name: The name of the source.
        ids: (tokens,) int64.
        widths: (tokens,) int64, the UTF-8 bytes that each token spells; None if not known.
        first: The token that begins each window, or None.
        note: A remark for the user, or "".
    """

    name: str
    ids: Tensor
    widths: Tensor | None = None
    first: int | None = None
    note: str = ""


@dataclass(frozen=True)
class _Reading:
    """How a source is read.

    Args:
        processor: The model's tokenizer, or a processor that has one.
        seed: The seed of a calibration.
        purpose: The use of the text.
        tokens: Tokens that will be taken; None for all.
    """

    processor: Any
    seed: int
    purpose: Purpose
    tokens: int | None

    @property
    def characters(self) -> int:
        """Characters to read of a dataset that is streamed.

        They depend on the tokens in coarse steps only, so that the draws of one seed are parts of
        one permutation, however many of them a run takes.
        """
        characters = _STREAMED_CHARACTERS
        while characters < _CHARACTERS_PER_TOKEN * (self.tokens or 0):
            characters *= 2
        return characters

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Args:
            name: The name of the source, for messages.

        Raises:
            DataError: If there is none.
        """
        return _tokenizer(self.processor, name)


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
        source: A path of one of the kinds of `tables.KINDS` (a table may name its column:
            `path.jsonl:column`), a dataset as `id[:config][:split][:column]`, also a folder that
            `save_to_disk` wrote, a shortcut (wikitext2, c4, ultrachat), "builtin", "literature"
            (evaluation only, in windows of 2048 tokens), a list of strings (one document each), of
            rows or of conversations, a `datasets.Dataset`, or ids
            as a (tokens,) or (samples, length) integer tensor, which are taken unchanged.
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
    if isinstance(source, str) and source == LITERATURE:
        if purpose != "evaluation":
            raise DataError(
                "'literature' is what papers measure on, and nobody calibrates on it. Calibrate on "
                "wikitext2 or c4."
            )
        return _cut(_literature(processor), samples, _LITERATURE_LENGTH, None)
    if isinstance(source, Tensor):
        stream = _Stream("ids in memory", _checked_ids(source, length))
    else:
        tokens = None if samples is None else samples * length
        stream = _read(source, _Reading(processor, seed, purpose, tokens))
    return _cut(stream, samples, length, seed if purpose == "calibration" else None)


def _literature(processor: Any) -> _Stream:
    """Return the stream of tokens that papers measure on."""
    tokenizer = _tokenizer(processor, LITERATURE)
    split = load_split("wikitext2::test", "evaluation", "the files in the cache of datasets")
    text = "\n\n".join(split.data["text"])
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return _Stream(LITERATURE, torch.tensor(ids))


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
    notes = filter(None, (stream.note, shortage(stream.name, count, samples, "window")))
    return Windows(ids, stream.name, size, dropped, "; ".join(notes))


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


def _read(source: Any, reading: _Reading) -> _Stream:
    name, texts, note = _documents(source, reading)
    documents = [text for text in texts if text.strip()]
    tokenizer = reading.tokenizer(name)
    if reading.purpose == "calibration":
        documents = _stretch(documents, reading.seed)
    else:
        documents = ["\n\n".join(documents)] if documents else []
    ids, widths = _encode(tokenizer, documents, name)
    return _Stream(name, ids, widths, tokenizer.bos_token_id, note)


def _tokenizer(processor: Any, name: str) -> PreTrainedTokenizerBase:
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    tokenizer: PreTrainedTokenizerBase | None = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise MissingProcessorError(
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


def _documents(source: Any, reading: _Reading) -> tuple[str, Sequence[str], str]:
    """Return the name of a source, its texts, and a remark for the user, or ""."""
    if isinstance(source, (list, tuple)):
        return _from_memory(source, reading)
    if type(source).__module__.split(".")[0] == "datasets":
        return _from_dataset(Split("a dataset in memory", source, None), reading)
    if not isinstance(source, (str, Path)):
        raise _no_data(source)
    source = os.path.expanduser(str(source))
    _check_name(source)
    if source == "builtin":
        if reading.purpose == "calibration":
            return source, standard_library_docstrings(), ""
        return source, reference_topics(), ""
    if file := File.named(source):
        content = file.read()
        if isinstance(content, Rows):
            texts, note = _texts(content, reading)
            return file.name, texts, note
        return file.name, content, ""
    if Path(source).is_file():
        raise DataError(f"'{Path(source).name}' is not a {KINDS} file. Convert it to one of these.")
    split = load_split(source, reading.purpose, f"a {KINDS} file", stream=True)
    return _from_dataset(split, reading)


def _from_memory(source: Sequence[Any], reading: _Reading) -> tuple[str, Sequence[str], str]:
    name = f"{len(source)} documents in memory"
    if all(isinstance(text, str) for text in source):
        return name, source, ""
    if all(isinstance(turns, (list, tuple)) for turns in source):
        source = [{"messages": turns} for turns in source]
        name = f"{len(source)} conversations in memory"
    if not all(isinstance(row, Mapping) for row in source):
        raise _no_data(source)
    texts, note = _texts(Rows.of(name, source), reading)
    return name, texts, note


def _from_dataset(split: Split, reading: _Reading) -> tuple[str, Sequence[str], str]:
    """Return the texts of a dataset; of one that is streamed, only the first ones."""
    data = split.data
    if isinstance(data, dict):
        raise DataError(
            f"The dataset in memory has the splits {', '.join(data)}. Give one of them: "
            "dataset['train']."
        )
    streamed = not hasattr(data, "__len__")
    if streamed and reading.purpose == "calibration":
        data = data.shuffle(seed=reading.seed, buffer_size=_SHUFFLED_ROWS)
    features = data.features
    if features is not None:  # pictures and sounds are not decoded
        data = data.select_columns([name for name in features if _may_hold_text(features[name])])
    name = split.name
    try:
        if streamed:
            rows = Rows.streamed(name, data, split.column)
        else:
            sample = Rows.of(name, list(itertools.islice(data, SAMPLE)), split.column)
            rows = sample if len(data) <= SAMPLE else _whole(sample, data)
        texts, note = _texts(rows, reading, reading.characters if streamed else None)
    except DataError:
        raise
    except Exception as error:  # a stream may raise anything; its message may hold the text
        raise DataError(
            f"'{name}' could not be read to its end: {type(error).__name__}. Check the connection, "
            f"or give a {KINDS} file."
        ) from None
    return name, texts, note


def _whole(sample: Rows, data: Any) -> Rows:
    """Return all rows of a dataset, with the one column that its first rows say is to be read."""
    column, _ = choose_column(sample)
    columns = data.select_columns([column])
    return replace(sample, read=lambda: numbered(columns))


def _may_hold_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) not in _NUMBERS and type(feature).__name__ not in (
        "Audio",
        "Image",
        "Video",
    )


def _texts(rows: Rows, reading: _Reading, characters: int | None = None) -> tuple[list[str], str]:
    """Return the documents of a table, and a remark for the user, or "".

    Args:
        rows: The table.
        reading: How to read it.
        characters: Stop after so many; None reads all.
    """
    kind, values = rows.values()
    conversations = None
    if kind == "chat":
        tokenizer = reading.tokenizer(rows.name)
        template = getattr(reading.processor, "chat_template", None)
        conversations = Conversations(rows.name, tokenizer, template)
    texts = []
    size = 0
    for place, value in values:
        if conversations is not None:
            text = conversations.render(place, value)
        else:
            text = _text(rows.name, place, value)
        if not text:
            continue
        texts.append(text)
        size += len(text)
        if characters is not None and size >= characters:
            break
    return texts, conversations.note() if conversations is not None else ""


def _text(name: str, place: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"'{name}', {place}: the text must be a string, got {type(value).__name__}.")


def _no_data(source: Any) -> DataError:
    return DataError(
        f"Data is a {KINDS} path, a dataset of the Hub, 'builtin', a list of strings, of rows or "
        f"of conversations, or a tensor of ids, got {type(source).__name__}."
    )


def _check_name(source: str) -> None:
    if not source.strip():
        got = "an empty name"
    elif len(source) > _LONGEST_SOURCE or "\n" in source:
        # very likely the text itself, which must not be repeated here
        got = "a long text. Text itself is given as a list of strings"
    else:
        return
    raise DataError(f"Data is named by a path, a dataset of the Hub or 'builtin', got {got}.")
