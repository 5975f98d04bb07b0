"""GPTQ checkpoints: `qweight`, `qzeros`, `scales` and `g_idx`, written as GPTQModel and vLLM read them.

A layer W (out, in) is stored transposed. `qweight` (in * bits / 32, out) holds each output's codes as one stream of
bits, lowest first, cut into int32; at 3 bit a code may lie across two of them. `qzeros` (groups, out * bits / 32)
packs the zero points likewise along the outputs. `scales` are (groups, out), and `g_idx` (in) names each input's group.

    W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

Readers compute that in float16 or bfloat16 and cast the scales to it. GPTQModel and vLLM take the dtype of the model
(GPTQModel on a CPU: bfloat16, unless it is told otherwise), but transformers keeps scales and biases in float16 and
casts the product, so a bfloat16 layer is held only where that comes to the same. Up to 4 bit symmetric and 3 bit
asymmetric it does, whatever the codes, if no scale is below 2^-17. `benchmarks/check_gptqmodel.py` compares them all.

Two spellings exist. "gptq" stores the zero points less one, so that zero wraps around, and GPTQModel refuses an
asymmetric model in it that it did not write itself; it is what everybody reads, and symmetric models are stored so.
"gptq_v2" stores the zero points as they are, for asymmetric models. vLLM's Marlin kernels take neither that nor other
widths than 4 and 8 bit, in groups of 32, 64, 128 or whole rows.
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
from optimum_order.formats.base import Format, Layers, Layout, quantized
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel takes; vLLM takes fewer."""

_CHECKPOINT_FORMAT = {True: "gptq", False: "gptq_v2"}
"""By whether the model is symmetric."""
_KEYS = {"quant_method", "checkpoint_format", "bits", "group_size", "desc_act", "sym"}
_OPTIONAL = {"dynamic", "modules_in_block_to_quantize"}


