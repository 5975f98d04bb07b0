"""A compressed model, ours or somebody else's, as an ordinary model and its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import adapter
from optimum_order.errors import ArtifactError
from optimum_order.files import read_json
from optimum_order.formats import Container, Layers, Layout
from optimum_order.models import hf
from optimum_order.models.quantizer import encoding
from optimum_order.models.source import read_config, skeleton
from optimum_order.models.units import find_targets, find_units


@dataclass(frozen=True)
class Loaded:
    """A compressed model in memory.

    Args:
        model: The model, dense, with the dequantized values of its layers; in evaluation mode.
        layers: The layers that are compressed, with masks and grids.
        unloaded: Stored tensors that the model does not load.
    """

    model: PreTrainedModel
    layers: Layers
    unloaded: Mapping[str, Tensor]


def load(folder: Path, facts: Mapping[str, Any] | None) -> Loaded:
    """Load a compressed model, every weight with the value it has, to the bit.

    Args:
        folder: The folder; its files are not trusted.
        facts: Its manifest, or None if there is none.

    Raises:
        ArtifactError: If the model needs code of its own, the tensors do not fill the model, or a
            layer cannot be read or has no place in the model.
    """
    config = read_config(folder)
    name = format_of(folder) if facts is None else facts["format"]
    container = formats.container(name)
    blank = skeleton(config)
    shapes = hf.to_checkpoint(blank, blank.state_dict())
    tensors, encoded = container.plain(folder)
    if unknown := encoded - set(shapes):
        raise ArtifactError(
            f"'{folder}' has a layer '{min(unknown)}', which {type(blank).__name__} has not."
        )
    stored = (
        _places(folder, blank, encoded, partly=container.keeps_others)
        if facts is None
        else {name: entry.get("stored") for name, entry in facts["layers"].items()}
    )
    unloaded = {key: tensors.pop(key) for key in set(tensors) - set(shapes)}
    if others := encoded - _keys(blank, stored):
        tensors |= container.values(folder, others)
    for key in encoded - others:
        tensors[key] = torch.zeros(shapes[key].shape, dtype=shapes[key].dtype)
    cls: Any = type(blank)
    model, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=config.dtype, output_loading_info=True
    )
    if missing := info["missing_keys"]:
        raise ArtifactError(f"'{folder}' lacks '{min(missing)}', which {type(blank).__name__} has.")
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    layers = _layers(folder, container, stored, model)
    if facts is not None:
        pruned = {name: entry["pruned"] for name, entry in facts["layers"].items()}
        states = _with_masks(layers.states, pruned)
        for adapted, low_rank in adapter.read(folder, facts).items():
            if layers.targets[adapted].kind != "linear":
                raise ArtifactError(f"'{folder}' has an adapter of '{adapted}', which takes none.")
            states[adapted] = dataclasses.replace(states[adapted], adapter=low_rank)
            layers.targets[adapted].put(states[adapted])
        layers = Layers(layers.targets, states)
    return Loaded(model, layers, unloaded)


def format_of(folder: Path) -> str:
    """Return the name of the format that a quantized model of somebody else is stored in.

    Raises:
        ArtifactError: If no installed format reads it.
    """
    if (folder / "model.gguf").exists():
        return "gguf"
    entry = read_json(folder / "config.json").get("quantization_config")
    name = encoding(entry) if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in formats.available():
        raise ArtifactError(
            f"'{folder}' is quantized with {name!r}, which is none of "
            f"{', '.join(formats.available())}: give the model that it was made from."
        )
    return name


def _keys(model: PreTrainedModel, layers: Collection[str]) -> set[str]:
    """Return the names of the stored tensors that hold these layers."""
    layout = Layout.of(model)
    targets = [target for target in find_targets(model) if target.name in layers]
    return {piece.key for target in targets for piece in layout.pieces(target)}


def _places(
    folder: Path, model: PreTrainedModel, encoded: set[str], *, partly: bool
) -> dict[str, Any]:
    """Return each layer that is encoded, with its entry for `Container.read`.

    Args:
        folder: The folder.
        model: Its model.
        encoded: Names of the stored tensors that are encoded.
        partly: Whether embeddings, heads and others outside the blocks may be no layers.

    Raises:
        ArtifactError: If something is encoded that is no layer of a kind that can be compressed.
    """
    layout = Layout.of(model)
    places: dict[str, Any] = {}
    covered: set[str] = set()
    inside = {target.name for unit in find_units(model) for target in unit.targets}
    for target in find_targets(model):
        if partly and target.name not in inside:
            continue
        pieces = layout.pieces(target)
        keys = {piece.key for piece in pieces}
        if not keys & encoded:
            continue
        covered |= keys
        plain = [(piece.key, piece.whole) for piece in pieces] == [(f"{target.name}.weight", True)]
        rows = [[piece.key, piece.at, piece.rows] for piece in pieces]
        places[target.name] = (
            None
            if plain and not target.transposed
            else {"rows": rows, "transposed": target.transposed}
        )
    if (others := encoded - covered) and not partly:
        raise ArtifactError(
            f"'{folder}' holds the quantized tensor '{min(others)}', which is no layer that this "
            "package compresses: give the model that it was made from."
        )
    return places


def _layers(
    folder: Path, container: Container, stored: Mapping[str, Any], model: PreTrainedModel
) -> Layers:
    """Read every layer that was compressed, and write it into the model.

    Args:
        folder: The folder.
        container: Its container.
        stored: The layers, as `Container.read` takes them.
        model: Its model.

    Raises:
        ArtifactError: If a layer cannot be read or has no place in the model.
    """
    targets = {target.name: target for target in find_targets(model)}
    states = {}
    for name, state in container.read(folder, stored):
        if name not in targets or targets[name].view.shape != state.weight.shape:
            raise ArtifactError(
                f"'{folder}' has a layer '{name}' {tuple(state.weight.shape)}, which its model has "
                "not."
            )
        targets[name].put(state)
        states[name] = state
    return Layers(targets, states)


def _with_masks(states: Mapping[str, Any], pruned: Mapping[str, int]) -> dict[str, Any]:
    """Return states with the masks that their zeros tell for sure.

    Args:
        states: The layers.
        pruned: Weights that were pruned in each; exactly as many zeros are the mask.
    """
    masked = {}
    for name, state in states.items():
        zero = state.weight == 0
        if state.pruned is None and 0 < pruned[name] == int(zero.sum()):
            state = dataclasses.replace(state, pruned=zero)
        masked[name] = state
    return masked
