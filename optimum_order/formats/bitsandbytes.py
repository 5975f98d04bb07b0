"""Stock bitsandbytes checkpoints, 4 bit (nf4, fp4) and 8 bit, with the codes of the layer as is.

Nothing is quantized again on the way to disk: that would move the scales of a layer that was pruned
after it was quantized.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Codec, Config, Layers, Size, grid_of, outline
from optimum_order.formats.layout import Layout
from optimum_order.formats.names import Names
from optimum_order.layers.grids.bitsandbytes import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    BlockGrid,
    NestedScales,
    RowGrid,
    levels,
    nested_levels,
)
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

_QUANT_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONG_OFFSET = 1.1754943508222875e-38
"""A float32 that has as many digits as any when it is written out."""


class BitsAndBytes(Codec):
    """Two codes a byte and a quant state beside them, or int8 codes and one scale for each row."""

    name = "bitsandbytes"
    summary = "stock 4-bit (nf4, fp4) and 8-bit checkpoints; read by transformers"
    runs_dense = False
    packages = ("accelerate", "bitsandbytes")
    tensors = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        f"{_QUANT_STATE}nf4",
        f"{_QUANT_STATE}fp4",
        "SCB",
        "weight_format",
    )

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if not isinstance(state.grid, (BlockGrid, RowGrid)):
            return f"its {type(state.grid).__name__} is not a grid of the bitsandbytes library"
        if target.kind == "expert":
            return "it is a fused expert, which the library has no module for"
        if target.kind == "embedding":
            return "it is an embedding, which the library has no module for"
        if target.kind == "conv2d":
            return "it is a convolution, which the library has no module for"
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not layers.states:
            return "No layer is quantized."
        if replaced := hf.replaced_on_load(layout.model, self.name):
            return f"transformers replaces {replaced} when it loads this format."
        for name, target, _ in layers:
            pieces = layout.pieces(target)
            if len(pieces) != 1 or not pieces[0].whole or pieces[0].key in layout.converted:
                return (
                    f"Layer '{name}' is not stored as a matrix of its own in this model's "
                    "checkpoints."
                )
            if type(layout.model.get_submodule(name)) not in (nn.Linear, hf.Conv1D):
                return (
                    f"Layer '{name}' is a subclass of nn.Linear, which transformers would not "
                    "replace."
                )
        schemes = sorted({json.dumps(self.scheme(state)) for state in layers.states.values()})
        if len(schemes) > 1:
            return (
                f"All layers must have one data type, these have {len(schemes)}: "
                f"{', '.join(schemes)}."
            )
        names = Names(layout.model)
        skipped = hf.modules_left_dense(layout.model, self._skip(layout, layers))
        for name in layers.states:
            if any(hf.is_left_dense(spelling, skipped) for spelling in names.spellings(name)):
                return (
                    f"transformers would load layer '{name}' dense: it cannot be told apart from "
                    "those left alone."
                )
        return None

    def size(self, state: LayerState) -> Size:
        if not isinstance(state.grid, BlockGrid):
            return Size(state.weight.numel() + grid_of(state, RowGrid).absmax.nbytes + 1)
        grid = grid_of(outline(state), BlockGrid)
        exact = True
        if state.grid.nested is not None and grid.nested is not None:
            offset = state.grid.nested.offset  # which the library writes out as text
            exact = not offset.is_meta
            offset = offset.cpu() if exact else torch.tensor(_LONG_OFFSET)
            grid = dataclasses.replace(grid, nested=dataclasses.replace(grid.nested, offset=offset))
        codes = torch.empty(state.weight.shape, dtype=torch.uint8, device="meta")
        encoded = self._encode_blocks(grid, codes)
        return Size(sum(tensor.nbytes for tensor in encoded.values()), exact)

    def scheme(self, state: LayerState) -> dict[str, Any]:
        dtype = str(state.weight.dtype).removeprefix("torch.")
        if isinstance(state.grid, BlockGrid):
            nested = state.grid.nested is not None
            return {"data_type": state.grid.data_type, "dtype": dtype, "double_quant": nested}
        return {"data_type": "int8", "dtype": dtype}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        if isinstance(state.grid, BlockGrid):
            codes = state.grid.quantize(state.weight).to(torch.uint8)
            return self._encode_blocks(state.grid, codes)
        grid = grid_of(state, RowGrid)
        return {
            "weight": grid.quantize(state.weight).to(torch.int8),
            "SCB": grid.absmax,
            "weight_format": torch.tensor(0, dtype=torch.uint8),  # rows, the only one there is
        }

    def _encode_blocks(self, grid: BlockGrid, codes: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import QuantState  # here: importing the library costs seconds

        nested = grid.nested
        inner = nested and QuantState(
            absmax=nested.absmax,
            code=nested_levels(codes.device).clone(),  # safetensors stores no tensor twice
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        outer = QuantState(
            absmax=nested.codes if nested else grid.absmax,
            shape=codes.shape,
            code=levels(grid.data_type, codes.device).clone(),
            blocksize=grid.blocksize,
            quant_type=grid.data_type,
            dtype=grid.dtype,
            offset=nested and nested.offset,
            state2=inner,
        )
        pairs = codes.flatten()
        pairs = torch.cat([pairs, pairs.new_full((pairs.numel() % 2,), grid.zero)]).view(-1, 2)
        state = outer.as_dict(packed=True)
        return {
            "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
            **{f"weight.{key}": value for key, value in state.items()},
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        if scheme["data_type"] == "int8":
            return self._decode_rows(tensors, _DTYPES[scheme["dtype"]])
        return self._decode_blocks(tensors, scheme)

    def _decode_rows(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerState:
        weight = tensors.get("weight")
        absmax = tensors.get("SCB")
        if weight is None or absmax is None or weight.dtype != torch.int8 or weight.ndim != 2:
            raise ArtifactError("an int8 layer has an int8 matrix 'weight' and its scales 'SCB'")
        _check_scales(absmax, len(weight))
        if (weight == -128).any():
            raise ArtifactError("int8 codes lie in -127 ... 127")
        grid = RowGrid(absmax, weight.shape[1], dtype)
        return LayerState(grid.dequantize(weight.short()), grid=grid)

    def _decode_blocks(
        self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]
    ) -> LayerState:
        data_type = scheme["data_type"]
        name = f"{_QUANT_STATE}{data_type}"
        wanted = {"weight", "weight.absmax", "weight.quant_map", name}
        if scheme["double_quant"]:
            wanted |= {"weight.nested_absmax", "weight.nested_quant_map"}
        if set(tensors) != wanted:
            raise ArtifactError(
                f"a 4-bit layer has the tensors {', '.join(sorted(wanted))}, got "
                f"{', '.join(tensors)}"
            )
        facts = _facts(tensors[name])
        shape: Any = facts.get("shape")
        blocksize: Any = facts.get("blocksize")
        is_shape = isinstance(shape, list) and len(shape) == 2
        if (
            not (is_shape and all(isinstance(size, int) and size > 0 for size in shape))
            or blocksize not in BLOCKSIZES
            or facts.get("quant_type") != data_type
            or facts.get("dtype") != scheme["dtype"]
        ):
            raise ArtifactError(
                f"its quant state does not fit config.json: {json.dumps(facts)[:200]}"
            )
        weights = shape[0] * shape[1]
        packed = tensors["weight"]
        if packed.dtype != torch.uint8 or packed.numel() != -(-weights // 2):
            raise ArtifactError(
                f"{packed.numel()} {packed.dtype} codes are not a 4-bit layer of {shape}"
            )
        if not _alike(tensors["weight.quant_map"], levels(data_type, torch.device("cpu"))):
            raise ArtifactError(f"its quant map is not that of {data_type}")
        blocks = -(-weights // blocksize)
        nested = _nested_scales(tensors, facts, blocks) if scheme["double_quant"] else None
        absmax = tensors["weight.absmax"] if nested is None else nested.dequantize()
        _check_scales(absmax, blocks)
        flat = packed.flatten()
        codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:weights].view(shape).short()
        dtype = _DTYPES[scheme["dtype"]]
        grid = BlockGrid(data_type, absmax, blocksize, shape[1], dtype, nested)
        return LayerState(grid.dequantize(codes), grid=grid)

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        scheme = self.scheme(next(iter(layers.states.values())))
        skip = self._skip(layout, layers)
        if scheme["data_type"] == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=scheme["data_type"],
                bnb_4bit_use_double_quant=scheme["double_quant"],
                bnb_4bit_compute_dtype=scheme["dtype"],
                llm_int8_skip_modules=skip,
            )
        entry: Config = config.to_dict()
        return entry

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        entry = config["quantization_config"]
        dtype = config.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ArtifactError(
                f"config.json must give 'dtype' as {', '.join(_DTYPES)}, got {dtype!r}"
            )
        if entry.get("load_in_8bit") is True:
            return {"data_type": "int8", "dtype": dtype}
        data_type = entry.get("bnb_4bit_quant_type")
        double_quant = entry.get("bnb_4bit_use_double_quant")
        if data_type not in ("nf4", "fp4") or not isinstance(double_quant, bool):
            raise ArtifactError(
                f"quantization_config names no data type of bitsandbytes, got {data_type!r}"
            )
        return {"data_type": data_type, "dtype": dtype, "double_quant": double_quant}

    @staticmethod
    def _skip(layout: Layout, layers: Layers) -> list[str]:
        """Return the modules that transformers would replace if it were not told to skip them.

        They are named as without a head: transformers compares the ends of names.
        """
        names = Names(layout.model)
        skip: list[str] = []
        for name, module in layout.model.named_modules():
            if isinstance(module, (nn.Linear, hf.Conv1D)) and name not in layers.states:
                skip += [names.inner(name)] if names.is_unique(name) else names.spellings(name)
        return skip


def _facts(state: Tensor) -> dict[str, Any]:
    """Return what the quant state of a layer says, which nobody has checked.

    Raises:
        ArtifactError: If it is no JSON object.
    """
    from bitsandbytes.utils import unpack_tensor_to_dict

    if state.dtype != torch.uint8 or state.ndim != 1:
        # Of a single number, Python would make as many bytes.
        raise ArtifactError(
            f"its quant state must be one dimension of uint8, got {state.dtype} with {state.ndim} "
            "dimensions"
        )
    try:
        facts = unpack_tensor_to_dict(state)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"its quant state cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise ArtifactError("its quant state is no JSON object")
    return facts


def _nested_scales(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], blocks: int
) -> NestedScales:
    """Return the nested scales of a layer.

    Args:
        tensors: The tensors of the layer.
        facts: What its quant state says.
        blocks: How many scales there must be.

    Raises:
        ArtifactError: If they do not fit.
    """
    codes = tensors["weight.absmax"]
    absmax = tensors["weight.nested_absmax"]
    offset = facts.get("nested_offset")
    table = nested_levels(torch.device("cpu"))
    if (
        codes.dtype != torch.uint8
        or codes.shape != (blocks,)
        or absmax.dtype != torch.float32
        or absmax.shape != (-(-blocks // NESTED_BLOCKSIZE),)
        or not isinstance(offset, float)
        or facts.get("nested_blocksize") != NESTED_BLOCKSIZE
        or not _alike(tensors["weight.nested_quant_map"], table)
    ):
        raise ArtifactError("its nested scales do not fit the layer")
    return NestedScales(codes, absmax, torch.tensor(offset))


def _alike(tensor: Tensor, table: Tensor) -> bool:
    """Return whether a tensor is a table; PyTorch compares float8 with nothing else."""
    return tensor.dtype == table.dtype and torch.equal(tensor, table)


def _check_scales(absmax: Tensor, count: int) -> None:
    """Raise ArtifactError unless these are as many scales as a layer has."""
    if absmax.dtype != torch.float32 or absmax.shape != (count,):
        raise ArtifactError(
            f"expected {count} float32 scales, got {absmax.dtype} of shape {tuple(absmax.shape)}"
        )
    if not (absmax > 0).all() or not torch.isfinite(absmax).all():
        raise ArtifactError("scales must be finite and positive")
