"""compressed-tensors: integers or float8 numbers, with or without rounded inputs, for vLLM.

Weights alone are `pack-quantized`, 2 to 8 bits in int32. Where inputs are rounded too a code takes
a byte, also one of 4 bits: `int-quantized`, as vLLM's kernels read it, or `float-quantized`.

Symmetric grids only: transformers reloads others only if the caller asks for `dequantize=True`.
Several kinds of layers in one model become several config groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from pydantic import ValidationError
from torch import Tensor, nn

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Codec, Config, Layers, Size, grid_of
from optimum_order.formats.compressed_tensors_scheme import KINDS, PACKED, Scheme
from optimum_order.formats.layout import Layout
from optimum_order.formats.names import Names, ends_with, suffix_of, suffix_pattern
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.float8 import Float8Grid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.inputs import FLOAT8, InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

_EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Matches every expert of a checkpoint; transformers finds the experts' group by the word."""


_IN_INT32 = ("weight_packed", "weight_scale", "weight_shape")
_IN_BYTES = ("weight", "weight_scale")
_INPUT_SCALE = "input_scale"


class CompressedTensors(Codec):
    """Codes, the scales in the model's dtype, and what inputs are rounded to."""

    name = "compressed-tensors"
    # Older ones read 3, 5, 6 and 7 bits wrongly, without a word.
    packages = ("compressed-tensors>=0.18",)
    summary = "2-8 bit symmetric integers or float8, inputs too; read by transformers and vLLM"
    tensors = (*_IN_INT32, "weight", _INPUT_SCALE)
    holds_inputs = True

    def encodes(self, state: LayerState) -> bool:
        return state.grid is not None or state.inputs is not None

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if target.kind == "conv1d":
            return "it is a GPT-2 Conv1D, in whose place transformers would load random weights"
        if target.kind == "embedding":
            return "it is an embedding, and transformers unpacks linear layers only"
        if target.kind == "conv2d":
            return "it is a convolution, and transformers unpacks linear layers only"
        if state.grid is None:
            return (
                "its inputs are rounded and its weights are not; add a stage such as "
                "rtn(bits=8, group_size=-1)"
            )
        if isinstance(state.grid, DualScaleGrid):
            return (
                "its columns have steps of their own; save it as 'coded', and then "
                "'optimum-order compress CODED OUT --format compressed-tensors' moves these steps "
                "into what makes the input"
            )
        if not isinstance(state.grid, (Float8Grid, UniformGrid)):
            return f"its {type(state.grid).__name__} is not a grid of equal steps"
        if isinstance(state.grid, UniformGrid) and not state.grid.symmetric:
            return (
                "its grid has zero points, which transformers does not reload by default; use "
                "symmetric=true"
            )
        return None if state.inputs is None else _why_not_inputs(target, state)

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
            scheme.words
            for scheme, names in _groups(layers).items()
            if any(layers.targets[name].kind == "expert" for name in names)
        ]
        if len(schemes) > 1:
            return (
                f"All experts must have one width and group size; these have {', '.join(schemes)}."
            )
        return None

    def size(self, state: LayerState) -> Size:
        if Scheme.of(state).format != PACKED:
            return super().size(state)
        grid = grid_of(state, UniformGrid)
        words = len(state.weight) * -(-grid.inputs * grid.bits // 32)
        return Size(4 * words + grid.scale.nbytes + 2 * 8)

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return dataclasses.asdict(Scheme.of(state))

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = cast("Float8Grid | UniformGrid", state.grid)
        tensors = {"weight_scale": grid.scale}
        if state.inputs is not None and state.inputs.scale is not None:
            tensors[_INPUT_SCALE] = state.inputs.scale
        codes = grid.quantize(state.weight)
        if isinstance(grid, Float8Grid):
            return {"weight": grid.numbers(codes), **tensors}
        if state.inputs is not None:
            return {"weight": codes.to(torch.int8), **tensors}
        packed = pack_to_int32(codes.to(torch.int8), grid.bits)
        return {
            "weight_packed": packed,
            "weight_shape": torch.tensor(state.weight.shape),
            **tensors,
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        described = Scheme(**scheme)
        packed = described.format == PACKED
        expected = {*(_IN_INT32 if packed else _IN_BYTES)}
        if described.inputs.endswith("tensor"):
            expected.add(_INPUT_SCALE)
        if set(tensors) != expected:
            raise ArtifactError(
                f"a layer that is '{described.format}' has the tensors "
                f"{', '.join(sorted(expected))}, got {', '.join(sorted(tensors))}"
            )
        state = _from_int32(tensors, described) if packed else _from_bytes(tensors, described)
        return dataclasses.replace(state, inputs=_inputs_in(tensors, described))

    def variant(self, layers: Layers) -> str:
        schemes = _groups(layers)
        if any(scheme.kind == "float" for scheme in schemes):
            return f"{self.name}, float8"
        if any(scheme.inputs for scheme in schemes):
            return f"{self.name}, inputs"
        return self.name if self.loads_dense(layers) else f"{self.name}, several widths"

    def loads_dense(self, layers: Layers) -> bool:
        return [scheme.format for scheme in _groups(layers)] == [PACKED]

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        names_of = Names(layout.model)
        by_scheme = _groups(layers)
        groups = {}
        for index, (scheme, names) in enumerate(by_scheme.items()):
            # One group is written the way everybody writes it; engines match several by name.
            targets: list[str] = ["Linear"]
            if len(by_scheme) > 1:
                kinds = {name: layers.targets[name].kind for name in names}
                targets = [_EXPERTS] if "expert" in kinds.values() else []
                targets += _targets([n for n in names if kinds[n] != "expert"], names_of)
            groups[f"group_{index}"] = QuantizationScheme(
                targets=targets,
                weights=scheme.weights(),
                input_activations=scheme.input_activations(),
                format=scheme.format,
            )
        stored = {scheme.format for scheme in by_scheme}
        linear = [
            name for name, module in layout.model.named_modules() if isinstance(module, nn.Linear)
        ]
        config = QuantizationConfig(
            config_groups=groups,
            format=stored.pop() if len(stored) == 1 else "mixed-precision",
            quantization_status="compressed",
            ignore=_targets([name for name in linear if name not in layers.states], names_of),
        )
        entry: Config = {"version": __version__, **config.model_dump(mode="json")}
        if self.loads_dense(layers):
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
        if group is None:
            raise ArtifactError("quantization_config has no config group for it")
        return dataclasses.asdict(Scheme.read(group))


def _why_not_inputs(target: Target, state: LayerState) -> str | None:
    """Return why the rounded inputs of a layer on a grid cannot be held, or None if they can."""
    assert state.inputs is not None
    if target.kind != "linear":
        return f"transformers rounds no inputs of a layer of the kind '{target.kind}'"
    weights = Scheme.of(state).kind
    if KINDS[state.inputs.data_type] == weights:
        return None
    wanted = "8" if weights == "int" else "fp8"
    return (
        f"its inputs are {state.inputs.data_type} and its weights {weights}s, which no kernel "
        f"multiplies; use activations:{wanted}"
    )


def _from_int32(tensors: Mapping[str, Tensor], scheme: Scheme) -> LayerState:
    """Return a layer of packed integers, without the grid of its inputs."""
    packed, scale, shape = (tensors[name] for name in _IN_INT32)
    if (
        packed.dtype != torch.int32
        or packed.ndim != 2
        or shape.shape != (2,)
        or shape.dtype != torch.int64
    ):
        raise ArtifactError("packed codes must be an int32 matrix, and their shape two int64")
    rows, inputs = shape.tolist()
    if rows != len(packed) or inputs < 1 or packed.shape[1] != -(-inputs * scheme.bits // 32):
        raise ArtifactError(
            f"{tuple(packed.shape)} packed codes of {scheme.bits} bits are not a layer of "
            f"{(rows, inputs)}"
        )
    _check_scales(scale, (rows, inputs), scheme.group_size)
    grid = UniformGrid(bits=scheme.bits, scale=scale, zero_point=None, inputs=inputs)
    codes = unpack_from_int32(packed, scheme.bits, (rows, inputs)).short()
    return LayerState(grid.dequantize(codes), grid=grid)


def _from_bytes(tensors: Mapping[str, Tensor], scheme: Scheme) -> LayerState:
    """Return a layer whose codes take a byte each, without the grid of its inputs."""
    codes, scale = (tensors[name] for name in _IN_BYTES)
    wanted = FLOAT8 if scheme.kind == "float" else torch.int8
    if codes.dtype != wanted or codes.ndim != 2 or not codes.numel():
        raise ArtifactError(f"codes must be a matrix of {wanted}, got {codes.dtype}")
    _check_scales(scale, (len(codes), codes.shape[1]), scheme.group_size)
    if scheme.kind == "float":
        if not torch.isfinite(codes.float()).all():
            raise ArtifactError("a float8 number is NaN")
        floats = Float8Grid(scale, codes.shape[1])
        return LayerState(floats.dequantize(floats.codes(codes)), grid=floats)
    low = -(2 ** (scheme.bits - 1))
    if int(codes.min()) < low or int(codes.max()) >= -low:
        raise ArtifactError(f"a code does not fit into {scheme.bits} bits")
    grid = UniformGrid(bits=scheme.bits, scale=scale, zero_point=None, inputs=codes.shape[1])
    return LayerState(grid.dequantize(codes.short()), grid=grid)


def _inputs_in(tensors: Mapping[str, Tensor], scheme: Scheme) -> InputGrid | None:
    """Return the grid of a layer's inputs.

    Raises:
        ArtifactError: If its scale is none.
    """
    if not scheme.inputs:
        return None
    scale = tensors.get(_INPUT_SCALE)
    if scale is not None:
        if scale.shape != (1,):
            raise ArtifactError(f"the scale of inputs must be one number, got {tuple(scale.shape)}")
        _check_positive(scale)
    return InputGrid(scheme.inputs.partition(" ")[0], scale)


def _check_scales(scale: Tensor, shape: tuple[int, int], size: int) -> None:
    """Check the scales of a layer.

    Args:
        scale: The scales.
        shape: Of the layer.
        size: Inputs that share a scale, -1 for a whole row.

    Raises:
        ArtifactError: If they do not fit, or are not finite and positive.
    """
    rows, inputs = shape
    groups = 1 if size == -1 else inputs // size
    if scale.shape != (rows, groups) or groups * (inputs if size == -1 else size) != inputs:
        raise ArtifactError(
            f"scales of shape {tuple(scale.shape)} do not fit {(rows, inputs)} in groups of {size}"
        )
    _check_positive(scale)


def _check_positive(scale: Tensor) -> None:
    is_ordinary = scale.is_floating_point() and scale.element_size() > 1
    if not is_ordinary or not bool((scale > 0).all()) or not torch.isfinite(scale).all():
        raise ArtifactError("scales must be finite and positive")


def _groups(layers: Layers) -> dict[Scheme, list[str]]:
    """Return the names of the layers by what their config group says."""
    schemes = {name: Scheme.of(state) for name, state in layers.states.items()}
    grouped = {
        (layers.targets[name].kind, scheme)
        for name, scheme in schemes.items()
        if scheme.group_size != -1
    }
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        # A row that is just one group long is a group like those of its kind; experts must not
        # differ in it.
        unit = cast(Grid, layers.states[name].grid).unit
        alike = dataclasses.replace(scheme, group_size=unit)
        is_short = (layers.targets[name].kind, alike) in grouped
        groups.setdefault(alike if is_short else scheme, []).append(name)
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
