"""What versions 4 of transformers look for in a folder, beside what version 5 writes.

Version 5 keeps the parameters of rotary embeddings in `rope_parameters`. Version 4 looks for
`rope_theta` and others at the top level, and takes its own default without a word. It also does not
know the tokenizer class `TokenizersBackend`, nor a list of extra special tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from optimum_order.files import read_json

_TOKENIZER = "tokenizer_config.json"
_GENERIC = "TokenizersBackend"
_GENERIC_BEFORE = "PreTrainedTokenizerFast"
"""What the generic class was called in version 4; version 5 reads the name too."""
_OWN = ("rope_theta", "partial_rotary_factor")
"""Parameters that version 4 keeps beside `rope_scaling`, not in it."""
_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
}
"""Other names of these parameters, by model type."""


def with_older_keys(stored: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Add the keys of version 4 to a config.json, where version 5 reads the same config from it.

    Args:
        stored: What version 5 wrote.
        config: The config.
    """
    extended = _extended(stored)
    if extended == stored:
        return stored
    same = _read(extended, config).items() >= _read(stored, config).items()
    return extended if same else stored


def _read(stored: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return what this version reads from a config.json, as JSON texts by key.

    Args:
        stored: The content of the file; reading changes it, so a copy is read.
        config: A config of the class that reads it.
    """
    read = type(config).from_dict(copy.deepcopy(stored)).to_dict()
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in read.items()}


def _extended(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, and those in it, with the keys of version 4."""
    extended = dict(config)
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            extended[key] = _extended(value)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        names = _NAMES.get(str(config.get("model_type")), {})
        for key, value in _older(rope, names).items():
            extended.setdefault(key, value)
    return extended


def _older(rope: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of version 4 for `rope_parameters`.

    Args:
        rope: Parameters, or parameters by kind of attention.
        names: Other names of the keys.
    """
    keys: dict[str, Any] = {}
    full = rope
    if any(isinstance(value, dict) for value in rope.values()):
        full = rope.get("full_attention") or {}
        sliding = rope.get("sliding_attention") or {}
        if "rope_theta" in sliding and sliding.get("rope_theta") != full.get("rope_theta"):
            keys[names.get("local", "rope_local_base_freq")] = sliding["rope_theta"]
    for key in _OWN:
        if key in full:
            keys[names.get(key, key)] = full[key]
    scaling = {key: value for key, value in full.items() if key not in _OWN}
    if "local" not in names:
        # None has to be said: version 4 scales some architectures by default.
        keys["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling
    return keys


def keep_tokenizer(processor: Any, folder: Path) -> None:
    """Have a saved tokenizer name the class that its source named, and one that version 4 knows.

    Args:
        processor: A tokenizer, or anything with one; or something without.
        folder: Where it was saved.
    """
    file = folder / _TOKENIZER
    if not file.is_file():
        return
    saved = read_json(file)
    changed = dict(saved)
    written = saved.get("tokenizer_class")
    source = _source_class(processor) or written
    if isinstance(written, str) and source:
        changed["tokenizer_class"] = _GENERIC_BEFORE if source == _GENERIC else source
    extra = saved.get("extra_special_tokens")
    if isinstance(extra, list):
        del changed["extra_special_tokens"]
        changed.setdefault("additional_special_tokens", extra)
    if changed != saved:
        text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _source_class(processor: Any) -> str | None:
    """Return the tokenizer class that the source of a processor names, if that is at hand."""
    tokenizer = getattr(processor, "tokenizer", processor)
    name = getattr(tokenizer, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    file: Any = Path(name, _TOKENIZER)
    if not file.is_file():
        try:
            file = try_to_load_from_cache(name, _TOKENIZER)
        except ValueError:  # neither a folder nor an id
            return None
    if not isinstance(file, str | Path):
        return None
    named = read_json(Path(file)).get("tokenizer_class")
    return named if isinstance(named, str) else None
