"""compressed-tensors `pack-quantized`: 2-8 bit integers in int32, for vLLM and transformers.

Symmetric grids only: transformers reloads others only if the caller asks for `dequantize=True`.
Several widths in one model become several config groups.
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
from optimum_order.formats.base import Codec, Config, Layers, Size, grid_of
from optimum_order.formats.layout import Layout
from optimum_order.formats.names import Names, ends_with, suffix_of, suffix_pattern
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

_EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Matches every expert of a checkpoint; transformers finds the experts' group by the word."""


class CompressedTensors(Codec):
    """Packed codes, the scales in the model's dtype, and the shape."""

    name = "compressed-tensors"
    # Older ones read 3, 5, 6 and 7 bits wrongly, without a word.
    packages = ("compressed-tensors>=0.18",)
    summary = "pack-quantized, 2-8 bit symmetric integers; read by transformers and vLLM"
    tensors = ("weight_packed", "weight_scale", "weight_shape")

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if target.kind == "conv1d":
            return "it is a GPT-2 Conv1D, in whose place transformers would load random weights"
        if target.kind == "embedding":
            return "it is an embedding, and transformers unpacks linear layers only"
        if target.kind == "conv2d":
            return "it is a convolution, and transformers unpacks linear layers only"
        if isinstance(state.grid, DualScaleGrid):
            return (
                "its columns have steps of their own; save it as 'coded', and then "
                "'optimum-order compress CODED OUT --format compressed-tensors' moves these steps "
                "into what makes the input"
            )
        if not isinstance(state.grid, UniformGrid):
            return f"its {type(state.grid).__name__} is not a grid of equal steps"
        if not state.grid.symmetric:
            return (
                "its grid has zero points, which transformers does not reload by default; use "
                "symmetric=true"
            )
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not layers.states:
            return "No layer is quantized."
        if replaced := hf.replaced_on_load(layout.model, self.name):
            return f"transformers replaces {replaced} when it loads this format."
        packed = set()
        for name, target, _ in layers:
            pieces = layout.pieces(target)
            split = target.kind != "expert" and (
                len(pieces) != 1 or pieces[0].key in layout.converted
            )
            alone = all(piece.whole and piece.key.endswith(".weight") for piece in pieces)
            if not pieces or split or target.transposed or not alone:
                return (
                    f"Layer '{name}' is not stored as a matrix of its own in this model's "
                    "checkpoints."
                )
            packed |= {piece.key for piece in pieces}
        # transformers unpacks whatever it fuses on loading with the one scheme of the experts, and
        # drops the rest.
        if left := layout.converted - packed:
            return (
                "All experts must be quantized along with the rest of the model; "
                f"'{min(left)}' is not."
            )
        schemes = [
            f"{bits} bits in groups of {size}"
            for (bits, size), names in _groups(layers).items()
            if any(layers.targets[name].kind == "expert" for name in names)
        ]
        if len(schemes) > 1:
            return (
                f"All experts must have one width and group size; these have {', '.join(schemes)}."
            )
        return None

    def size(self, state: LayerState) -> Size:
        grid = grid_of(state, UniformGrid)
        words = len(state.weight) * -(-grid.inputs * grid.bits // 32)
        return Size(4 * words + grid.scale.nbytes + 2 * 8)

    def scheme(self, state: LayerState) -> dict[str, Any]:
        grid = grid_of(state, UniformGrid)
        return {"num_bits": grid.bits, "group_size": grid.group_size}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = grid_of(state, UniformGrid)
        codes = grid.quantize(state.weight).to(torch.int8)
        return {
            "weight_packed": pack_to_int32(codes, grid.bits),
            "weight_scale": grid.scale,
            "weight_shape": torch.tensor(state.weight.shape),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        if set(tensors) != set(self.tensors):
            raise ArtifactError(
                f"a packed layer has the tensors {', '.join(self.tensors)}, got "
                f"{', '.join(tensors)}"
            )
        packed, scale, shape = (tensors[name] for name in self.tensors)
        bits = scheme["num_bits"]
        size = scheme["group_size"]
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
                f"{tuple(packed.shape)} packed codes of {bits} bits are not a layer of "
                f"{(rows, inputs)}"
            )
        if scale.shape != (rows, groups) or groups * (inputs if size == -1 else size) != inputs:
            raise ArtifactError(
                f"scales of shape {tuple(scale.shape)} do not fit {(rows, inputs)} in groups of "
                f"{size}"
            )
        positive = scale.is_floating_point() and bool((scale > 0).all())
        if not positive or not torch.isfinite(scale).all():
            raise ArtifactError("scales must be finite and positive")
        grid = UniformGrid(bits=bits, scale=scale, zero_point=None, inputs=inputs)
        codes = unpack_from_int32(packed, bits, (rows, inputs)).short()
        return LayerState(grid.dequantize(codes), grid=grid)

    def variant(self, layers: Layers) -> str:
        return self.name if self.loads_dense(layers) else f"{self.name}, several widths"

    def loads_dense(self, layers: Layers) -> bool:
        return len(_groups(layers)) == 1

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        names_of = Names(layout.model)
        by_scheme = _groups(layers)
        groups = {}
        for index, ((bits, size), names) in enumerate(by_scheme.items()):
            weights = QuantizationArgs(
                num_bits=bits,
                type="int",
                symmetric=True,
                strategy="channel" if size == -1 else "group",
                group_size=None if size == -1 else size,
            )
            # One group is written the way everybody writes it; engines match several by name.
            targets: list[str] = ["Linear"]
            if len(by_scheme) > 1:
                kinds = {name: layers.targets[name].kind for name in names}
                targets = [_EXPERTS] if "expert" in kinds.values() else []
                targets += _targets([n for n in names if kinds[n] != "expert"], names_of)
            groups[f"group_{index}"] = QuantizationScheme(
                targets=targets,
                weights=weights,
                format="pack-quantized",
            )
        linear = [
            name for name, module in layout.model.named_modules() if isinstance(module, nn.Linear)
        ]
        config = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status="compressed",
            ignore=_targets([name for name in linear if name not in layers.states], names_of),
        )
        entry: Config = {"version": __version__, **config.model_dump(mode="json")}
        if len(by_scheme) == 1:
            # transformers then decodes every layer while it loads, in place of at the first
            # forward. Whoever looks for a `.weight` finds one: PEFT, new heads, and modules that
            # multiply by it. It would decode several schemes by the first alone.
            entry["dequantize"] = True
        return entry

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        try:
            entry = QuantizationConfig.model_validate(config["quantization_config"])
        except (ValidationError, KeyError, TypeError) as error:
            # TypeError because the library compares before it checks types.
            reason = str(error).replace("\n", " ")[:300]
            raise ArtifactError(
                f"quantization_config is not one of compressed-tensors: {reason}"
            ) from error
        groups = list(entry.config_groups.values())
        names = list(names)
        named = [
            group
            for matches in _MATCHES
            for group in groups
            if any(matches(target, name) for target in group.targets for name in names)
        ]
        group = next(iter(named), None)
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
                "its config group must be symmetric integers of 2 to 8 bits, by channel or in "
                "groups"
            )
        return {
            "num_bits": weights.num_bits,
            "group_size": weights.group_size if weights.strategy == "group" else -1,
        }


