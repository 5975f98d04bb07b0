"""An artifact in another format: the same values, and the same account of how they came to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats import Layers
from optimum_order.formats import safetensors as checkpoint
from optimum_order.models import hf
from optimum_order.models.source import auto_class, load_processor
from optimum_order.models.units import find_targets


def convert(
    folder: str | Path, path: str | Path, format: str = "auto", *, overwrite: bool = False
) -> dict[str, Any]:
    """Save an artifact in another format, every weight with the value it has, to the bit.

    The manifest stays as it is, but for what it says of the files, and without metrics that were measured on kernels
    which the new format is not run on. What the old format did not store is not made up: the grid of a layer that was
    stored dense, and its mask unless "sparse" stored it, or exactly as many of its weights are zero as were pruned.

    Args:
        folder: The artifact; it has to be what its manifest says.
        path: The folder to write.
        format: A format's name, or "auto" for the smallest that holds every layer exactly.
        overwrite: Whether a folder that is not empty may be replaced.

    Returns:
        The new manifest.

    Raises:
        ArtifactError: If there is no artifact, or it is not what its manifest says.
        FormatError: If the format cannot hold a layer exactly; the message names those that can.
        OutputError: If the new folder cannot be written. Nothing is left half-written.
    """
    folder, path = Path(folder), Path(path)
    artifact.check_output(path, overwrite=overwrite)
    if problems := verify(folder):
        raise ArtifactError(
            f"'{folder}' is not what its manifest says: {problems[0]} Get it again; 'optimum-order verify' lists all "
            f"differences ({len(problems)})."
        )
    stated = manifest.load(folder)
    source = formats.available().get(stated["format"])
    if source is None:
        raise ArtifactError(
            f"'{folder}' is stored as '{stated['format']}', which is no format that is installed."
        )
    model = _load(folder)
    layers = _layers(folder, stated["layers"], model)
    try:
        chosen = formats.choose(model, layers, format)
    except FormatError as error:
        if source.name != "dense":
            raise
        raise FormatError(
            f"{error} What is stored dense are values; whatever codes they had are not there."
        ) from error
    runs_same = chosen.name == source.name or (chosen.runs_dense and source.runs_dense)
    facts = stated | ({} if runs_same else {"metrics": {}})
    processor = load_processor(
        str(folder), {"revision": None, "token": None, "trust_remote_code": False}
    )
    return artifact.save(model, processor, layers, facts, path, format=chosen, overwrite=overwrite)


def _load(folder: Path) -> PreTrainedModel:
    """The model of an artifact as an ordinary one, with zeros in place of the layers that are encoded."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config)
    shapes = hf.to_checkpoint(skeleton, skeleton.state_dict())  # those of its checkpoint
    tensors, encoded = checkpoint.plain(folder)
    if strange := encoded - set(shapes):
        raise ArtifactError(
            f"'{folder}' has a layer '{min(strange)}', which {type(skeleton).__name__} has not."
        )
    tensors |= {key: torch.zeros(shapes[key].shape, dtype=shapes[key].dtype) for key in encoded}
    model, info = type(skeleton).from_pretrained(
        None, config=config, state_dict=tensors, dtype=config.dtype, output_loading_info=True
    )
    if missing := info["missing_keys"]:
        raise ArtifactError(
            f"'{folder}' lacks '{min(missing)}', which {type(skeleton).__name__} has."
        )
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _layers(folder: Path, stated: Mapping[str, Any], model: PreTrainedModel) -> Layers:
    """Every layer that was compressed, read from the artifact and written into the model."""
    targets = {target.name: target for target in find_targets(model)}
    layers = {}
    for name, state in checkpoint.read(
        folder, {name: said.get("stored") for name, said in stated.items()}
    ):
        if name not in targets or targets[name].view.shape != state.weight.shape:
            raise ArtifactError(
                f"'{folder}' has a layer '{name}' {tuple(state.weight.shape)}, which its model has not."
            )
        targets[name].write(state.weight)
        zero = state.weight == 0
        if state.pruned is None and 0 < stated[name]["pruned"] == int(zero.sum()):
            state = dataclasses.replace(state, pruned=zero)
        layers[name] = (targets[name], state)
    return layers