class GPTQ(Format):
    """Packed codes and zero points, scales in the model's dtype, and each input's group."""

    name = "gptq"
    summary = "GPTQ checkpoints, 2-4 and 8 bit; read by GPTQModel and vLLM, and by transformers beside GPTQModel"
    stock = False
    packages = ("accelerate", "gptqmodel", "optimum")
    tensors = ("qweight", "qzeros", "scales", "g_idx")

    def why_not(self, target: Target, state: LayerState) -> str | None:
        grid = state.grid
        if grid is None:
            return None
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
            return f"its scales are {dtype}, which readers would round; compress the model in float16 or bfloat16"
        if any(size % 32 for size in state.weight.shape):
            return f"its shape {tuple(state.weight.shape)} does not divide into words of 32 bits; it must by 32"
        if grid.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES[1:]))
            return f"its groups are of {grid.group_size}, and readers of this format take {sizes} or -1, whole rows"
        half = dataclasses.replace(grid, scale=grid.scale.half()).dequantize(
            grid.quantize(state.weight)
        )
        if not torch.equal(half.to(grid.dtype), state.weight):
            return "its values come out otherwise in float16, where transformers computes them; compress in float16"
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        encoded = quantized(layers)
        if not encoded:
            return "No layer is quantised."
        architecture = type(layout.model).__name__
        if not layout.model.can_generate() or layout.model.config.is_encoder_decoder:
            return (
                f"Readers of this format load causal language models, and {architecture} is none."
            )
        if found := hf.replaced_on_load(layout.model, self.name):
            return f"transformers replaces {found} when it loads this format."
        if layout.converted:
            return f"Checkpoints of {architecture} take fused parameters apart, such as '{min(layout.converted)}'."
        linear = _linear(layout.model)
        for name, (target, _) in encoded.items():
            pieces = layout.pieces(name, target)
            if [(piece.key, piece.whole) for piece in pieces] != [(f"{name}.weight", True)]:
                return f"Layer '{name}' is not stored as a matrix of that name in this model's checkpoints."
            if name not in linear:
                return f"Layer '{name}' is outside the blocks or a subclass of nn.Linear, which readers leave dense."
            bias = layout.tensors.get(f"{name}.bias")
            if bias is not None and not torch.equal(bias.half().to(bias.dtype), bias):
                return f"Layer '{name}' has a bias that float16, in which transformers keeps it, does not hold."
        if len({state.grid.symmetric for _, state in encoded.values()}) > 1:
            return "All layers must be symmetric or none."
        return None

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {
            "bits": state.grid.bits,
            "group_size": state.grid.group_size,
            "sym": state.grid.symmetric,
        }

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        grid = state.grid
        if grid is None:
            return {"weight": state.weight}
        codes = grid.quantize(state.weight).int()
        if grid.symmetric:
            half = 2 ** (grid.bits - 1)
            codes, zeros = codes + half, torch.full_like(grid.scale, half - 1, dtype=torch.int32)
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
        bits, size = scheme["bits"], scheme["group_size"]
        if {qweight.dtype, qzeros.dtype, g_idx.dtype} != {torch.int32} or qweight.ndim != 2:
            raise ArtifactError(
                "qweight, qzeros and g_idx must be int32, the first of them a matrix"
            )
        words, rows = qweight.shape
        inputs = words * 32 // bits
        unit = inputs if size == -1 else size
        if not words or words % bits or not rows or rows % 32 or inputs % unit:
            raise ArtifactError(
                f"{tuple(qweight.shape)} words of {bits}-bit codes are no layer with groups of {size}"
            )
        groups = inputs // unit
        if scales.shape != (groups, rows) or qzeros.shape != (groups, rows * bits // 32):
            raise ArtifactError(
                f"scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not fit a layer of "
                f"{(rows, inputs)} in groups of {size}"
            )
        if scales.dtype not in (torch.float16, torch.bfloat16) or not _positive(scales):
            raise ArtifactError("scales must be finite and positive, in float16 or bfloat16")
        if not torch.equal(g_idx, _groups(inputs, unit)):
            raise ArtifactError("g_idx must number the groups in the order of the inputs")
        codes, zeros = _unpack(qweight, bits).T.contiguous(), _unpack(qzeros.T, bits)
        if scheme["sym"]:
            half = 2 ** (bits - 1)
            if (zeros != half - 1).any():
                raise ArtifactError(
                    f"the zero points of a symmetric layer must all be stored as {half - 1}"
                )
            codes, zeros = codes - half, None
        grid = UniformGrid(bits=bits, scale=scales.T.contiguous(), zero_point=zeros, inputs=inputs)
        return LayerState(grid.dequantize(codes), grid=grid)

    def quantization_config(self, layout: Layout, layers: Layers) -> dict[str, Any] | None:
        schemes = _schemes(layers)
        bits, size = Counter(schemes.values()).most_common(1)[0][0]
        symmetric = all(state.grid.symmetric for _, state in quantized(layers).values())
        entry = {
            "quant_method": "gptq",
            "checkpoint_format": _CHECKPOINT_FORMAT[symmetric],
            "bits": bits,
            "group_size": size,
            "desc_act": False,
            "sym": symmetric,
        }
        linear = _linear(layout.model)
        dense = [name for name in linear if name not in schemes]
        dynamic: dict[str, dict[str, int]] = {f"-:{_pattern(name)}": {} for name in dense}
        dynamic |= {
            f"+:{_pattern(name)}": {"bits": other[0], "group_size": other[1]}
            for name, other in schemes.items()
            if other != (bits, size)
        }
        if dynamic:
            entry["dynamic"] = dynamic
        if (
            dense
        ):  # transformers does not know `dynamic`, and would put zeros where it expects codes
            entry["modules_in_block_to_quantize"] = [list(schemes)]
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
                f"checkpoint_format must be '{_CHECKPOINT_FORMAT[symmetric]}' where sym={str(symmetric).lower()}, "
                f"got {str(entry['checkpoint_format'])[:300]!r}"
            )
        dynamic = entry.get("dynamic", {})
        if not isinstance(dynamic, dict) or not all(_is_literal(pattern) for pattern in dynamic):
            # Never match a pattern: a file could hold one that takes forever, or means something else to a reader.
            raise ArtifactError("'dynamic' must name single layers, as '+:^name$' or '-:^name$'")
        patterns = [_pattern(name) for name in names]
        if any(f"-:{pattern}" in dynamic for pattern in patterns):
            raise ArtifactError("'dynamic' says that it is not quantised")
        override: Any = next(
            (dynamic[f"+:{pattern}"] for pattern in patterns if f"+:{pattern}" in dynamic), {}
        )
        if not isinstance(override, dict) or not set(override) <= {"bits", "group_size"}:
            raise ArtifactError("'dynamic' may change its bits and group_size, nothing else")
        found = {key: override.get(key, entry[key]) for key in ("bits", "group_size")}
        if any(type(value) is not int for value in found.values()):
            raise ArtifactError(f"its bits and group_size must be integers, got {str(found)[:300]}")
        if found["bits"] not in BITS or found["group_size"] not in GROUP_SIZES:
            raise ArtifactError(
                f"it must have 2, 3, 4 or 8 bits in groups of {GROUP_SIZES}, got {found}"
            )
        return found | {"sym": symmetric}


def _pack(codes: Tensor, bits: int) -> Tensor:
    """The codes (n, m) as one stream of bits for each column: (n * bits / 32, m) int32. 32 must divide n."""
    blocks = codes.reshape(-1, 32, codes.shape[1])  # 32 codes fill `bits` words
    words = torch.zeros(len(blocks), bits, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= blocks[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= blocks[:, i] >> (32 - shift)
    return words.reshape(-1, codes.shape[1])


def _unpack(words: Tensor, bits: int) -> Tensor:
    """What `_pack` was given, as int16."""
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
    """Bits and group size of each quantised layer, as few different ones as tell them apart."""
    grids = {name: state.grid for name, (_, state) in quantized(layers).items()}
    given = {(grid.bits, grid.group_size) for grid in grids.values()}
    # A row that is just one group long is stored the same either way.
    return {
        name: (grid.bits, grid.unit if (grid.bits, grid.unit) in given else grid.group_size)
        for name, grid in grids.items()
    }


def _linear(model: nn.Module) -> list[str]:
    """The layers inside blocks that readers replace by their own."""
    found = ((name, type(module)) for name, module in model.named_modules())
    return [
        name
        for name, kind in found
        if kind in (nn.Linear, hf.Conv1D) and re.search(r"\.\d+\.", f".{name}")
    ]


def _pattern(name: str) -> str:
    """The regular expression that means this layer alone, to the readers that match `dynamic` against full names."""
    return f"^{re.escape(name)}$"


def _is_literal(pattern: str) -> bool:
    name = re.sub(r"\\(.)", r"\1", pattern[3:-1])
    return pattern in (f"+:{_pattern(name)}", f"-:{_pattern(name)}")
