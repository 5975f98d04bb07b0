"""compressed-tensors `pack-quantized`: integers of 2-8 bits packed into int32, what vLLM and stock transformers read.

Symmetric grids only: transformers reloads the others just when the caller asks for `dequantize=True`. Several
widths in one model become several config groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from pydantic import ValidationError
from torch import Tensor, nn

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Format, Layers, Layout, quantized
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

_EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Matches every expert of a checkpoint; transformers looks for the word to find the experts' group."""


class CompressedTensors(Format):
    """Packed codes, the scales in the model's dtype, and the shape."""

    name = "compressed-tensors"
    packages = ("compressed-tensors",)
    summary = "pack-quantized, 2-8 bit symmetric integers; read by transformers and vLLM"
    tensors = ("weight_packed", "weight_scale", "weight_shape")

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if state.grid is None:
            return None
        if target.kind == "conv1d":
            return "it is a GPT-2 Conv1D, in whose place transformers would load random weights"
        if target.kind == "conv2d":
            return "it is a convolution, and transformers unpacks linear layers only"
        if not isinstance(state.grid, UniformGrid):
            return f"its {type(state.grid).__name__} is not a grid of equal steps"
        if not state.grid.symmetric:
            return "its grid has zero points, which transformers does not reload by default; use symmetric=true"
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not quantized(layers):
            return "No layer is quantised."
        if found := hf.replaced_on_load(layout.model, self.name):
            return f"transformers replaces {found} when it loads this format."
        packed = set()
        for name, (target, _) in quantized(layers).items():
            pieces = layout.pieces(name, target)
            split = target.kind != "expert" and (
                len(pieces) != 1 or pieces[0].key in layout.converted
            )
            if (
                not pieces
                or split
                or target.transposed
                or not all(piece.whole and piece.key.endswith(".weight") for piece in pieces)
            ):
                return f"Layer '{name}' is not stored as a matrix of its own in this model's checkpoints."
            packed |= {piece.key for piece in pieces}
        # transformers unpacks all that it fuses on loading with the one scheme of the experts, and drops the rest.
        if left := layout.converted - packed:
            return f"All experts must be quantised along with the rest of the model; '{min(left)}' is not."
        experts = [
            key
            for key, names in _groups(layers).items()
            if any(layers[n][0].kind == "expert" for n in names)
        ]
        if len(experts) > 1:
            given = ", ".join(f"{bits} bits in groups of {size}" for bits, size in experts)
            return f"All experts must have one width and group size; these have {given}."
        return None

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {"num_bits": state.grid.bits, "group_size": state.grid.group_size}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        if state.grid is None:
            return {"weight": state.weight}
        codes = state.grid.quantize(state.weight).to(torch.int8)
        return {
            "weight_packed": pack_to_int32(codes, state.grid.bits),
            "weight_scale": state.grid.scale,
            "weight_shape": torch.tensor(state.weight.shape),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        if set(tensors) != set(self.tensors):
            raise ArtifactError(
                f"a packed layer has the tensors {', '.join(self.tensors)}, got {', '.join(tensors)}"
            )
        packed, scale, shape = (tensors[name] for name in self.tensors)
        bits, size = scheme["num_bits"], scheme["group_size"]
        if (
            packed.dtype != torch.int32
            or packed.ndim != 2
            or shape.shape != (2,)
            or shape.dtype != torch.int64
        ):
            raise ArtifactError("packed codes must be an int32 matrix, and their shape two int64")
        rows, inputs = shape.tolist()
        groups = 1 if size == -1 else inputs // size
        if rows != len(packed) or inputs < 1 or packed.shape[1] != -(-inputs * bits // 32):
            raise ArtifactError(
                f"{tuple(packed.shape)} packed codes of {bits} bits are not a layer of {(rows, inputs)}"
            )
        if scale.shape != (rows, groups) or groups * (inputs if size == -1 else size) != inputs:
            raise ArtifactError(
                f"scales of shape {tuple(scale.shape)} do not fit {(rows, inputs)} in groups of {size}"
            )
        if (
            not scale.is_floating_point()
            or not (scale > 0).all()
            or not torch.isfinite(scale).all()
        ):
            raise ArtifactError("scales must be finite and positive")
        grid = UniformGrid(bits=bits, scale=scale, zero_point=None, inputs=inputs)
        return LayerState(
            grid.dequantize(unpack_from_int32(packed, bits, (rows, inputs)).short()), grid=grid
        )

    def quantization_config(self, layout: Layout, layers: Layers) -> dict[str, Any] | None:
        found = _groups(layers)
        linear = [
            name for name, module in layout.model.named_modules() if isinstance(module, nn.Linear)
        ]
        groups = {}
        for index, ((bits, size), names) in enumerate(found.items()):
            weights = QuantizationArgs(
                num_bits=bits,
                type="int",
                symmetric=True,
                strategy="channel" if size == -1 else "group",
                group_size=None if size == -1 else size,
            )
            targets = dict.fromkeys(
                _EXPERTS if layers[name][0].kind == "expert" else name for name in names
            )
            groups[f"group_{index}"] = QuantizationScheme(
                # One group is written the way everybody writes it; engines match several by name.
                targets=["Linear"] if len(found) == 1 else list(targets),
                weights=weights,
                format="pack-quantized",
            )
        config = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status="compressed",
            ignore=[name for name in linear if name not in quantized(layers)],
        )
        return {"version": __version__, **config.model_dump(mode="json")}

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        try:
            groups = QuantizationConfig.model_validate(
                config["quantization_config"]
            ).config_groups.values()
        except (
            ValidationError,
            KeyError,
            TypeError,
        ) as error:  # it compares before it has looked at types
            reason = str(error).replace("\n", " ")[:300]
            raise ArtifactError(
                f"quantization_config is not one of compressed-tensors: {reason}"
            ) from error
        named = [
            group
            for group in groups
            if any(_matches(t, name) for t in group.targets for name in names)
        ]
        group = next(iter(named or [group for group in groups if "Linear" in group.targets]), None)
        if group is None or group.weights is None:
            raise ArtifactError("quantization_config has no config group for it")
        weights = group.weights
        integers = weights.type == "int" and weights.symmetric and 2 <= weights.num_bits <= 8
        if (
            not integers
            or weights.strategy not in ("group", "channel")
            or weights.actorder is not None
        ):
            raise ArtifactError(
                "its config group must be symmetric integers of 2 to 8 bits, by channel or in groups"
            )
        return {
            "num_bits": weights.num_bits,
            "group_size": weights.group_size if weights.strategy == "group" else -1,
        }


def _groups(layers: Layers) -> dict[tuple[int, int], list[str]]:
    """The layers by width and group size, -1 for whole rows."""
    layers = quantized(layers)
    several = {
        (target.kind, state.grid.bits, state.grid.group_size)
        for target, state in layers.values()
        if state.grid.group_size != -1
    }
    groups: dict[tuple[int, int], list[str]] = {}
    for name, (target, state) in layers.items():
        # A row that is just one group long is a group like those of its kind; experts must not differ in it.
        short = (target.kind, state.grid.bits, state.grid.unit) in several
        key = (state.grid.bits, state.grid.unit if short else state.grid.group_size)
        groups.setdefault(key, []).append(name)
    return groups


def _matches(target: str, name: str) -> bool:
    # Never any other pattern: a file could hold one that takes forever to match.
    return target == name or (target == _EXPERTS and re.match(_EXPERTS[3:], name) is not None)