def _groups(layers: Layers) -> dict[tuple[int, int], list[str]]:
    """Return the names of the layers by width and group size, -1 for whole rows."""
    grids = {name: grid_of(state, UniformGrid) for name, state in layers.states.items()}
    grouped = {
        (layers.targets[name].kind, grid.bits, grid.group_size)
        for name, grid in grids.items()
        if grid.group_size != -1
    }
    groups: dict[tuple[int, int], list[str]] = {}
    for name, grid in grids.items():
        # A row that is just one group long is a group like those of its kind; experts must not
        # differ in it.
        short = (layers.targets[name].kind, grid.bits, grid.unit) in grouped
        size = grid.unit if short else grid.group_size
        groups.setdefault((grid.bits, size), []).append(name)
    return groups


def _targets(names: Iterable[str], names_of: Names) -> list[str]:
    """Return what engines know these layers by, with their head and without.

    Args:
        names: Names of the layers.
        names_of: Names of the model.
    """
    targets: list[str] = []
    for name in names:
        inner = names_of.inner(name)
        # A pattern that contains the word would be taken for the one of fused experts; and a layer
        # outside the base model has one name.
        if "experts" in name or not names_of.is_unique(name):
            targets += names_of.spellings(name)
        elif "." not in inner and inner == name:
            targets.append(name)
        else:
            targets.append(f"re:{suffix_pattern(inner)}")
    return targets


# Never any other pattern than ours: a file could hold one that takes forever to match.


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_suffix(target: str, name: str) -> bool:
    suffix = suffix_of(target.removeprefix("re:")) if target.startswith("re:") else None
    return suffix is not None and ends_with(name, suffix)


def _is_expert(target: str, name: str) -> bool:
    return target == _EXPERTS and re.match(_EXPERTS[3:], name) is not None


def _is_class(target: str, name: str) -> bool:
    return target == "Linear"


_MATCHES = (_is_name, _is_suffix, _is_expert, _is_class)
"""Whether a target means a layer; the first kind that does wins, as it does in the library."""
