"""A tokenizer in the fields of a GGUF file, from which llama.cpp makes the same tokens.

llama.cpp knows two kinds that our models have. "gpt2" merges bytes, after the text was split by a
rule that has a name; "llama" merges characters, where a merge has a score in place of a rank. A
tokenizer that does anything else is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_order.errors import ArtifactError, FormatError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    f"{_CONTRACTIONS}|{_WORDS}|" + r"\p{N}|" + _REST: "qwen2",
    f"{_CONTRACTIONS}|{_WORDS}|" + r"\p{N}{1,3}|" + _REST: "dbrx",
}
"""Names of the rules that are one regular expression."""
_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""Names of the same rules where a word that is a token is not merged (`ignore_merges`)."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NO_SCORE = -1e6
"""Of a token that no merge makes: lower than that of any merge."""
_SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
}
"""Names of the ids of special tokens, here and in the file."""


def why_not(tokenizer: Any, rows: int) -> str | None:
    """Return why llama.cpp cannot tokenize as a tokenizer does, or None if it can.

    Args:
        tokenizer: The tokenizer, or None.
        rows: Rows of the embeddings.

    Returns:
        A sentence.
    """
    try:
        fields(tokenizer, rows)
    except FormatError as error:
        return str(error)
    return None


def fields(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Return what a file says of the vocabulary, by key.

    Args:
        tokenizer: The tokenizer; None if the model has none, and reads ids alone.
        rows: Rows of the embeddings; ids that the tokenizer does not use are filled up.

    Raises:
        FormatError: If llama.cpp cannot tokenize so.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(
            f"Its {type(tokenizer).__name__} is no tokenizer that a tokenizer.json describes."
        )
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise FormatError(f"Its tokenizer is of the kind {model['type']}; BPE can be written.")
    added = {entry["id"]: entry for entry in rules["added_tokens"]}
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens |= {index: entry["content"] for index, entry in added.items()}
    if max(tokens) >= rows:
        raise FormatError(
            f"Its tokenizer has the id {max(tokens)}, and its embeddings have {rows} rows."
        )
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    values = {
        **(_characters(rules, listed) if model["byte_fallback"] else _bytes(rules)),
        "tokens": listed,
        "token_type": [_kind(index, tokens, added, model) for index in range(rows)],
        **_specials(tokenizer),
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return named | ({"tokenizer.chat_template": template} if template else {})


def _kind(
    index: int, tokens: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]
) -> int:
    """Return the kind of a token, as llama.cpp numbers them."""
    if index not in tokens:
        return _UNUSED
    if tokens[index] == model["unk_token"]:
        return _UNKNOWN
    if index in added:
        return _CONTROL if added[index]["special"] else _USER
    if model["byte_fallback"] and _BYTE_TOKEN.fullmatch(tokens[index]):
        return _BYTE
    return _NORMAL


def _specials(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them frame every text."""
    ids = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = ids["bos_token_id"], ids["eos_token_id"]
    frames = {
        (add_bos, add_eos): [bos] * add_bos + bare + [eos] * add_eos
        for add_bos in (False, True)
        for add_eos in (False, True)
    }
    frame = next((key for key, ids in frames.items() if ids == framed), None)
    if frame is None:
        raise FormatError("Its tokenizer adds other tokens to a text than one at each end.")
    numbers = {_SPECIAL[name]: value for name, value in ids.items() if value is not None}
    return numbers | {"add_bos_token": frame[0], "add_eos_token": frame[1]}


def tokenizer(values: Mapping[str, Any], rows: int) -> Any:
    """Return the tokenizer of a file: what `fields` says, backwards.

    Args:
        values: The fields of the file, which nobody has checked.
        rows: Rows of the embeddings.

    Raises:
        FormatError: If it is of a kind, or splits text by a rule, that is not known here.
        ArtifactError: If the fields do not fit together.
    """

    def said(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise ArtifactError(f"The GGUF file has {key} of a tokenizer that cannot be read.")
        return value

    model, rule = said("model", str), said("pre", str, "default")
    tokens, merges = said("tokens", list, []), said("merges", list, [])
    kinds = said("token_type", list, [_NORMAL] * len(tokens))
    if model != "gpt2" or rule not in (*_SPLITTERS, *_WHOLE_WORDS.values()):
        raise FormatError(f"Its tokenizer is of the kind {model}, and splits text as '{rule}'.")
    if not 0 < len(tokens) <= rows or len(kinds) != len(tokens) or not _are_texts(tokens, merges):
        raise ArtifactError(
            f"The GGUF file has {len(tokens)} tokens of {len(kinds)} kinds, and embeddings of "
            f"{rows} rows."
        )
    whole = rule in _WHOLE_WORDS.values()
    used = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    try:
        backend = Tokenizer(
            models.BPE(used, [tuple(pair.split(" ", 1)) for pair in merges], ignore_merges=whole)
        )
    except Exception as error:  # tokenizers raises `Exception` itself
        raise ArtifactError("The GGUF file has merges of tokens that it does not have.") from error
    plain = next(key for key, name in _WHOLE_WORDS.items() if name == rule) if whole else rule
    backend.pre_tokenizer = _SPLITTERS[plain]()
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER)
    ]
    backend.add_tokens(added)
    ids = {name: said(key, int) for name, key in _SPECIAL.items()}
    if any(index is not None and not 0 <= index < len(tokens) for index in ids.values()):
        raise ArtifactError("The GGUF file names a special token that it does not have.")
    names = {
        name.removesuffix("_id"): tokens[index] for name, index in ids.items() if index is not None
    }
    first = names.get("bos_token") if said("add_bos_token", bool, whole) else None
    last = names.get("eos_token") if said("add_eos_token", bool, False) else None
    _frame(backend, first, last)
    template = values.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        **names,
    )


