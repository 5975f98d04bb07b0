"""Writing one saved folder, so that it is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import files, formats
from optimum_order.artifact import adapter, card, config, manifest
from optimum_order.errors import ArtifactError, ModelError, OutputError
from optimum_order.formats import Codec, Contents
from optimum_order.formats.older import keep_tokenizer
from optimum_order.layers.state import tensor_bytes
from optimum_order.models.source import auto_class

logger = logging.getLogger(__name__)

SHARD = "5GB"
"""The most that one weight file takes, if nobody says otherwise."""
_PREFIX = 40
"""Characters of a name that the name of a result beside a taken place begins with."""
_RESULT = "result"
_LOCK = "lock.sqlite"
"""What is in the folder beside a result that is being written: the result, and who writes it."""
_ABANDONED = 60.0
"""Seconds after which nobody takes the lock of an empty folder any more."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_HIDDEN = {".gitattributes", ".cache", ".DS_Store"}
"""Hidden entries that downloads and file managers leave beside a model."""
_MODEL_FILE = re.compile(
    r".*\.(json|yaml|safetensors|bin|model|jinja|py|msgpack|h5|gguf|onnx|tiktoken)"
    r"|(README|USE_POLICY)\.md|(LICENSE|NOTICE)(\.\w+)?|(vocab|merges)\.txt"
)
"""Names of the files of a model that this package did not write."""


