"""Writing one saved folder, so that it is whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from optimum_order import formats
from optimum_order.artifact import manifest
from optimum_order.errors import OutputError
from optimum_order.files import digest, sha256
from optimum_order.formats import Codec, Contents
from optimum_order.layers.state import tensor_bytes


@contextlib.contextmanager
def staging(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder that takes the place of `path` on success, and vanishes otherwise.

    Args:
        path: The folder to write.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        OutputError: If `path` may not be replaced or cannot be written, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()  # a link stays, the folder behind it is replaced
    scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _replace(path, scratch)
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


def _replace(path: Path, scratch: Path) -> None:
    """Put a folder in the place of another, or leave both as they are.

    Args:
        path: The place, which may hold a folder.
        scratch: The folder.
    """
    if not path.exists():
        scratch.rename(path)
        return
    old = path.parent / f".{path.name}.{secrets.token_hex(4)}.old"
    path.rename(old)
    try:
        scratch.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a folder could be written in the end.

    Args:
        path: The folder.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        OutputError: If it could not.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{path}' is a file; give a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"'{path}' is not empty. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    path = path.resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise OutputError(
            f"'{path}' holds the current folder and cannot be replaced; choose another folder."
        )
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"Nothing can be made in '{parent}'; choose another folder.")


def save(
    contents: Contents,
    facts: dict[str, Any],
    path: str | Path,
    *,
    codec: Codec,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write a self-contained folder: weights, config, generation config, processor and manifest.

    Args:
        contents: The model, its layers and its processor; states are read a block at a time.
        facts: What the manifest says of the run; format, bytes, files and digest are added here.
        path: The folder.
        codec: What `formats.choose` returned for these contents.
        overwrite: Whether a folder that is not empty may be replaced.
        max_shard_size: Of one weight file.

    Returns:
        The manifest as written.

    Raises:
        OutputError: If the folder cannot be written; nothing is left half-written.
    """
    container = formats.container(codec.name)
    with staging(Path(path), overwrite=overwrite) as folder:
        header = {manifest.KEY: facts["order"]}
        written = container.write(
            contents, codec, folder, header=header, max_shard_size=max_shard_size
        )
        if contents.processor is not None:
            _save_processor(contents.processor, folder)
        _name_order(folder / "config.json", facts["order"])
        weights = sum(file.stat().st_size for file in container.files(folder))
        count = sum(math.prod(layer["shape"]) for layer in facts["layers"].values())
        bits = round(8 * written.bytes / count, 4)
        layers = {
            name: layer | {"stored": written.stored.get(name)}
            for name, layer in facts["layers"].items()
        }
        files = {
            str(file.relative_to(folder)): {"sha256": sha256(file), "bytes": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        added = {
            "format": codec.name,
            "layers": layers,
            "bytes": facts["bytes"] | {"after": weights, "per_weight_bits": bits},
            "files": files,
        }
        return manifest.write(facts | added, folder)


def _name_order(file: Path, order: str) -> None:
    """Add the order to a config.json, and where more is said.

    Args:
        file: The config.json.
        order: The canonical order.
    """
    config = json.loads(file.read_text())
    config[manifest.KEY] = {"schema": manifest.SCHEMA, "order": order, "manifest": manifest.FILE}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
    return digest([tensor_bytes(weight)])
