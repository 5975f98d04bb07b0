"""One saved folder: writing it so that it is whole or not there, and checking that it is what it says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import formats, manifest
from optimum_order.errors import ArtifactError, OutputError
from optimum_order.formats import Layers, checkpoint
from optimum_order.layer import tensor_bytes


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
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
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
        raise OutputError(f"'{path}' is not empty. Choose another folder, or pass overwrite=True (--overwrite).")
    path = path.resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise OutputError(f"'{path}' holds the current folder and cannot be replaced; choose another folder.")
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
            model, layers, format, folder, header=header, max_shard_size=max_shard_size, tensors=tensors
        )
        if processor is not None:
            _save_processor(processor, folder)
        config = json.loads((folder / "config.json").read_text())
        config[manifest.KEY] = {"schema": manifest.SCHEMA, "order": facts["order"], "manifest": manifest.FILE}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = checkpoint.weight_bytes(folder)
        count = sum(math.prod(layer["shape"]) for layer in facts["layers"].values())
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return manifest.write(
            facts
            | {
                "format": format.name,
                "layers": {
                    name: layer | {"stored": written.stored.get(name)} for name, layer in facts["layers"].items()
                },
                "bytes": facts["bytes"] | {"after": weights, "per_weight_bits": round(8 * written.bytes / count, 4)},
                "files": {
                    str(file.relative_to(folder)): {"sha256": manifest.sha256(file), "bytes": file.stat().st_size}
                    for file in files
                },
            },
            folder,
        )


def _save_processor(processor: Any, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more specific when a disk is full
        if "os error" not in str(error):
            raise
        raise OSError(str(error)) from error


def values_digest(weight: Tensor) -> str:
    """sha256 of a layer's dequantised values, (out, in) row by row: what `verify` compares with."""
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()


def verify(path: str | Path) -> list[str]:
    """Everything in which a saved folder differs from what its manifest says; empty if nothing does.

    Args:
        path: An artifact's folder.

    Returns:
        One sentence per difference.

    Raises:
        ArtifactError: If there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder '{path}'.")
    problems: list[str] = []
    try:
        stated = manifest.load(folder)
    except ArtifactError as error:
        return [str(error)]
    if manifest.digest(stated) != stated["digest"]:
        problems.append(f"{manifest.FILE} was changed after it was written: its digest does not match.")
    problems += _files(folder, stated["files"])
    if problems:
        return problems  # what cannot be trusted as a file is not worth decoding
    try:
        problems += _orders(folder, stated)
        problems += _layers(folder, stated)
    except ArtifactError as error:
        problems.append(str(error))
    return problems


def _files(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    present = {name for name in names if not name.startswith(".") and "/." not in name}
    for name in sorted(present - set(files) - {manifest.FILE}):
        if not manifest.DOCUMENTS.fullmatch(name):
            yield f"{name} is in the folder and not in the manifest."
    for name, stated in sorted(files.items()):
        file = folder / name
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(stated, dict):
            yield f"the manifest names a file it may not: {name!r}."
        elif name not in present:  # before anything asks the system about a name that it may not even take
            yield f"{name} is missing."
        elif _leads_out(folder, file):
            yield f"the manifest names a file it may not: {name!r}."
        elif file.stat().st_size != stated.get("bytes"):
            yield f"{name} has {file.stat().st_size} bytes, the manifest says {stated.get('bytes')}."
        elif manifest.sha256(file) != stated.get("sha256"):
            yield f"{name} was changed after it was written: its sha256 does not match."


def _leads_out(folder: Path, file: Path) -> bool:
    """Whether a file is a link; those into the store of the Hub's cache that the folder is a snapshot in are none."""
    snapshots = folder.resolve().parent
    cached = snapshots.name == "snapshots" and file.resolve().is_relative_to((snapshots.parent / "blobs").resolve())
    return file.is_symlink() and not cached


def _orders(folder: Path, stated: Mapping[str, Any]) -> Iterator[str]:
    order = stated["order"]
    config = manifest.read_json(folder / "config.json").get(manifest.KEY)
    expected = {"schema": stated["schema"], "order": order, "manifest": manifest.FILE}
    if config != expected:
        yield f"config.json says {config!r} of the order, the manifest says {expected!r}."
    for file in sorted(folder.glob("*.safetensors")):
        found = checkpoint.header(file).get(manifest.KEY)
        if found != order:
            yield f"{file.name} says the order is {found!r}, the manifest says {order!r}."
    if " > ".join(str(stage.get("stage")) for stage in stated["stages"] if isinstance(stage, dict)) != order:
        yield "the manifest's stages are not those of its order."


def _layers(folder: Path, stated: Mapping[str, Any]) -> Iterator[str]:
    layers = stated["layers"]
    if not all(_is_layer(said) for said in layers.values()):
        raise ArtifactError("the manifest's layers cannot be read.")
    pruned = sum(said["pruned"] for said in layers.values())
    total = sum(said["shape"][0] * said["shape"][1] for said in layers.values())
    if total and stated.get("sparsity") != round(pruned / total, 6):
        yield f"the manifest's sparsity is {stated.get('sparsity')}, that of its layers {pruned / total:.6f}."
    for name, state in checkpoint.read(folder, {name: said.get("stored") for name, said in layers.items()}):
        said = layers[name]
        zeros = int((state.weight == 0).sum())
        if list(state.weight.shape) != said.get("shape"):
            yield f"layer {name} has shape {list(state.weight.shape)}, the manifest says {said.get('shape')}."
        elif state.pruned is not None and int(state.pruned.sum()) != said["pruned"]:
            yield f"layer {name} has a mask of {int(state.pruned.sum())} weights, the manifest says {said['pruned']}."
        elif zeros < said["pruned"]:
            yield f"layer {name} has {zeros} zeros, fewer than the {said['pruned']} weights said to be pruned."
        elif values_digest(state.weight) != said.get("digest"):
            yield f"layer {name} does not decode to the values that were measured."
        elif state.grid is not None and state.grid.bits != said.get("bits"):
            yield f"layer {name} has {state.grid.bits} bits, the manifest says {said.get('bits')}."
        elif state.grid is not None and getattr(state.grid, "group_size", None) != said.get("group_size"):
            yield f"layer {name} has groups of {state.grid.group_size}, the manifest says {said.get('group_size')}."
        elif not _keeps_pattern(state.weight, said.get("pattern")):
            yield f"layer {name} does not keep the pattern {said.get('pattern')}."


def _is_layer(said: Any) -> bool:
    """Whether what a manifest says of a layer has the form that is relied on below."""
    if not isinstance(said, dict) or type(said.get("pruned")) is not int or not isinstance(said.get("shape"), list):
        return False
    if len(said["shape"]) != 2 or not all(type(size) is int and size > 0 for size in said["shape"]):
        return False
    return 0 <= said["pruned"] <= said["shape"][0] * said["shape"][1]


def _keeps_pattern(weight: Tensor, pattern: Any) -> bool:
    found = re.fullmatch(r"([1-9][0-9]?):([1-9][0-9]?)", pattern) if isinstance(pattern, str) else None
    if not found or weight.shape[1] % int(found[2]):
        return pattern is None
    return bool((weight.view(len(weight), -1, int(found[2])).count_nonzero(-1) <= int(found[1])).all())