@contextlib.contextmanager
def staging(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder that takes the place of `path` on success, and vanishes otherwise.

    What a process that was killed has left of such a folder is removed first.

    Args:
        path: The folder to write.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        OutputError: If `path` may not be replaced or cannot be written, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()  # a link stays, the folder behind it is replaced
    _remove_unfinished(path)
    scratch = files.beside(path, "partial")
    try:
        scratch.mkdir(parents=True)
        with contextlib.closing(files.lock(scratch / _LOCK)):
            result = scratch / _RESULT
            result.mkdir()
            yield result
            _replace(path, result, overwrite=overwrite)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        raise OutputError(
            f"Cannot write '{path}': {reason}. Nothing was left there; make room or choose another "
            "path."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_unfinished(path: Path) -> None:
    """Remove what killed processes left beside a place; others may be writing there now."""
    for scratch in files.leftovers(path, "partial"):
        if not (scratch / _LOCK).is_file():
            with contextlib.suppress(OSError):  # not empty: an earlier version began it
                if time.time() - scratch.stat().st_mtime > _ABANDONED:
                    scratch.rmdir()
            continue
        try:
            lock = files.lock(scratch / _LOCK)
        except (OSError, sqlite3.Error):  # the process is alive
            continue
        with contextlib.closing(lock):
            shutil.rmtree(scratch, ignore_errors=True)


def _replace(path: Path, scratch: Path, *, overwrite: bool) -> None:
    """Put a finished folder in its place, or leave the place as it is.

    Args:
        path: The place.
        scratch: The folder.
        overwrite: Whether the place may hold a folder that is not empty.

    Raises:
        OutputError: If the place was taken meanwhile. The finished folder is then beside it.
    """
    old = files.beside(path, "old")
    if overwrite and path.exists():
        path.rename(old)
    try:
        # A rename takes the place of an empty folder, and of nothing else.
        scratch.rename(path)
    except OSError as error:
        if old.exists():
            with contextlib.suppress(OSError):
                old.rename(path)
        if not os.path.lexists(path) or error.errno not in _TAKEN:
            raise
        result = path.with_name(f"{path.name[:_PREFIX]}-{secrets.token_hex(4)}")
        scratch.rename(result)
        raise OutputError(
            f"'{path}' was filled by another program meanwhile and stays as it is; the finished "
            f"result is in '{result}'."
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def is_ours(path: Path) -> bool:
    """Return whether a folder holds an artifact, of whatever state."""
    return files.is_plain(path / manifest.FILE, path)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a folder could be written in the end.

    Args:
        path: The folder.
        overwrite: Whether an artifact or a model in the folder may be replaced.

    Raises:
        OutputError: If it could not.
    """
    if problem := files.too_long(path):
        raise OutputError(problem)
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"'{path}' is a file; give a folder.")
    path = path.resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise OutputError(
            f"'{path}' holds the current folder and cannot be replaced; choose another folder."
        )
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(
                f"'{path}' is not empty. Choose another folder, or pass overwrite=True "
                "(--overwrite)."
            )
        if stranger := _stranger(path):
            raise OutputError(
                f"'{path}' holds '{stranger}', which is no file of an artifact or a model, so the "
                "folder is not replaced. Choose another folder, or move that away."
            )
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"Nothing can be made in '{parent}'; choose another folder.")


def _stranger(folder: Path) -> str | None:
    """Return the name of something that an artifact or a saved model does not hold, if any."""
    hidden = {entry.name for entry in folder.iterdir() if entry.name.startswith(".")}
    names, others = files.entries(folder)
    try:
        listed = {manifest.FILE, *manifest.load(folder)["files"]}
        strangers = {name for name in names - listed if not manifest.DOCUMENTS.fullmatch(name)}
    except ArtifactError:
        if "config.json" in names:
            strangers = {name for name in names if not _MODEL_FILE.fullmatch(Path(name).name)}
        else:
            strangers = names
    strangers |= hidden - _HIDDEN | set(others)
    return min(strangers, default=None)


def save(
    contents: Contents,
    facts: dict[str, Any],
    path: str | Path,
    *,
    codec: Codec,
    overwrite: bool = False,
    max_shard_size: str = SHARD,
) -> dict[str, Any]:
    """Write a self-contained folder: weights, config, processor, manifest and model card.

    Args:
        contents: The model, its layers and its processor; states are read a block at a time.
        facts: What the manifest says of the run; format, bytes, files and digest are added here.
        path: The folder.
        codec: What `formats.choose` returned for these contents.
        overwrite: Whether a folder that is not empty may be replaced.
        max_shard_size: The most that one weight file may take, such as "5GB".

    Returns:
        The manifest as written.

    Raises:
        OutputError: If the folder cannot be written; nothing is left half-written.
    """
    container = formats.container(codec.name)
    with staging(Path(path), overwrite=overwrite) as folder:
        logger.info("Writing the weights as '%s'", codec.name)
        header = {manifest.KEY: facts["order"]}
        written = container.write(
            contents, codec, folder, header=header, max_shard_size=max_shard_size
        )
        # no state is read again for nothing: each may lie on the disk
        states = [(name, contents.layers.states[name]) for name in adapter.named(facts)]
        adapters = {name: state.adapter for name, state in states if state.adapter is not None}
        beside = adapter.write(adapters, contents.model, folder) if adapters else 0
        if contents.processor is not None:
            _save_processor(contents.processor, folder)
            keep_tokenizer(contents.processor, folder)
        for name, file in contents.documents.items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
        _name_order(folder / "config.json", facts["order"])
        recipe = config.text(facts | {"format": codec.name})
        (folder / config.FILE).write_text(recipe, encoding="utf-8")
        logger.info("Hashing the files that were written")
        weights = beside + sum(file.stat().st_size for file in container.files(folder))
        count = sum(math.prod(layer["shape"]) for layer in facts["layers"].values())
        bits = round(8 * (written.bytes + beside) / count, 4)
        layers = {
            name: layer | {"stored": written.stored.get(name)}
            for name, layer in facts["layers"].items()
        }
        listed = {
            name: {
                "sha256": files.sha256(folder / name),
                "bytes": (folder / name).stat().st_size,
            }
            for name in sorted(files.entries(folder)[0])
            if not manifest.DOCUMENTS.fullmatch(name)  # people and the Hub edit these
        }
        added = {
            "format": codec.name,
            "requires": [*codec.packages, *([adapter.PACKAGE] if adapters else [])],
            "layers": layers,
            "bytes": facts["bytes"]
            | {"after": weights, "per_weight_bits": bits}
            | ({"adapter": beside} if adapters else {}),
            "files": listed,
        }
        full = manifest.write(facts | added, folder)
        _write_card(folder, Path(path).resolve(), full, contents.model)
        return full


def _write_card(folder: Path, place: Path, facts: dict[str, Any], model: PreTrainedModel) -> None:
    """Write the model card; where none can be made, log the reason and leave the model as it is.

    Args:
        folder: Where to write.
        place: Where the artifact will be.
        facts: The manifest.
        model: The model.
    """
    try:
        text = card.local(facts, place, auto_class(model.config))
    except ModelError as error:  # a class of the user's own, which no code in a card could load
        logger.info("No model card is written: %s", error)
    except KeyError as error:
        logger.info("No model card is written: the manifest of an older version lacks %s", error)
    except ImportError as error:  # jinja2, which usually comes with torch
        logger.info("No model card is written: %s", error)
    else:
        (folder / card.FILE).write_text(text, encoding="utf-8")


def _name_order(file: Path, order: str) -> None:
    """Add the order to a config.json, and where more is said.

    Args:
        file: The config.json.
        order: The canonical order.
    """
    values = json.loads(file.read_text())
    values[manifest.KEY] = {"schema": manifest.SCHEMA, "order": order, "manifest": manifest.FILE}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _save_processor(processor: Any, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except Exception as error:
        # When a disk is full, the tokenizers library raises nothing more specific.
        if "os error" not in str(error):
            raise
        raise OSError(str(error)) from error


def values_digest(weight: Tensor) -> str:
    """Return the sha256 of a layer's dequantized values, row by row, which `verify` compares.

    Args:
        weight: (out, in).
    """
    return files.digest([tensor_bytes(weight)])
