"""The bytes of a compressed model on disk, from the shapes and the grids of its layers."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import adapter, manifest
from optimum_order.estimate.trace import Counter, size_of
from optimum_order.formats.layout import blocks
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.source import Checkpoint, InMemory
from optimum_order.models.units import Target

SHARD = "5GB"
"""Of one weight file, as `artifact.save` has it by default."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
# In a file the widest dtypes come first, in an order that safetensors fixes.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "I8", "U8", "BOOL")


def empty(source: Checkpoint | InMemory) -> PreTrainedModel:
    """The model without its numbers, on the meta device, in evaluation mode.

    Raises:
        ModelError: If the checkpoint's files cannot be read, or do not fill the model.
    """
    if isinstance(source, InMemory):
        tensors = [*source.model.parameters(), *source.model.buffers()]
        memo: dict[int, Any] = {id(tensor): _like(tensor) for tensor in tensors}
        copied: PreTrainedModel = copy.deepcopy(source.model, memo)
        return copied
    trusted = source._hub["trust_remote_code"]
    model: PreTrainedModel
    # Code that comes with a model may load in ways that nobody can follow.
    if trusted and getattr(source.config, "auto_map", None):
        with torch.device("meta"):
            model = source.auto.from_config(source.config, trust_remote_code=trusted).eval()
        return model
    model = source.skeleton().to("meta")  # type: ignore[arg-type]
    return model


def _like(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model on disk.

    Args:
        format: The name of its format.
        bytes: Of its weight files.
        exact: Whether they are the same whatever the weights are.
    """

    format: str
    bytes: int
    exact: bool


def stored(
    model: PreTrainedModel,
    layers: Mapping[str, tuple[Target, LayerState]],
    format: str,
    order: str,
    beside: Mapping[str, Any] | None = None,
) -> Stored:
    """What `artifact.save` would write.

    Args:
        model: On the meta device.
        layers: Each compressed layer with the state of a smaller one that was treated like it.
        format: A name, or "auto".
        order: The canonical order, which stands in every file.
        beside: What goes with the layers, as fields of `formats.Contents`.

    Raises:
        FormatError: If the format cannot hold the model.
    """
    large = {
        (id(sample), target.view.shape): grown(sample, *target.view.shape)
        for target, sample in layers.values()
    }
    targets = {name: target for name, (target, _) in layers.items()}
    states = {
        name: large[id(sample), target.view.shape] for name, (target, sample) in layers.items()
    }
    contents = formats.Contents(model, formats.Layers(targets, states), **(beside or {}))
    encoded: dict[tuple[Any, ...], tuple[dict[str, Tensor], bool]] = {}
    replaced: dict[str, dict[str, Tensor]] = {}
    exact = True
    with Counter():  # answers what formats ask of numbers that are not there
        # Whether the folder is proven to load is no matter of its size.
        chosen = formats.choose(contents, format, unproven=True)
    header = {manifest.KEY: order}
    size = formats.container(chosen.name).weight_bytes(contents, chosen, header)
    adapters = {name: s.adapter for name, s in states.items() if s.adapter is not None}
    added = _file_bytes(adapter.tensors(adapters), adapter.METADATA) if adapters else 0
    if size is not None:
        return Stored(chosen.name, size + added, True)
    with Counter():
        for name, (target, sample) in layers.items():
            rows, inputs = target.view.shape
            for piece in contents.layout.pieces(target) if chosen.encodes(states[name]) else ():
                whole = piece.rows == (inputs if target.transposed else rows)
                like = id(sample), rows if whole else piece.rows, inputs
                if like not in encoded:
                    encoded[like] = _encoded(chosen, sample, grown(sample, *like[1:]))
                tensors, sure = encoded[like]
                prefix, exact = piece.key.removesuffix("weight"), exact and sure
                replaced.setdefault(piece.key, {}).update(
                    {prefix + local: t for local, t in tensors.items()}
                )
    header["format"] = "pt"
    files: list[dict[str, Tensor]] = [{}]
    dense = hf.tensors_to_save(model)
    for block in blocks(dense):
        for key, tensor in hf.to_checkpoint(model, {name: dense[name] for name in block}).items():
            tensors = replaced.get(key, {key: tensor})
            if files[-1] and size_of((files[-1], tensors)) > convert_file_size_to_int(SHARD):
                files.append({})
            files[-1].update(tensors)
    weights = sum(_file_bytes(part, header) for part in files)
    return Stored(chosen.name, weights + added, exact)


def grown(sample: LayerState, rows: int, inputs: int) -> LayerState:
    """Return a layer of this shape with all else like the sample's, on the meta device.

    Args:
        sample: A small layer.
        rows: Outputs of the layer.
        inputs: Inputs of the layer.
    """
    dtype = sample.weight.dtype
    pruned = None
    if (
        sample.pruned is not None
    ):  # the one mask that takes no memory; formats ask whether anything was pruned
        pruned = sample.pruned.any().expand(rows, inputs)
    grid = None if sample.grid is None else sample.grid.like(rows, inputs)
    weight = _meta(rows, inputs, dtype=dtype)
    adapter = None if sample.adapter is None else sample.adapter.like(rows, inputs)
    return LayerState(weight, pruned=pruned, grid=grid, inputs=sample.inputs, adapter=adapter)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _encoded(
    format: formats.Codec, sample: LayerState, grown: LayerState
) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a layer, and whether their sizes depend on no value."""
    exact = format.size(formats.outline(grown)).exact
    try:
        return format.encode(grown), exact
    except NotImplementedError:  # torch has no numbers on meta: scale what the sample becomes
        ratio = grown.weight.numel() / sample.weight.numel()
        tensors = format.encode(sample)
        sizes = {local: round(tensor.numel() * ratio) for local, tensor in tensors.items()}
        return {
            local: _meta(sizes[local], dtype=tensor.dtype) for local, tensor in tensors.items()
        }, False


def _file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of a safetensors file: a length, a padded JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for key in sorted(tensors, key=lambda key: (_ORDER.index(_NAMES[tensors[key].dtype]), key)):
        end = begin + tensors[key].nbytes
        header[key] = {
            "dtype": _NAMES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + begin
