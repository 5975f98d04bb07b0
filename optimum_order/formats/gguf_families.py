"""The architectures of llama.cpp: where its files keep each tensor, and what they say of a model.

llama.cpp computes what its own code for an architecture computes, whatever a config says. So a
config with anything that this code does not do is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_order.errors import missing_extra
from optimum_order.formats.layout import blocks
from optimum_order.models import hf

EXTRA = "gguf"
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of what the frequencies of rotary embeddings are divided by."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh",)
_QKV = ("attn_q", "attn_k", "attn_v")
_ALL = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_DEEPEST_GEMMA = 62
"""Blocks of the one Gemma 3 for which llama.cpp scales queries by the width of the model."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of one architecture.

    Args:
        name: As files name the architecture.
        permuted: Whether the rows of queries and keys are interleaved, pair by pair, as rotary
            embeddings turn them there.
        shifted: Whether its norms are stored as the model multiplies, 1 + weight.
        windowed: Whether its code has attention to a sliding window.
        square: Whether all heads together must be as wide as the model.
        activations: What `hidden_act` may be.
        scalings: What the `rope_type` may be.
        biases: The layers that may have a bias, as files name them.
        why_not: Returns what in a config is not what its code computes, as a sentence.
    """

    name: str
    permuted: bool = False
    shifted: bool = False
    windowed: bool = False
    square: bool = False
    activations: tuple[str, ...] = _SILU
    scalings: tuple[str, ...] = ("default", "linear")
    biases: tuple[str, ...] = ()
    why_not: Callable[[PreTrainedConfig], str | None] = lambda config: None


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        name: In the file.
        shape: Its shape, in the order of torch.
        keys: The stored tensors of a checkpoint that it is; several are experts, in their order.
        heads: If not 0, its rows are interleaved in as many heads.
        shift: What is added to its values.
        dtype: Its dtype if it is stored as values.
    """

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    heads: int
    shift: float
    dtype: torch.dtype

    @property
    def rows_per_key(self) -> int:
        """Rows of each stored tensor."""
        return math.prod(self.shape[:-1]) // len(self.keys)

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the values to store.

        Args:
            tensors: Stored tensors of a checkpoint by name.
        """
        parts = [tensors[key] for key in self.keys]
        whole = parts[0] if len(parts) == 1 else torch.stack(parts)
        if self.heads:
            whole = whole[interleaved(len(whole), self.heads)]
        if self.shift:
            whole = whole.float() + self.shift
        return whole.to(self.dtype).reshape(self.shape)

    def undo(self, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the stored tensors of a checkpoint.

        Args:
            values: As `values` returns them.
            dtype: Of the model.
        """
        if self.shift:
            values = values - self.shift
        values = values.to(dtype)
        if self.heads:
            values = values[interleaved(len(values), self.heads).argsort()]
        parts = [values] if len(self.keys) == 1 else list(values)
        return {key: part.contiguous() for key, part in zip(self.keys, parts, strict=True)}


def interleaved(rows: int, heads: int) -> Tensor:
    """Return which row of a layer comes at each place, (rows,) int64.

    Rotary embeddings turn row i of a head with row i + half in transformers; here they lie side by
    side.

    Args:
        rows: Rows of all heads.
        heads: Number of heads.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _gemma(config: PreTrainedConfig) -> str | None:
    wide = config.num_hidden_layers == _DEEPEST_GEMMA
    width = config.hidden_size / config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != width:
        return f"It scales queries by {config.query_pre_attn_scalar}, llama.cpp by {width}."
    if config.attn_logit_softcapping is not None:
        return "It caps attention scores, which llama.cpp does not do in Gemma 3."
    if getattr(config, "use_bidirectional_attention", False):
        return "Its attention looks ahead, which llama.cpp's does not."
    return None


def _olmo(config: PreTrainedConfig) -> str | None:
    if config.tie_word_embeddings:
        return "Its head is its embeddings, and llama.cpp wants a head of its own in OLMo 2."
    return None


def _experts(config: PreTrainedConfig) -> str | None:
    if not config.norm_topk_prob:
        return "It does not normalize the weights of experts (norm_topk_prob), as llama.cpp does."
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        return "Some of its blocks have no experts, and llama.cpp wants them in all."
    return None


_LLAMA = Family("llama", permuted=True, scalings=("default", "linear", "llama3"), biases=_ALL)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", square=True, biases=_QKV),
    "Qwen3ForCausalLM": Family("qwen3", biases=_QKV),
    "Qwen3MoeForCausalLM": Family("qwen3moe", biases=_QKV, why_not=_experts),
    "Gemma3ForCausalLM": Family(
        "gemma3", shifted=True, windowed=True, activations=_GELU, why_not=_gemma
    ),
    "Phi3ForCausalLM": Family("phi3", square=True, scalings=("default",)),
    "Olmo2ForCausalLM": Family("olmo2", square=True, biases=_QKV, why_not=_olmo),
}


def why_not(model: PreTrainedModel) -> str | None:
    """Return why llama.cpp does not compute what a model computes, or None if it does.

    Args:
        model: The model; it may be empty.

    Returns:
        A sentence.
    """
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        return f"{name} is none of the architectures that are written: {', '.join(FAMILIES)}."
    config = model.config
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in family.activations:
        return f"Its activation is {activation}, llama.cpp's is {family.activations[0]}."
    width = config.num_attention_heads * _head_width(config)
    if family.square and width != config.hidden_size:
        return f"Its heads are {width} wide together, and llama.cpp wants {config.hidden_size}."
    for rope in _ropes(config).values():
        kind = rope.get("rope_type", "default")
        if kind not in family.scalings:
            return (
                f"Its rotary embeddings are scaled ({kind}); these can be written: "
                f"{', '.join(family.scalings)}."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and family.name != "phi3":
            return "Its rotary embeddings turn a part of each head, llama.cpp's all of it."
    return family.why_not(config) or _nameless(model, family)


def _nameless(model: PreTrainedModel, family: Family) -> str | None:
    """Return which tensor has no place in a file, as a sentence, or None."""
    names = _names(model, family)
    for key in hf.to_checkpoint(model, _on_meta(model)):
        name = names(key)
        stem, _, kind = (name or "").rpartition(".")
        if name is None or (kind == "bias" and stem.rpartition(".")[2] not in family.biases):
            return f"llama.cpp has no place for the tensor '{key}' in the architecture."
    return None


def _on_meta(model: PreTrainedModel) -> dict[str, Tensor]:
    tensors = hf.tensors_to_save(model)
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _names(model: PreTrainedModel, family: Family) -> Callable[[str], str | None]:
    """Return what gives the name in the file of a stored tensor, or None if it has none."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        raise missing_extra(EXTRA, error) from error
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[family.name], model.config.num_hidden_layers)

    def name(key: str) -> str | None:
        translated: str | None = names.get_name(
            _EXPERT.sub(".experts.", key), try_suffixes=(".weight", ".bias")
        )
        return translated

    return name


