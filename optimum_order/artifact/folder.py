"""One saved folder: writing it so that it is whole or not there, and checking that it is what it says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import manifest
from optimum_order.errors import OutputError
from optimum_order.files import sha256, weight_bytes
from optimum_order.formats import Layers
from optimum_order.formats import safetensors as checkpoint
from optimum_order.layers.state import tensor_bytes


@contextlib.contextmanager
def staging(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: If `path` holds something and `overwrite` is False, or cannot be written, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()  # a link stays, what it leads to is replaced
    scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if path.exists():
            old = path.parent / f".{path.name}.{secrets.token_hex(4)}.old"
            path.rename(old)
            try:
                scratch.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            scratch.rename(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        )
        raise OutputError(
            f"Cannot write '{path}': {reason}. Nothing was left there; make room or choose another path."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `path` could not be written in the end."""
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
    model: PreTrainedModel,
    processor: Any,
    layers: Layers,
    facts: dict[str, Any],
    path: str | Path,
    *,
    format: formats.Format,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a self-contained folder: weights, config, generation config, processor and manifest.

    Args:
        model: Holds the states' weights, or is empty.
        processor: Tokenizer or image processor, or None.
        layers: Each compressed layer with its state; read a block at a time.
        facts: What the manifest says of the run; the format, bytes, files and digest are added here.
        path: The folder.
        format: What `formats.choose` returned for these layers.
        overwrite: Whether a folder that is not empty may be replaced.
        max_shard_size: Of one weight file.
        tensors: What is in the model, by name, if it is empty.

    Returns:
        The manifest as written.

    Raises:
        OutputError: If the folder cannot be written; nothing is left half-written.
    """
    path = Path(path)
    with staging(path, overwrite=overwrite) as folder:
        header = {manifest.KEY: facts["order"]}
        written = checkpoint.write(
            model,
            layers,
            format,
            folder,
            header=header,
            max_shard_size=max_shard_size,
            tensors=tensors,
        )
        if processor is not None:
            _save_processor(processor, folder)
        config = json.loads((folder / "config.json").read_text())
        config[manifest.KEY] = {
            "schema": manifest.SCHEMA,
            "order": facts["order"],
            "manifest": manifest.FILE,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = weight_bytes(folder)
        count = sum(math.prod(layer["shape"]) for layer in facts["layers"].values())
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return manifest.write(
            facts
            | {
                "format": format.name,
                "layers": {
                    name: layer | {"stored": written.stored.get(name)}
                    for name, layer in facts["layers"].items()
                },
                "bytes": facts["bytes"]
                | {"after": weights, "per_weight_bits": round(8 * written.bytes / count, 4)},
                "files": {
                    str(file.relative_to(folder)): {
                        "sha256": sha256(file),
                        "bytes": file.stat().st_size,
                    }
                    for file in files
                },
            },
            folder,
        )


def _save_processor(processor: Any, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except (
        Exception
    ) as error:  # the tokenizers library raises nothing more specific when a disk is full
        if "os error" not in str(error):
            raise
        raise OSError(str(error)) from error


def values_digest(weight: Tensor) -> str:
    """sha256 of a layer's dequantised values, (out, in) row by row: what `verify` compares with."""
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()
