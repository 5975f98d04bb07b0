"""Files beside a model that belong to it, and that transformers does not write.

sentence-transformers keeps its pipeline in `modules.json` and folders of modules, tokenizers keep
files that another version reads, and a license is a file. All of them go with the compressed model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from optimum_order.files import is_folder, is_plain
from optimum_order.models import hf

logger = logging.getLogger(__name__)

_MODULES = "modules.json"
_NAMES = (
    _MODULES,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_NAMES = _NAMES[:9]
"""Asked for on the Hub: a request each. What tokenizers need is saved by the tokenizer."""
_IN_MODULE = ("config.json", "model.safetensors", *_NAMES[9:])
"""Files of a module of sentence-transformers."""
_PICKLED = "pytorch_model.bin"
_CARD = "README.md"
_MOST_CARD = 10**6
_MOST_LANGUAGES = 200
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
"""The name of a license or of a language."""
_PLAIN = re.compile(r"\w[\w.-]*")
"""A name that leads nowhere else."""


def documents(path: str, hub: Mapping[str, Any], config: Any) -> dict[str, Path]:
    """Return the files that go with a model, by their path in its folder.

    Only plain files of certain names are taken: no weights of the model itself, no model card, and
    code only where the user lets it run.

    Args:
        path: A folder or a Hub id.
        hub: `revision`, `token`, `cache_dir` and `trust_remote_code`, as for `from_pretrained`.
        config: The config of the model.
    """
    local = is_folder(path)

    def get(name: str) -> Path | None:
        if local:
            file = Path(path, name)
            return file if is_plain(file, Path(path)) or _is_file(file) else None
        cached = hf.cached_file(
            path,
            name,
            revision=hub["revision"],
            token=hub["token"],
            cache_dir=hub.get("cache_dir"),
            required=False,
        )
        return Path(cached) if cached else None

    names = list(_NAMES if local else _HUB_NAMES)
    if local and hub["trust_remote_code"]:
        names += _code(config)
    files = {name: file for name in names if (file := get(name))}
    if _MODULES in files:
        for module in _modules(files[_MODULES]):
            files |= {
                f"{module}/{name}": file for name in _IN_MODULE if (file := get(f"{module}/{name}"))
            }
            if f"{module}/model.safetensors" not in files and get(f"{module}/{_PICKLED}"):
                logger.warning(
                    "'%s/%s' is pickled and is not copied, so sentence-transformers will not load "
                    "the result. Save that module as safetensors.",
                    module,
                    _PICKLED,
                )
    return files


def card_facts(path: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return the license and the languages of a model, as its card states them.

    A card is text of anybody: only short plain words are taken.

    Args:
        path: A folder or a Hub id.
        hub: As in `documents`.
    """
    if is_folder(path):
        file: str | None = str(Path(path, _CARD)) if _is_file(Path(path, _CARD)) else None
    else:
        place = {name: hub[name] for name in ("revision", "token")}
        cache = hub.get("cache_dir")
        file = hf.cached_file(path, _CARD, required=False, cache_dir=cache, **place)
    try:
        if file is None or Path(file).stat().st_size > _MOST_CARD:
            return {}
        metadata = metadata_load(file) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    facts = {
        name: metadata[name]
        for name in ("license", "license_name")
        if isinstance(metadata.get(name), str) and _WORD.fullmatch(metadata[name])
    }
    languages = metadata.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if not isinstance(languages, list) or not 0 < len(languages) <= _MOST_LANGUAGES:
        return facts
    if all(isinstance(word, str) and _WORD.fullmatch(word) for word in languages):
        facts["language"] = languages
    return facts


def _is_file(file: Path) -> bool:
    """Return whether a path is a file, or the user's own link to one in the same folder."""
    try:
        return file.is_file() and file.resolve().is_relative_to(file.parent.resolve())
    except OSError:
        return False


def _modules(file: Path) -> Iterator[str]:
    """Yield the folders of the modules of sentence-transformers."""
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for module in modules if isinstance(modules, list) else []:
        folder = module.get("path") if isinstance(module, dict) else None
        if isinstance(folder, str) and _PLAIN.fullmatch(folder):
            yield folder


def _code(config: Any) -> Iterator[str]:
    """Yield the files of code beside the model that its config names."""
    for reference in (getattr(config, "auto_map", None) or {}).values():
        for name in reference if isinstance(reference, (list, tuple)) else [reference]:
            if isinstance(name, str) and "--" not in name:
                module = name.split(".")[0]
                if _PLAIN.fullmatch(module):
                    yield f"{module}.py"
