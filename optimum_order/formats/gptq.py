"""GPTQ checkpoints: `qweight`, `qzeros`, `scales` and `g_idx`, as GPTQModel and vLLM read them.

A layer W (out, in) is stored transposed. `qweight` (in * bits / 32, out) holds the codes of each
output as one stream of bits, lowest first, cut into int32; at 3 bit a code may lie across two
words. `qzeros` (groups, out * bits / 32) packs the zero points likewise along the outputs. `scales`
are (groups, out), and `g_idx` (in) names the group of each input.

    W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

Readers compute that in float16 or bfloat16 and cast the scales to it. GPTQModel and vLLM take the
dtype of the model (GPTQModel on a CPU: bfloat16, unless it is told otherwise), but transformers
keeps scales and biases in float16 and casts the product, so a bfloat16 layer is held only where
that comes to the same. A product of a bfloat16 scale and a code of up to 3 bits and sign fits into
float16, if no scale is below 2^-17: symmetric grids up to 4 bit, asymmetric ones up to 3 bit.
`benchmarks/check_gptqmodel.py` compares them all.

Two spellings exist. "gptq" stores the zero points less one, so that zero wraps around, and
GPTQModel refuses an asymmetric model in it that it did not write itself; it is what everybody
reads, and symmetric models are stored so. "gptq_v2" stores the zero points as they are, for
asymmetric models. vLLM's Marlin kernels take neither that nor other widths than 4 and 8 bit, in
groups of 32, 64, 128 or whole rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Codec, Config, Layers, Size, grid_of
from optimum_order.formats.layout import Layout
from optimum_order.formats.names import Names, ends_with, suffix_of, suffix_pattern
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel takes; vLLM takes fewer."""

_CHECKPOINT_FORMAT = {True: "gptq", False: "gptq_v2"}
"""By whether the model is symmetric."""
_BFLOAT16_BITS = {True: 4, False: 3}
"""Most bits whose products with a bfloat16 scale fit into float16, by whether it is symmetric."""
_ROUNDED = (
    "its values come out otherwise in float16, where transformers computes them; compress in "
    "float16"
)
_KEYS = {"quant_method", "checkpoint_format", "bits", "group_size", "desc_act", "sym"}
_OPTIONAL = {"dynamic", "modules_in_block_to_quantize"}