def _are_texts(*lists: list[Any]) -> bool:
    return all(type(text) is str for texts in lists for text in texts)


def _frame(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Have a tokenizer put tokens before and after every text."""
    ends = [token for token in (first, last) if token is not None]
    if ends:
        before, after = [first] if first else [], [last] if last else []
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
            + [f"{token}:1" for token in after],
            special_tokens=[(token, backend.token_to_id(token)) for token in ends],
        )


# Bytes


def _split_by(rule: str) -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), bytes_])


def _split_digits() -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])


_SPLITTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _split_digits,
    **{name: functools.partial(_split_by, rule) for rule, name in RULES.items()},
}
"""What splits text by each rule that has a name."""


def _bytes(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a tokenizer that merges bytes."""
    model = rules["model"]
    # llama.cpp does not compose characters; most text comes composed
    if rules["normalizer"] not in (None, {"type": "NFC"}):
        raise FormatError(
            f"Its tokenizer changes text before it splits it ({_named(rules['normalizer'])}), "
            "which llama.cpp does not do to bytes."
        )
    rule = _rule(rules["pre_tokenizer"])
    if rule is None:
        raise FormatError(
            "llama.cpp has no name for the way its tokenizer splits text "
            f"({_named(rules['pre_tokenizer'])})."
        )
    if model["ignore_merges"]:
        if rule not in _WHOLE_WORDS:
            raise FormatError(f"llama.cpp merges whole words with the rule '{rule}'.")
        rule = _WHOLE_WORDS[rule]
    merges = [" ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": rule, "merges": merges}


def _rule(splitter: Any) -> str | None:
    """Return llama.cpp's name of the way in which text is split, or None if it has none."""
    steps = _steps(splitter, "pretokenizers")
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex"):
        digits = {"type": "Digits", "individual_digits": True}
        return {0: "gpt-2", 1: "smollm" if steps[0] == digits else None}.get(len(steps) - 1)
    if len(steps) != 2 or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return RULES.get(split["pattern"].get("Regex", ""))


# Characters


def _characters(rules: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the fields of a tokenizer that merges characters, and falls back to bytes."""
    model = rules["model"]
    prefixed = _prefixes(rules)
    if prefixed is None:
        raise FormatError(
            "llama.cpp does not prepare text as its tokenizer does "
            f"({_named(rules['normalizer'])}, {_named(rules['pre_tokenizer'])})."
        )
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    return {
        "model": "llama",
        "pre": "default",
        "scores": [float(-ranks[token]) if token in ranks else _NO_SCORE for token in tokens],
        "add_space_prefix": prefixed,
    }


def _prefixes(rules: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before a text, or None if text is prepared in other ways."""
    steps = _steps(rules["normalizer"], "normalizers")
    splits = _steps(rules["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if steps == [{"type": "Prepend", "prepend": _SPACE}, replace] and not splits:
        return True
    # spaces are gone when text is split at them, so the rule of Gemma's tokenizer splits nothing
    if steps == [replace] and all(_splits_at_spaces(split) for split in splits):
        return False
    if not steps and len(splits) == 1 and splits[0].get("type") == "Metaspace":
        scheme = splits[0].get("prepend_scheme")
        if splits[0].get("replacement") == _SPACE and not splits[0].get("split", True):
            return {"first": True, "never": False}.get(str(scheme))
    return None


def _splits_at_spaces(split: Mapping[str, Any]) -> bool:
    return split.get("type") == "Split" and split.get("pattern") == {"String": " "}


def _steps(rule: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a rule, which may be a sequence of rules."""
    if rule is None:
        return []
    return list(rule[key]) if rule["type"] == "Sequence" else [rule]


def _named(rule: Any) -> str:
    """Return the kinds of the steps of a rule, for a message."""
    if rule is None:
        return "nothing"
    steps = rule.get("normalizers") or rule.get("pretokenizers") or [rule]
    return ", ".join(step["type"] for step in steps)
