"""A GGUF file of somebody else, as a model to begin with.

transformers makes the config of what the file says, or a config.json lies beside the file. Either
way the config must say of the model what the file says, and have a place for every tensor.

What a run does not change is written again as it was: fields, tokenizer, and tensors of any type.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from optimum_order.errors import (
    ArtifactError,
    FormatError,
    OptimumOrderError,
    missing_extra,
)
from optimum_order.files import is_plain, read_json
from optimum_order.formats import gguf_families, gguf_vocabulary
from optimum_order.formats.gguf_file import Field, GGUFFile
from optimum_order.models.documents import documents
from optimum_order.models.source import read_config, skeleton

logger = logging.getLogger(__name__)

FILE = "model.gguf"
_EMBEDDING = "token_embd.weight"
_TEMPLATE = "tokenizer.chat_template"
_CLOSE = 1e-6
"""Relative difference of numbers that were float32 once."""
_CHANGES = ("rope.scaling.", "attention.scale", "logit_scale", "_scale", "softcapping", "clamp_kqv")
"""Parts of keys that change what llama.cpp computes, where nothing is said of them otherwise."""
_LEFT_OUT = {"expert_feed_forward_length": "moe_intermediate_size"}
"""What transformers does not read: the part of the key, and the name in a config."""


def stage(file: Path, folder: Path) -> None:
    """Make a folder of a file, as this package writes folders: config.json, tokenizer, model.gguf.

    Args:
        file: The file; not trusted. If a config.json lies beside it, its other files are its own.
        folder: An empty folder; `model.gguf` in it becomes a link.

    Raises:
        ArtifactError: If the file is damaged, or holds a model that cannot be read.
    """
    header = GGUFFile(file)
    (folder / FILE).symlink_to(file.resolve())
    said = header.fields()
    count = _value(said, "split.count", 1)
    if count != 1:
        raise ArtifactError(
            f"'{file}' is one of {count} files of a model: merge them with 'llama-gguf-split "
            "--merge FIRST OUT'."
        )
    beside = is_plain(file.parent / "config.json", file.parent)
    values = read_json(file.parent / "config.json") if beside else _config(file, said)
    values.pop("quantization_config", None)
    values.pop("torch_dtype", None)
    # as llama.cpp computes; every code can be told from its value
    values["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    if beside:
        for name, source in documents(str(file.parent), {"trust_remote_code": False}, None).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
    advice = "" if beside else f" {_ADVICE}"
    try:
        _check(header, said, folder, advice)
    except OptimumOrderError:
        raise
    except Exception as error:  # whatever becomes of numbers that do not fit together
        raise ArtifactError(
            f"The config of '{file}' makes no model: {_first_line(error)}{advice}"
        ) from error
    if not (folder / "tokenizer.json").exists():
        _save_tokenizer(file, said, header.tensors[_EMBEDDING].shape[0], folder)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{line.rstrip('.')}."


def _value(said: Mapping[str, Field], key: str, default: Any) -> Any:
    return said[key].value if key in said else default


def _config(file: Path, said: Mapping[str, Field]) -> dict[str, Any]:
    """Return the config that transformers makes of what a file says, and what it leaves out."""
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise missing_extra(gguf_families.EXTRA, error) from error
    except Exception as error:  # transformers believes what a header says
        raise ArtifactError(
            f"transformers makes no config of '{file}': {_first_line(error)} {_ADVICE}"
        ) from error
    values: dict[str, Any] = config.to_diff_dict()
    name = _value(said, "general.architecture", "")
    left_out = {
        key: said[f"{name}.{part}"].value
        for part, key in _LEFT_OUT.items()
        if f"{name}.{part}" in said
    }
    return values | {"model_type": config.model_type} | left_out


_ADVICE = "Put the config.json and the tokenizer of the model that it was made from beside it."


def _check(header: GGUFFile, said: Mapping[str, Field], folder: Path, advice: str) -> None:
    """Refuse a config that is not that of the file, before anything of its size is made.

    Raises:
        ArtifactError: If it is not.
    """
    config = read_config(folder)
    blocks = getattr(config, "num_hidden_layers", None)
    embedding = header.tensors.get(_EMBEDDING)
    shape = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
    if embedding is None or embedding.shape != shape:
        stored = "none" if embedding is None else list(embedding.shape)
        raise ArtifactError(
            f"The config says that the embedding is {list(shape)}, the GGUF file has {stored}."
            f"{advice}"
        )
    if type(blocks) is not int or not 0 < blocks < len(header.tensors):
        raise ArtifactError(
            f"The config says that there are {blocks} blocks, the GGUF file has "
            f"{len(header.tensors)} tensors.{advice}"
        )
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    largest = max(size for stored in header.tensors.values() for size in stored.shape)
    if experts is not None and not (type(experts) is int and experts <= largest):
        raise ArtifactError(f"The config says that there are {experts} experts.{advice}")
    model = skeleton(config)
    if reason := gguf_families.why_not(model):
        raise ArtifactError(f"The GGUF file holds a model that cannot be read: {reason}{advice}")
    entries = {entry.name: entry for part in gguf_families.entries(model) for entry in part}
    for name, entry in entries.items():
        stored_shape = header.tensors[name].shape if name in header.tensors else None
        if stored_shape != entry.shape:
            raise ArtifactError(
                f"The model has a tensor '{name}' {list(entry.shape)}, the GGUF file "
                f"{'has none' if stored_shape is None else list(stored_shape)}.{advice}"
            )
    others = set(header.tensors) - set(entries) - {gguf_families.ROPE_FACTORS}
    if others:
        raise ArtifactError(
            f"The GGUF file has a tensor '{min(others)}', for which the model has no place.{advice}"
        )
    _check_factors(header, model, advice)
    if key := _difference(said, gguf_families.fields(model, entries.values())):
        raise ArtifactError(
            f"The GGUF file says {key} = {_value(said, key, 'nothing')}, and the config does not "
            f"say so.{advice}"
        )


def _check_factors(header: GGUFFile, model: PreTrainedModel, advice: str) -> None:
    expected = gguf_families.rope_factors(model)
    stored = None
    if gguf_families.ROPE_FACTORS in header.tensors:
        stored = header.values(gguf_families.ROPE_FACTORS).float()
    if expected is None and stored is not None and bool((stored == 1).all()):
        return
    if (expected is None) != (stored is None) or (
        expected is not None
        and stored is not None
        and (expected.shape != stored.shape or not torch.allclose(expected, stored, rtol=1e-4))
    ):
        raise ArtifactError(
            f"The GGUF file scales rotary embeddings in another way than the config says.{advice}"
        )


def _difference(said: Mapping[str, Field], expected: Mapping[str, Any]) -> str | None:
    """Return the first key of which a file says something else than the config, or None.

    Args:
        said: The fields of the file.
        expected: What would be said of the model.
    """
    name = next(iter(expected)).partition(".")[0]
    if _value(said, "general.architecture", None) != name:
        return "general.architecture"
    defaults = {
        f"{name}.attention.head_count_kv": expected[f"{name}.attention.head_count"],
        f"{name}.rope.freq_base": 10000.0,
        f"{name}.rope.freq_base_swa": 10000.0,
        f"{name}.vocab_size": expected[f"{name}.vocab_size"],
        # what a config says of it counts fewer tokens where llama.cpp has no window
        f"{name}.context_length": expected[f"{name}.context_length"],
    }
    width = expected[f"{name}.embedding_length"] // expected[f"{name}.attention.head_count"]
    for part in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        defaults[f"{name}.{part}"] = _value(said, f"{name}.attention.key_length", width)
    for key, value in expected.items():
        if key.endswith(("context_length", "sliding_window_pattern")):
            continue
        if not _equal(_value(said, key, defaults.get(key)), value):
            return key
    for key, field in said.items():
        changes = key.startswith(f"{name}.") and any(part in key for part in _CHANGES)
        if changes and key not in expected and field.value not in ("none", 1.0, 0.0, ""):
            return key
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and not isinstance(other, list):  # one number for each block
        return bool(one) and all(_equal(item, other) for item in one)
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)


def _save_tokenizer(file: Path, said: Mapping[str, Field], rows: int, folder: Path) -> None:
    """Write the tokenizer of a file; none where nobody knows what llama.cpp makes of the fields.

    Args:
        file: The file.
        said: Its fields.
        rows: Rows of the embeddings.
        folder: Where to write.

    Raises:
        ArtifactError: If the fields do not fit together.
    """
    values = {key: field.value for key, field in said.items() if key.startswith("tokenizer.")}
    if values.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        return
    try:
        tokenizer = gguf_vocabulary.tokenizer(values, rows)
    except FormatError as error:
        tokenizer = _by_transformers(file, values)
        if tokenizer is None:
            logger.warning(
                "No tokenizer is made of the GGUF file: %s To read text, put the tokenizer.json of "
                "the model beside it. The result keeps the tokenizer for llama.cpp.",
                error,
            )
            return
    tokenizer.save_pretrained(folder)


def _by_transformers(file: Path, values: Mapping[str, Any]) -> Any:
    """Return the tokenizer that transformers makes, if it is of the kind that it makes right."""
    if values.get("tokenizer.ggml.model") != "llama":
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception:  # transformers believes what a header says
        return None
    tokens = values.get("tokenizer.ggml.tokens")
    ids = list(range(len(tokens))) if isinstance(tokens, list) else []
    return tokenizer if ids and tokenizer.convert_ids_to_tokens(ids) == tokens else None


_OURS = re.compile(
    r"optimum_order|general\.(architecture|file_type|quantization_version|alignment)|split\..*"
)
"""Keys that are said anew."""


def unchanged_fields(
    file: GGUFFile, expected: Mapping[str, Any], tokenizer: Any
) -> dict[str, Field]:
    """Return the fields of a file that are still true of the model that began as it.

    Args:
        file: The file.
        expected: What is to be said of the model.
        tokenizer: The tokenizer, whose chat template counts; or None.
    """
    fields = {
        key: field
        for key, field in file.fields().items()
        if not _OURS.fullmatch(key)
        and field.value != []
        and (key not in expected or _equal(field.value, expected[key]))
    }
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and _TEMPLATE in fields:
        fields[_TEMPLATE] = replace(fields[_TEMPLATE], value=template)
    return fields
