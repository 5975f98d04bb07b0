"""An artifact in another format: the same values, and the same account of how they were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats import Container, Contents, Layers
from optimum_order.models import hf
from optimum_order.models.documents import documents
from optimum_order.models.source import auto_class, load_processor
from optimum_order.models.units import find_targets


def convert(
    folder: str | Path, path: str | Path, format: str = "auto", *, overwrite: bool = False
) -> dict[str, Any]:
    """Save an artifact in another format, every weight with the value it has, to the bit.

    The manifest stays as it is, apart from what it says of the files, and without metrics that were
    measured on kernels that do not run the new format. What the old format did not store is not
    made up: the grid of a layer that was stored dense, and its mask unless "sparse" stored it, or
    exactly as many of its weights are zero as were pruned.

    Args:
        folder: The artifact; it has to be what its manifest says.
        path: The folder to write.
        format: Name of a format, or "auto" for the smallest that holds every layer exactly.
        overwrite: Whether a folder that is not empty may be replaced.

    Returns:
        The new manifest.

    Raises:
        ArtifactError: If there is no artifact, or it is not what its manifest says.
        FormatError: If the format cannot hold a layer exactly; the message names those that can.
        OutputError: If the new folder cannot be written. Nothing is left half-written.
    """
    folder = Path(folder)
    path = Path(path)
    artifact.check_output(path, overwrite=overwrite)
    if problems := verify(folder):
        raise ArtifactError(
            f"'{folder}' is not what its manifest says: {problems[0]} Get it again; "
            f"'optimum-order verify' lists all differences ({len(problems)})."
        )
    facts = manifest.load(folder)
    source = formats.available()[facts["format"]]
    container = formats.container(source.name)
    model, unloaded = _load(folder, container)
    layers = _layers(folder, container, facts["layers"], model)
    hub = {"revision": None, "token": None, "trust_remote_code": False}
    contents = Contents(
        model=model,
        layers=layers,
        processor=load_processor(str(folder), hub),
        unloaded=unloaded,
        documents=documents(str(folder), hub, model.config),
    )
    try:
        codec = formats.choose(contents, format)
    except FormatError as error:
        if source.name != "dense":
            raise
        raise FormatError(
            f"{error} What is stored dense are values; the codes they had are not stored."
        ) from error
    if codec.name != source.name and not (codec.runs_dense and source.runs_dense):
        facts["metrics"] = {}
    return artifact.save(contents, facts, path, codec=codec, overwrite=overwrite)


def _load(folder: Path, container: Container) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Load the model of an artifact as an ordinary one, with zeros in place of encoded layers.

    Args:
        folder: The artifact.
        container: Its container.

    Returns:
        The model, and the tensors that the model does not load.

    Raises:
        ArtifactError: If the model needs code of its own, or the tensors do not fill the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ArtifactError(
            f"'{folder}' has a config.json that cannot be used: {reason}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = auto_class(config)
    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=False)
    shapes = hf.to_checkpoint(skeleton, skeleton.state_dict())
    tensors, encoded = container.plain(folder)
    if unknown := encoded - set(shapes):
        raise ArtifactError(
            f"'{folder}' has a layer '{min(unknown)}', which {type(skeleton).__name__} has not."
        )
    unloaded = {key: tensors.pop(key) for key in set(tensors) - set(shapes)}
    for key in encoded:
        tensors[key] = torch.zeros(shapes[key].shape, dtype=shapes[key].dtype)
    model, info = type(skeleton).from_pretrained(
        None, config=config, state_dict=tensors, dtype=config.dtype, output_loading_info=True
    )
    if missing := info["missing_keys"]:
        raise ArtifactError(
            f"'{folder}' lacks '{min(missing)}', which {type(skeleton).__name__} has."
        )
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    loaded: PreTrainedModel = model.eval()
    return loaded, unloaded


def _layers(
    folder: Path, container: Container, entries: Mapping[str, Any], model: PreTrainedModel
) -> Layers:
    """Read every layer that was compressed, and write it into the model.

    Args:
        folder: The artifact.
        container: Its container.
        entries: The layers in its manifest.
        model: Its model.

    Raises:
        ArtifactError: If a layer cannot be read or has no place in the model.
    """
    targets = {target.name: target for target in find_targets(model)}
    states = {}
    stored = {name: entry.get("stored") for name, entry in entries.items()}
    for name, state in container.read(folder, stored):
        if name not in targets or targets[name].view.shape != state.weight.shape:
            raise ArtifactError(
                f"'{folder}' has a layer '{name}' {tuple(state.weight.shape)}, which its model has "
                "not."
            )
        targets[name].write(state.weight)
        zero = state.weight == 0
        if state.pruned is None and 0 < entries[name]["pruned"] == int(zero.sum()):
            state = dataclasses.replace(state, pruned=zero)
        states[name] = state
    return Layers(targets, states)