class GPTQ(Codec):
    """Packed codes and zero points, scales in the model's dtype, and the group of each input."""

    name = "gptq"
    summary = (
        "GPTQ checkpoints, 2-4 and 8 bit; read by GPTQModel and vLLM, and by transformers beside "
        "GPTQModel"
    )
    stock = False
    packages = ("accelerate", "gptqmodel", "optimum")
    tensors = ("qweight", "qzeros", "scales", "g_idx")

    def why_not(self, target: Target, state: LayerState) -> str | None:
        grid = state.grid
        if not isinstance(grid, UniformGrid):
            return f"its {type(grid).__name__} is not a grid of equal steps"
        if target.kind not in ("linear", "conv1d"):
            return (
                f"its kind is '{target.kind}', and readers of this format take linear layers only"
            )
        if grid.bits not in BITS:
            return f"it has {grid.bits} bits, and readers of this format take 2, 3, 4 or 8"
        if grid.dtype not in (torch.float16, torch.bfloat16):
            dtype = str(grid.dtype).removeprefix("torch.")
            return (
                f"its scales are {dtype}, which readers would round; compress the model in float16 "
                "or bfloat16"
            )
        if any(size % 32 for size in state.weight.shape):
            return (
                f"its shape {tuple(state.weight.shape)} does not divide into words of 32 bits; it "
                "must by 32"
            )
        if grid.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES[1:]))
            return (
                f"its groups are of {grid.group_size}, and readers of this format take {sizes} or "
                "-1, whole rows"
            )
        if grid.dtype == torch.bfloat16 and grid.bits > _BFLOAT16_BITS[grid.symmetric]:
            return _ROUNDED
        return None

    def why_not_values(self, state: LayerState) -> str | None:
        grid = grid_of(state, UniformGrid)
        half = dataclasses.replace(grid, scale=grid.scale.half())
        rounded = half.dequantize(grid.quantize(state.weight)).to(grid.dtype)
        return None if torch.equal(rounded, state.weight) else _ROUNDED

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not layers.states:
            return "No layer is quantized."
        architecture = type(layout.model).__name__
        if not layout.model.can_generate() or layout.model.config.is_encoder_decoder:
            return (
                f"Readers of this format load causal language models, and {architecture} is none."
            )
        if replaced := hf.replaced_on_load(layout.model, self.name):
            return f"transformers replaces {replaced} when it loads this format."
        if layout.converted:
            return (
                f"Checkpoints of {architecture} take fused parameters apart, such as "
                f"'{min(layout.converted)}'."
            )
        linear = _linear(layout.model)
        for name, target, _ in layers:
            pieces = layout.pieces(target)
            if [(piece.key, piece.whole) for piece in pieces] != [(f"{name}.weight", True)]:
                return (
                    f"Layer '{name}' is not stored as a matrix of that name in this model's "
                    "checkpoints."
                )
            if name not in linear:
                return (
                    f"Layer '{name}' is outside the blocks or a subclass of nn.Linear, which "
                    "readers leave dense."
                )
            bias = layout.tensors.get(f"{name}.bias")
            if bias is None or bias.is_meta:
                continue
            if not torch.equal(bias.half().to(bias.dtype), bias):
                return (
                    f"Layer '{name}' has a bias that float16, in which transformers keeps it, does "
                    "not hold."
                )
        if len({grid_of(state, UniformGrid).symmetric for state in layers.states.values()}) > 1:
            return "All layers must be symmetric or none."
        return None

    def size(self, state: LayerState) -> Size:
        grid = grid_of(state, UniformGrid)
        codes = state.weight.numel() + grid.scale.numel()  # a zero point beside each scale
        return Size(codes * grid.bits // 8 + grid.scale.nbytes + 4 * grid.inputs)

    def scheme(self, state: LayerState) -> dict[str, Any]:
        grid = grid_of(state, UniformGrid)
        return {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = grid_of(state, UniformGrid)
        codes = grid.quantize(state.weight).int()
        if grid.zero_point is None:
            half = 2 ** (grid.bits - 1)
            codes = codes + half
            zeros = torch.full_like(grid.scale, half - 1, dtype=torch.int32)
        else:
            zeros = grid.zero_point.int()
        return {
            "qweight": _pack(codes.T, grid.bits),
            "qzeros": _pack(zeros, grid.bits).T.contiguous(),
            "scales": grid.scale.T.contiguous(),
            "g_idx": _groups(grid.inputs, grid.unit),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        if set(tensors) != set(self.tensors):
            raise ArtifactError(
                f"a GPTQ layer has the tensors {', '.join(self.tensors)}, got {', '.join(tensors)}"
            )
        qweight, qzeros, scales, g_idx = (tensors[name] for name in self.tensors)
        bits = scheme["bits"]
        size = scheme["group_size"]
        if {qweight.dtype, qzeros.dtype, g_idx.dtype} != {torch.int32} or qweight.ndim != 2:
            raise ArtifactError(
                "qweight, qzeros and g_idx must be int32, the first of them a matrix"
            )
        words, rows = qweight.shape
        inputs = words * 32 // bits
        unit = inputs if size == -1 else size
        if not words or words % bits or not rows or rows % 32 or inputs % unit:
            raise ArtifactError(
                f"{tuple(qweight.shape)} words of {bits}-bit codes are no layer with groups of "
                f"{size}"
            )
        groups = inputs // unit
        if scales.shape != (groups, rows) or qzeros.shape != (groups, rows * bits // 32):
            raise ArtifactError(
                f"scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not fit a layer "
                f"of {(rows, inputs)} in groups of {size}"
            )
        if scales.dtype not in (torch.float16, torch.bfloat16) or not _positive(scales):
            raise ArtifactError("scales must be finite and positive, in float16 or bfloat16")
        if not torch.equal(g_idx, _groups(inputs, unit)):
            raise ArtifactError("g_idx must number the groups in the order of the inputs")
        codes = _unpack(qweight, bits).T.contiguous()
        zeros: Tensor | None = _unpack(qzeros.T, bits)
        if scheme["sym"]:
            half = 2 ** (bits - 1)
            if (zeros != half - 1).any():
                raise ArtifactError(
                    f"the zero points of a symmetric layer must all be stored as {half - 1}"
                )
            codes = codes - half
            zeros = None
        grid = UniformGrid(bits=bits, scale=scales.T.contiguous(), zero_point=zeros, inputs=inputs)
        return LayerState(grid.dequantize(codes), grid=grid)

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        schemes = _schemes(layers)
        bits, size = Counter(schemes.values()).most_common(1)[0][0]
        symmetric = all(grid_of(state, UniformGrid).symmetric for state in layers.states.values())
        entry = {
            "quant_method": "gptq",
            "checkpoint_format": _CHECKPOINT_FORMAT[symmetric],
            "bits": bits,
            "group_size": size,
            "desc_act": False,
            "sym": symmetric,
        }
        names = Names(layout.model)
        dense = [name for name in _linear(layout.model) if name not in schemes]
        dynamic: dict[str, dict[str, int]] = {f"-:{_pattern(name, names)}": {} for name in dense}
        dynamic |= {
            f"+:{_pattern(name, names)}": {"bits": other[0], "group_size": other[1]}
            for name, other in schemes.items()
            if other != (bits, size)
        }
        if dynamic:
            entry["dynamic"] = dynamic
        if dense:
            # transformers does not know `dynamic`, and would put zeros where it expects codes.
            # It compares the ends of names.
            inner = [names.inner(name) if names.is_unique(name) else name for name in schemes]
            entry["modules_in_block_to_quantize"] = [inner]
        return entry

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        entry = config.get("quantization_config")
        if not isinstance(entry, dict) or not _KEYS <= set(entry) <= _KEYS | _OPTIONAL:
            allowed = ", ".join(sorted(_KEYS | _OPTIONAL))
            raise ArtifactError(
                f"quantization_config must have the keys {allowed}, got {str(entry)[:300]}"
            )
        symmetric = entry["sym"]
        if entry["desc_act"] is not False or type(symmetric) is not bool:
            raise ArtifactError(
                "quantization_config must say desc_act=false, and sym=true or false"
            )
        if entry["checkpoint_format"] != _CHECKPOINT_FORMAT[symmetric]:
            raise ArtifactError(
                f"checkpoint_format must be '{_CHECKPOINT_FORMAT[symmetric]}' where "
                f"sym={str(symmetric).lower()}, got {str(entry['checkpoint_format'])[:300]!r}"
            )
        dynamic = entry.get("dynamic", {})
        if not isinstance(dynamic, dict):
            raise ArtifactError("'dynamic' must be a JSON object")
        names = list(names)
        override: Any = {}
        for pattern, change in dynamic.items():
            if not _means_one_of(pattern, names):
                continue
            if pattern.startswith("-:"):
                raise ArtifactError("'dynamic' says that it is not quantized")
            override = change
            break
        if not isinstance(override, dict) or not set(override) <= {"bits", "group_size"}:
            raise ArtifactError("'dynamic' may change its bits and group_size, nothing else")
        scheme = {key: override.get(key, entry[key]) for key in ("bits", "group_size")}
        if any(type(value) is not int for value in scheme.values()):
            raise ArtifactError(
                f"its bits and group_size must be integers, got {str(scheme)[:300]}"
            )
        if scheme["bits"] not in BITS or scheme["group_size"] not in GROUP_SIZES:
            raise ArtifactError(
                f"it must have 2, 3, 4 or 8 bits in groups of {GROUP_SIZES}, got {scheme}"
            )
        return scheme | {"sym": symmetric}


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the codes of each column into one stream of bits.

    Args:
        codes: (n, m) int32, with n a multiple of 32.
        bits: Width of a code.

    Returns:
        (n * bits / 32, m) int32.
    """
    blocks = codes.reshape(-1, 32, codes.shape[1])  # 32 codes fill `bits` words
    words = torch.zeros(len(blocks), bits, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= blocks[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= blocks[:, i] >> (32 - shift)
    return words.reshape(-1, codes.shape[1])


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes that `_pack` packed, as (n, m) int16."""
    blocks = words.reshape(-1, bits, words.shape[1])
    codes = torch.empty(len(blocks), 32, words.shape[1], dtype=torch.int16)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = blocks[:, word] >> shift
        if shift + bits > 32:  # the shift brought copies of the sign down
            code = code & (2 ** (32 - shift) - 1) | blocks[:, word + 1] << (32 - shift)
        codes[:, i] = code & (2**bits - 1)
    return codes.reshape(-1, words.shape[1])


def _groups(inputs: int, unit: int) -> Tensor:
    return torch.arange(inputs, dtype=torch.int32) // unit


def _positive(scales: Tensor) -> bool:
    return bool((scales > 0).all() and torch.isfinite(scales).all())


def _schemes(layers: Layers) -> dict[str, tuple[int, int]]:
    """Return bits and group size of each layer, as few different ones as tell them apart."""
    grids = {name: grid_of(state, UniformGrid) for name, state in layers.states.items()}
    grouped = {(grid.bits, grid.group_size) for grid in grids.values()}
    # A row that is just one group long is stored the same either way.
    return {
        name: (grid.bits, grid.unit if (grid.bits, grid.unit) in grouped else grid.group_size)
        for name, grid in grids.items()
    }


def _linear(model: nn.Module) -> list[str]:
    """Return the layers inside blocks that readers replace by their own."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, hf.Conv1D) and re.search(r"\.\d+\.", f".{name}")
    ]


def _pattern(name: str, names: Names) -> str:
    """Return the regular expression that means this layer alone, under any head if possible.

    Readers match `dynamic` against full names.
    """
    if names.is_unique(name):
        return f"^{suffix_pattern(names.inner(name))}"
    return f"^{re.escape(name)}$"


def _means_one_of(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a key of `dynamic` means a layer of one of these names.

    A pattern is never run: a file could hold one that takes forever, or means something else to a
    reader.

    Args:
        pattern: The key, which nobody has checked.
        names: The names of one layer.

    Raises:
        ArtifactError: If it is not a pattern of one layer as `_pattern` writes them.
    """
    body = pattern[3:]
    suffix = suffix_of(body)
    if suffix is not None and pattern[:3] in ("+:^", "-:^"):
        return any(ends_with(name, suffix) for name in names)
    name = re.sub(r"\\(.)", r"\1", body[:-1])
    if pattern not in (f"+:^{re.escape(name)}$", f"-:^{re.escape(name)}$"):
        raise ArtifactError("'dynamic' must name single layers, as '+:^name$' or '-:^name$'")
    return name in names
