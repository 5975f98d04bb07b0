"""Whether a saved folder is what its manifest says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optimum_order.artifact import manifest
from optimum_order.artifact.folder import values_digest
from optimum_order.errors import ArtifactError
from optimum_order.files import read_json, sha256
from optimum_order.formats import safetensors as checkpoint


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
        problems.append(
            f"{manifest.FILE} was changed after it was written: its digest does not match."
        )
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
        elif (
            name not in present
        ):  # before anything asks the system about a name that it may not even take
            yield f"{name} is missing."
        elif _leads_out(folder, file):
            yield f"the manifest names a file it may not: {name!r}."
        elif file.stat().st_size != stated.get("bytes"):
            yield f"{name} has {file.stat().st_size} bytes, the manifest says {stated.get('bytes')}."
        elif sha256(file) != stated.get("sha256"):
            yield f"{name} was changed after it was written: its sha256 does not match."


def _leads_out(folder: Path, file: Path) -> bool:
    """Whether a file is a link; those into the store of the Hub's cache that the folder is a snapshot in are none."""
    snapshots = folder.resolve().parent
    cached = snapshots.name == "snapshots" and file.resolve().is_relative_to(
        (snapshots.parent / "blobs").resolve()
    )
    return file.is_symlink() and not cached


def _orders(folder: Path, stated: Mapping[str, Any]) -> Iterator[str]:
    order = stated["order"]
    config = read_json(folder / "config.json").get(manifest.KEY)
    expected = {"schema": stated["schema"], "order": order, "manifest": manifest.FILE}
    if config != expected:
        yield f"config.json says {config!r} of the order, the manifest says {expected!r}."
    for file in sorted(folder.glob("*.safetensors")):
        found = checkpoint.header(file).get(manifest.KEY)
        if found != order:
            yield f"{file.name} says the order is {found!r}, the manifest says {order!r}."
    if (
        " > ".join(str(stage.get("stage")) for stage in stated["stages"] if isinstance(stage, dict))
        != order
    ):
        yield "the manifest's stages are not those of its order."


def _layers(folder: Path, stated: Mapping[str, Any]) -> Iterator[str]:
    layers = stated["layers"]
    if not all(_is_layer(said) for said in layers.values()):
        raise ArtifactError("the manifest's layers cannot be read.")
    pruned = sum(said["pruned"] for said in layers.values())
    total = sum(said["shape"][0] * said["shape"][1] for said in layers.values())
    if total and stated.get("sparsity") != round(pruned / total, 6):
        yield f"the manifest's sparsity is {stated.get('sparsity')}, that of its layers {pruned / total:.6f}."
    for name, state in checkpoint.read(
        folder, {name: said.get("stored") for name, said in layers.items()}
    ):
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
        elif state.grid is not None and getattr(state.grid, "group_size", None) != said.get(
            "group_size"
        ):
            yield f"layer {name} has groups of {state.grid.group_size}, the manifest says {said.get('group_size')}."
        elif not _keeps_pattern(state.weight, said.get("pattern")):
            yield f"layer {name} does not keep the pattern {said.get('pattern')}."


def _is_layer(said: Any) -> bool:
    """Whether what a manifest says of a layer has the form that is relied on below."""
    if (
        not isinstance(said, dict)
        or type(said.get("pruned")) is not int
        or not isinstance(said.get("shape"), list)
    ):
        return False
    if len(said["shape"]) != 2 or not all(type(size) is int and size > 0 for size in said["shape"]):
        return False
    return 0 <= said["pruned"] <= said["shape"][0] * said["shape"][1]


def _keeps_pattern(weight: Tensor, pattern: Any) -> bool:
    found = (
        re.fullmatch(r"([1-9][0-9]?):([1-9][0-9]?)", pattern) if isinstance(pattern, str) else None
    )
    if not found or weight.shape[1] % int(found[2]):
        return pattern is None
    return bool(
        (weight.view(len(weight), -1, int(found[2])).count_nonzero(-1) <= int(found[1])).all()
    )
