"""Whether a saved folder is what its manifest says."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optimum_order import formats
from optimum_order.artifact import adapter, manifest
from optimum_order.artifact.folder import values_digest
from optimum_order.errors import ArtifactError
from optimum_order.files import entries, is_folder, read_json, sha256
from optimum_order.formats import Container
from optimum_order.layers.state import LayerState
from optimum_order.progress import Bar

logger = logging.getLogger(__name__)

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files in which transformers looks for code to run."""


def verify(path: str | Path, *, progress: bool = False) -> list[str]:
    """Return everything in which a saved folder differs from its manifest; empty if nothing does.

    Args:
        path: The folder of an artifact.
        progress: Whether to show a bar on stderr.

    Returns:
        One sentence per difference.

    Raises:
        ArtifactError: If there is no such folder.
    """
    folder = Path(path)
    if not is_folder(folder):
        raise ArtifactError(f"There is no folder '{path}'.")
    try:
        facts = manifest.load(folder)
    except ArtifactError as error:
        return [str(error)]
    problems: list[str] = []
    if manifest.digest(facts) != facts["digest"]:
        problems.append(
            f"{manifest.FILE} was changed after it was written: its digest does not match."
        )
    count = len(facts["files"])
    logger.info("Verifying '%s': %d files, %d layers", folder.name, count, len(facts["layers"]))
    problems += _files(folder, facts["files"])
    if problems:
        return problems  # a file that cannot be trusted is not worth decoding
    try:
        container = formats.container(facts["format"])
        problems += _code(folder, facts)
        problems += _orders(folder, facts, container)
        with Bar(
            total=len(facts["layers"]), desc="verify", unit="layer", disable=not progress
        ) as bar:
            problems += _layers(folder, facts, container, bar)
    except ArtifactError as error:
        problems.append(str(error))
    return problems