def entries(model: PreTrainedModel) -> list[list[Entry]]:
    """Return the tensors of a file, block by block.

    Args:
        model: A model of which `why_not` says nothing; it may be empty.
    """
    family = FAMILIES[type(model).__name__]
    names = _names(model, family)
    config = model.config
    tensors = _on_meta(model)
    listed = []
    for block in blocks(tensors):
        keys: dict[str, list[str]] = {}
        stored = hf.to_checkpoint(model, {name: tensors[name] for name in block})
        for key in stored:
            keys.setdefault(str(names(key)), []).append(key)
        listed.append(
            [
                _entry(name, sorted(parts, key=_expert_number), stored, family, config)
                for name, parts in keys.items()
            ]
        )
    return listed


def _expert_number(key: str) -> int:
    expert = _EXPERT.search(key)
    return -1 if expert is None else int(expert[1])


def _entry(
    name: str,
    keys: list[str],
    stored: Mapping[str, Tensor],
    family: Family,
    config: PreTrainedConfig,
) -> Entry:
    """Return the entry of some stored tensors."""
    tensor = stored[keys[0]]
    shape = tuple(tensor.shape)
    if _EXPERT.search(keys[0]):
        shape = (len(keys), *shape)
    heads = 0
    if family.permuted and re.search(r"\.attn_[qk]\.", name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    shift = 1.0 if family.shifted and name.endswith("norm.weight") else 0.0
    # llama.cpp adds and multiplies vectors in float32, and routes so
    dtype = torch.float32 if len(shape) == 1 or "ffn_gate_inp" in name else tensor.dtype
    return Entry(name, shape, tuple(keys), heads, shift, dtype)


# What a file says of the model


def fields(model: PreTrainedModel, entries: Iterable[Entry]) -> dict[str, Any]:
    """Return what a file says of a model, without its vocabulary, by key.

    Args:
        model: A model of which `why_not` says nothing; it may be empty.
        entries: The tensors of the file.
    """
    family = FAMILIES[type(model).__name__]
    config = model.config
    head = _head_width(config)
    ropes = _ropes(config)
    rope = ropes.get("full_attention") or next(iter(ropes.values()))
    rows = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    values: dict[str, Any] = {
        "context_length": context(model),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": rows,
    }
    if rope.get("rope_type") == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(rope["factor"])
    if family.windowed:
        values["attention.sliding_window"] = config.sliding_window
        values["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config.layer_types
        ]
        values["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    if getattr(config, "final_logit_softcapping", None):
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        values["expert_count"] = experts
        values["expert_used_count"] = config.num_experts_per_tok
        if family.name == "qwen3moe":
            values["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{family.name}.{key}": value for key, value in values.items()}


def context(model: PreTrainedModel) -> int:
    """Return for how many tokens llama.cpp computes what a model computes.

    Where its code has no sliding window, as many as the window has: within it nothing differs.
    """
    config = model.config
    longest: int = config.max_position_embeddings
    family = FAMILIES[type(model).__name__]
    window = getattr(config, "sliding_window", None)
    if family.windowed or window is None or not getattr(config, "use_sliding_window", True):
        return longest
    return min(longest, int(window))


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """Return what llama.cpp divides the frequencies of rotary embeddings by, (head / 2,) float32.

    Source:
        The scaling of Llama 3.1: wavelengths longer than the context of training are stretched.
    """
    rope = next(iter(_ropes(model.config).values()))
    if rope.get("rope_type") != "llama3":
        return None
    width = _head_width(model.config)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _head_width(config: PreTrainedConfig) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the parameters of rotary embeddings by kind of attention."""
    rope = config.rope_parameters
    if any(isinstance(value, dict) for value in rope.values()):
        return dict(rope)
    return {"full_attention": rope}