def _files(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Yield how the files of a folder differ from those that the manifest lists.

    Args:
        folder: The folder.
        files: Size and sha256 by name.
    """
    present, others = entries(folder)
    yield from others.values()
    for name in sorted(present - set(files) - {manifest.FILE}):
        if not manifest.DOCUMENTS.fullmatch(name):
            yield f"{name} is in the folder and not in the manifest."
    for name, entry in sorted(files.items()):
        file = folder / name
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(entry, dict):
            yield f"the manifest names a file it may not: {name!r}."
        elif name in others:
            continue
        elif name not in present:  # no system is asked about a name that it may not even take
            yield f"{name} is missing."
        elif file.stat().st_size != entry.get("bytes"):
            size = file.stat().st_size
            yield f"{name} has {size} bytes, the manifest says {entry.get('bytes')}."
        elif sha256(file) != entry.get("sha256"):
            yield f"{name} was changed after it was written: its sha256 does not match."


def _code(folder: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that have transformers ask for code, unless the manifest says so.

    Args:
        folder: The folder.
        facts: The manifest.
    """
    if facts["base_model"].get("remote_code") is True:
        return
    for name in _CONFIGS:
        file = folder / name
        if file.is_file() and "auto_map" in read_json(file):
            yield f"{name} names code to run (auto_map), and the manifest says nothing of code."


def _orders(folder: Path, facts: Mapping[str, Any], container: Container) -> Iterator[str]:
    """Yield where the order is another than in the manifest.

    Args:
        folder: The folder.
        facts: The manifest.
        container: Reads the header of a weight file.
    """
    order = facts["order"]
    config = read_json(folder / "config.json").get(manifest.KEY)
    expected = {"schema": facts["schema"], "order": order, "manifest": manifest.FILE}
    if config != expected:
        yield f"config.json says {config!r} of the order, the manifest says {expected!r}."
    for file in container.files(folder):
        stated = container.header(file).get(manifest.KEY)
        if stated != order:
            yield f"{file.name} says the order is {stated!r}, the manifest says {order!r}."
    stages = [str(stage.get("stage")) for stage in facts["stages"] if isinstance(stage, dict)]
    if " > ".join(stages) != order:
        yield "the manifest's stages are not those of its order."


def _layers(
    folder: Path, facts: Mapping[str, Any], container: Container, bar: Bar
) -> Iterator[str]:
    """Yield which layers are not what the manifest says.

    Args:
        folder: The folder.
        facts: The manifest.
        container: Reads the layers.
        bar: Counts them.

    Raises:
        ArtifactError: If the layers cannot be read.
    """
    layers = facts["layers"]
    if not all(_is_layer(entry) for entry in layers.values()):
        raise ArtifactError("the manifest's layers cannot be read.")
    pruned = sum(entry["pruned"] for entry in layers.values())
    total = sum(entry["shape"][0] * entry["shape"][1] for entry in layers.values())
    if total and facts.get("sparsity") != round(pruned / total, 6):
        yield (
            f"the manifest's sparsity is {facts.get('sparsity')}, that of its layers "
            f"{pruned / total:.6f}."
        )
    for name, low_rank in adapter.read(folder, facts).items():
        if adapter.describe(low_rank) != layers[name]["adapter"]:
            yield f"layer {name} has another adapter than the one that was measured."
    stored = {name: entry.get("stored") for name, entry in layers.items()}
    for name, state in container.read(folder, stored):
        if problem := _difference(state, layers[name]):
            yield f"layer {name} {problem}."
        bar.update()


def _difference(state: LayerState, entry: Mapping[str, Any]) -> str | None:
    """Return the first difference of a layer from its entry in the manifest.

    Args:
        state: The layer.
        entry: The entry, of the form that `_is_layer` checks.
    """
    shape = list(state.weight.shape)
    zeros = int((state.weight == 0).sum())
    masked = None if state.pruned is None else int(state.pruned.sum())
    pruned = entry["pruned"]
    if shape != entry["shape"]:
        return f"has shape {shape}, the manifest says {entry['shape']}"
    if masked is not None and masked != pruned:
        return f"has a mask of {masked} weights, the manifest says {pruned}"
    if zeros < pruned:
        return f"has {zeros} zeros, fewer than the {pruned} weights said to be pruned"
    if values_digest(state.weight) != entry.get("digest"):
        return "does not decode to the values that were measured"
    if state.grid is not None and state.grid.bits != entry.get("bits"):
        return f"has {state.grid.bits} bits, the manifest says {entry.get('bits')}"
    if state.grid is not None and state.group_size != entry.get("group_size"):
        return f"has groups of {state.group_size}, the manifest says {entry.get('group_size')}"
    inputs = None if state.inputs is None else state.inputs.words
    if inputs != entry.get("inputs"):
        return f"has inputs {inputs}, the manifest says {entry.get('inputs')}"
    if not _keeps_pattern(state.weight, entry.get("pattern")):
        return f"does not keep the pattern {entry.get('pattern')}"
    return None


def _is_layer(entry: Any) -> bool:
    """Return whether an entry of the manifest has the form that the comparison relies on."""
    if not isinstance(entry, dict) or type(entry.get("pruned")) is not int:
        return False
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        return False
    if not all(type(size) is int and size > 0 for size in shape):
        return False
    return bool(0 <= entry["pruned"] <= shape[0] * shape[1])


def _keeps_pattern(weight: Tensor, pattern: Any) -> bool:
    """Return whether no M inputs of a row have more than N weights that are not zero.

    Args:
        weight: (out, in).
        pattern: "N:M", which nobody has checked; None is always kept.
    """
    if pattern is None:
        return True
    parts = re.fullmatch(r"([1-9][0-9]?):([1-9][0-9]?)", str(pattern))
    if parts is None or weight.shape[1] % int(parts[2]):
        return False
    groups = weight.view(len(weight), -1, int(parts[2]))
    return bool((groups.count_nonzero(-1) <= int(parts[1])).all())
