"""What the layers of a model do: roles, stated once per family of models.

A transformer is a residual stream and blocks that read it and add to it. Methods that cut channels
or rotate weights have to know who reads and who writes the stream, which norm comes in between,
and what belongs to one attention head, one MLP channel or one expert. `roles` says so for the
families in `_FAMILIES`. It checks the shape of every layer it names, and that every parameter of
the model has a role; about any other model it says nothing.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.errors import ModelError
from optimum_order.models import hf
from optimum_order.models.units import Target, targets_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A layer, or the rows of a fused layer that have one role.

    Args:
        name: The name of the layer in the model, as in `Target`.
        rows: The rows of its matrix (out, in) in the order of the role; None for all of them.
    """

    name: str
    rows: tuple[range, ...] | None = None

    def target(self, model: nn.Module) -> Target:
        """Return the whole layer as a target of a model; a fused layer with all its rows.

        Raises:
            ModelError: If the model has no such layer.
        """
        name, _, index = self.name.rpartition(".")
        if index.isdigit():
            name, _, attribute = name.rpartition(".")
            module = _module(model, name)
            transposed = hf.experts_transposed(module)
            if transposed is not None:
                return Target(self.name, "expert", module, attribute, transposed, int(index))
        module = _module(model, self.name)
        targets = targets_of(self.name, module)
        if len(targets) == 1:
            return targets[0]
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not targets:
            return Target(self.name, "router", module)
        raise ModelError(f"'{self.name}' is not a layer with one matrix")

    def index(self, model: nn.Module) -> Tensor:
        """Return the indices of the rows in the matrix and in the bias, (out,) int64."""
        if self.rows is None:
            return torch.arange(self.target(model).view.shape[0])
        return torch.cat([torch.arange(rows.start, rows.stop) for rows in self.rows])

    def selected(self, indices: Tensor) -> Tensor:
        """Return the rows of the matrix that some rows of the role are, (k,) int64.

        Args:
            indices: (k,) int64, rows counted in the role.
        """
        if self.rows is None:
            return indices
        every = torch.cat([torch.arange(rows.start, rows.stop) for rows in self.rows])
        return every.to(indices.device)[indices]

    def bias(self, model: nn.Module) -> nn.Parameter | None:
        """Return the bias of the whole layer, or None."""
        bias = getattr(self.target(model).module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None


@dataclass(frozen=True)
class Norm:
    """A normalization with a learned gain.

    Args:
        name: The name of the module in the model. Its gain is `offset + weight`.
        centered: Whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        offset: 1 for the norms of Gemma, whose weight is zero where the gain is one; else 0.
        size: The number of channels that are normalized together.
    """

    name: str
    centered: bool
    offset: int
    size: int


@dataclass(frozen=True)
class Norms:
    """The norms around one part of a block.

    Args:
        before: Between the residual stream and the readers.
        after: Between the writer and the stream: what it normalizes is added to the stream.
        stream: On the stream itself, after the addition.
    """

    before: Norm | None = None
    after: Norm | None = None
    stream: Norm | None = None


@dataclass(frozen=True)
class Attention:
    """An attention layer. Head `h` reads the keys and values of head `h * kv_heads // heads`.

    Args:
        q: Reads the residual stream; (heads * head_dim, hidden), a head's rows side by side.
        k: Reads the residual stream; (kv_heads * head_dim, hidden).
        v: As k.
        o: Writes to the stream; (hidden, heads * head_dim), a head's columns side by side.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Channels of a head.
        norms: Around it.
        q_norm: On the queries: of each head where its size is `head_dim`, else of all heads
            together.
        k_norm: On the keys, likewise.
    """

    q: Layer
    k: Layer
    v: Layer
    o: Layer
    heads: int
    kv_heads: int
    head_dim: int
    norms: Norms
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def readers(self) -> tuple[Layer, ...]:
        """The layers that read the residual stream."""
        return self.q, self.k, self.v

    @property
    def writers(self) -> tuple[Layer, ...]:
        """The layer whose output is added to the stream, through `norms.after` if there is one."""
        return (self.o,)


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    Args:
        up: Reads the residual stream; (width, hidden). BERT and ViT call it fc1 or intermediate.
        down: Writes to the stream; (hidden, width).
        gate: Reads the residual stream; (width, hidden).
        width: Number of channels between the layers.
        norms: Around it.
    """

    up: Layer
    down: Layer
    gate: Layer | None
    width: int
    norms: Norms

    @property
    def readers(self) -> tuple[Layer, ...]:
        """The layers that read the residual stream."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def writers(self) -> tuple[Layer, ...]:
        """The layer whose output is added to the stream, through `norms.after` if there is one."""
        return (self.down,)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a router gives each token to some of them.

    Args:
        router: Reads the residual stream; (experts, hidden).
        experts: One MLP for each row of the router.
        norms: Around the mixture; those of each expert are the same.
    """

    router: Layer
    experts: tuple[Mlp, ...]
    norms: Norms

    @property
    def readers(self) -> tuple[Layer, ...]:
        """The layers that read the residual stream: the router first."""
        return self.router, *(layer for expert in self.experts for layer in expert.readers)

    @property
    def writers(self) -> tuple[Layer, ...]:
        """The layers whose output is added to the stream, through `norms.after` if there is one."""
        return tuple(expert.down for expert in self.experts)


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Args:
        name: The name of the module in the model.
        attention: The attention layer.
        mlp: The feed-forward layer.
        parallel: Whether the MLP reads the stream as it was before the attention layer wrote to it.
    """

    name: str
    attention: Attention
    mlp: Mlp | Experts
    parallel: bool = False

    @property
    def dense(self) -> Mlp | None:
        """The feed-forward layer, if it is no mixture."""
        return self.mlp if isinstance(self.mlp, Mlp) else None

    @property
    def mixture(self) -> Experts | None:
        """The feed-forward layer, if it is a mixture of experts."""
        return self.mlp if isinstance(self.mlp, Experts) else None


@dataclass(frozen=True)
class Embedding:
    """A parameter that the residual stream begins with.

    Args:
        parameter: The name of the parameter in the model.
        axis: The dimension that runs along the channels of the stream.
    """

    parameter: str
    axis: int


@dataclass(frozen=True)
class Fields:
    """The config fields that hold the sizes of a model.

    None where the config has no such field: that size follows from the others, or does not exist.

    Args:
        hidden: Channels of the residual stream.
        intermediate: Channels of an MLP that is not an expert.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        blocks: Number of blocks.
        experts: Number of experts.
        expert_intermediate: Channels of an expert.
        per_block: Fields that hold a list with one entry for each block.
    """

    hidden: str = "hidden_size"
    intermediate: str | None = "intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    blocks: str = "num_hidden_layers"
    experts: str | None = None
    expert_intermediate: str | None = None
    per_block: tuple[str, ...] = ()


@dataclass(frozen=True)
class Roles:
    """What every parameter of a model does.

    Args:
        family: The `model_type` of the config.
        hidden: Channels of the residual stream.
        fields: The config fields that hold the sizes.
        embeddings: What the stream begins with: the sum of these.
        embedding_norm: A norm on the stream before the first block.
        blocks: The blocks, first to last.
        final_norm: A norm on the stream after the last block.
        heads: The layers that read the stream at its end, through `final_norm` where there is one.
        tied: The names of parameters that are the same object as one of the embeddings.
    """

    family: str
    hidden: int
    fields: Fields
    embeddings: tuple[Embedding | Layer, ...]
    embedding_norm: Norm | None
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    heads: tuple[Layer, ...]
    tied: tuple[str, ...]

    @property
    def parts(self) -> tuple[Attention | Mlp | Experts, ...]:
        """The attention layers and MLPs of all blocks, first to last."""
        return tuple(part for block in self.blocks for part in (block.attention, block.mlp))

    @property
    def readers(self) -> tuple[Layer, ...]:
        """Every layer that reads the residual stream, the heads last."""
        return (*(layer for part in self.parts for layer in part.readers), *self.heads)

    @property
    def writers(self) -> tuple[Embedding | Layer, ...]:
        """Every layer and embedding that adds to the residual stream, the embeddings first."""
        return (*self.embeddings, *(layer for part in self.parts for layer in part.writers))

    @property
    def stream_norms(self) -> tuple[Norm, ...]:
        """Every norm over the channels of the stream, in the order in which they run."""
        around = (part.norms for part in self.parts)
        norms = [norm for n in around for norm in (n.before, n.after, n.stream)]
        return tuple(norm for norm in (self.embedding_norm, *norms, self.final_norm) if norm)


def roles(model: PreTrainedModel) -> Roles | None:
    """Return the roles of the layers of a model, or None if they are unknown.

    Args:
        model: The model, on any device; only names and shapes are looked at.
    """
    try:
        return require_roles(model)
    except ModelError as error:
        logger.info("%s", error)
        return None


def require_roles(model: PreTrainedModel) -> Roles:
    """Return the roles of the layers of a model.

    Args:
        model: The model, on any device; only names and shapes are looked at.

    Raises:
        ModelError: If the roles are unknown. The message says why.
    """
    family = _FAMILIES.get(model.config.model_type)
    try:
        if family is None:
            raise ModelError(
                f"its model type is '{model.config.model_type}', and the families described here "
                f"are {', '.join(sorted(_FAMILIES))}"
            )
        return _Reader(model, family).roles()
    except ModelError as error:
        raise ModelError(f"Roles unknown for {type(model).__name__}: {error}.") from error


# The families


@dataclass(frozen=True)
class _Family:
    """Where the roles are in one family of models. Names of modules are those inside a block.

    Args:
        attention: The layers q, k, v and o. The same name three times is a fused layer.
        mlp: The layers gate, up and down, or up and down. The same name twice is a fused layer.
        blocks: The list of blocks in the base model.
        embeddings: The parameters and layers of the base model that the stream begins with.
        embedding_norm: In the base model.
        final_norm: In the base model.
        heads: Modules of the whole model that read the stream at its end, where they exist.
        before: The norms before attention and MLP.
        after: The norms between their outputs and the stream.
        stream: The norms on the stream after each.
        qk_norm: The norms on queries and keys.
        centered: Whether its norms are LayerNorms.
        offset: See `Norm`.
        experts: The router, and the parameters gate, up and down of the experts.
        interleaved: Whether a fused layer holds q, k, v head by head, not one after the other.
        parallel: The config field that says whether attention and MLP run side by side.
        pooled: Modules that read what another head has made of the stream.
        requires: What config fields must say for the rest to be true.
        fields: See `Fields`.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    blocks: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens.weight",)
    embedding_norm: str | None = None
    final_norm: str | None = "norm"
    heads: tuple[str, ...] = ("lm_head", "score", "classifier", "qa_outputs")
    before: tuple[str, str] | None = None
    after: tuple[str, str] | None = None
    stream: tuple[str, str] | None = None
    qk_norm: tuple[str, str] | None = None
    centered: bool = False
    offset: int = 0
    experts: tuple[str, ...] = ()
    interleaved: bool = False
    parallel: str | None = None
    pooled: tuple[str, ...] = ()
    requires: tuple[tuple[str, Any], ...] = ()
    fields: Fields = field(default_factory=Fields)


_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LISTED = Fields(per_block=("layer_types",))
_LLAMA = _Family(
    attention=_PROJECTIONS,
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    before=("input_layernorm", "post_attention_layernorm"),
)
_LLAMA_LISTED = replace(_LLAMA, fields=_LISTED)
_UNGATED = replace(_LLAMA, mlp=("mlp.up_proj", "mlp.down_proj"))
_QWEN3 = replace(_LLAMA_LISTED, qk_norm=("self_attn.q_norm", "self_attn.k_norm"))
_OLMO2 = replace(
    _LLAMA,
    before=None,
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
)
_FUSED_MLP = (*["mlp.gate_up_proj"] * 2, "mlp.down_proj")
_GEMMA2 = replace(
    _LLAMA,
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
    offset=1,
    fields=_LISTED,
)
_VIT = _Family(
    attention=(
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
    ),
    mlp=("mlp.fc1", "mlp.fc2"),
    embeddings=(
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection",
    ),
    final_norm="layernorm",
    heads=("pooler.dense", "classifier"),
    before=("layernorm_before", "layernorm_after"),
    centered=True,
    fields=Fields(kv_heads=None),
)
_FUSED_EXPERTS = ("mlp.gate", *["mlp.experts.gate_up_proj"] * 2, "mlp.experts.down_proj")

_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA_LISTED,
    "ministral3": _LLAMA,
    "granite": _LLAMA,
    "seed_oss": _LLAMA,
    "ernie4_5": _LLAMA,
    "cwm": _LLAMA_LISTED,
    "smollm3": replace(_LLAMA, fields=Fields(per_block=("layer_types", "no_rope_layers"))),
    "arcee": _UNGATED,
    "starcoder2": replace(_LLAMA, mlp=("mlp.c_fc", "mlp.c_proj"), centered=True),
    "jais2": replace(_UNGATED, centered=True),
    "stablelm": replace(
        _LLAMA,
        centered=True,
        requires=(("use_parallel_residual", False),),
        fields=Fields(head_dim=None),
    ),
    "gemma": replace(_LLAMA, offset=1),
    "vaultgemma": replace(_GEMMA2, after=None),
    "qwen2": _LLAMA_LISTED,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, qk_norm=("self_attn.q_norm", "self_attn.k_norm")),
    "phi3": replace(
        _LLAMA,
        attention=(*["self_attn.qkv_proj"] * 3, "self_attn.o_proj"),
        mlp=_FUSED_MLP,
    ),
    "glm": replace(_LLAMA, mlp=_FUSED_MLP),
    "glm4": replace(
        _LLAMA, mlp=_FUSED_MLP, after=("post_self_attn_layernorm", "post_mlp_layernorm")
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, fields=_LISTED),
    "exaone4": replace(_OLMO2, fields=_LISTED),
    "gpt2": _Family(
        attention=(*["attn.c_attn"] * 3, "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        blocks="h",
        embeddings=("wte.weight", "wpe.weight"),
        final_norm="ln_f",
        before=("ln_1", "ln_2"),
        centered=True,
        fields=Fields("n_embd", "n_inner", "n_head", None, None, "n_layer"),
    ),
    "gpt_neox": _Family(
        attention=(*["attention.query_key_value"] * 3, "attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embeddings=("embed_in.weight",),
        final_norm="final_layer_norm",
        before=("input_layernorm", "post_attention_layernorm"),
        centered=True,
        interleaved=True,
        parallel="use_parallel_residual",
        fields=Fields(kv_heads=None, head_dim=None),
    ),
    "opt": _Family(
        attention=(*_PROJECTIONS[:3], "self_attn.out_proj"),
        mlp=("fc1", "fc2"),
        blocks="decoder.layers",
        embeddings=("decoder.embed_tokens.weight", "decoder.embed_positions.weight"),
        final_norm="decoder.final_layer_norm",
        before=("self_attn_layer_norm", "final_layer_norm"),
        centered=True,
        requires=(("do_layer_norm_before", True),),
        fields=Fields(intermediate="ffn_dim", kv_heads=None, head_dim=None),
    ),
    "bert": _Family(
        attention=(
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
        mlp=("intermediate.dense", "output.dense"),
        blocks="encoder.layer",
        embeddings=(
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
        ),
        embedding_norm="embeddings.LayerNorm",
        final_norm=None,
        heads=("pooler.dense", "cls.predictions.transform.dense", "classifier", "qa_outputs"),
        stream=("attention.output.LayerNorm", "output.LayerNorm"),
        centered=True,
        pooled=("cls.",),
        fields=Fields(kv_heads=None, head_dim=None),
    ),
    "vit": _VIT,
    "deit": replace(
        _VIT,
        embeddings=(*_VIT.embeddings, "embeddings.distillation_token"),
        heads=("pooler.dense", "cls_classifier", "distillation_classifier", "classifier"),
    ),
    "mixtral": replace(
        _LLAMA,
        experts=_FUSED_EXPERTS,
        fields=Fields(
            intermediate=None, experts="num_local_experts", expert_intermediate="intermediate_size"
        ),
    ),
    "qwen3_moe": replace(
        _QWEN3,
        experts=_FUSED_EXPERTS,
        fields=Fields(experts="num_experts", expert_intermediate="moe_intermediate_size"),
    ),
}


class _Reader:
    """Reads the roles of one model, and notes which parameters have one.

    Every method raises ModelError if the model is not what its family says.

    Args:
        model: The model.
        family: Its family.
    """

    def __init__(self, model: PreTrainedModel, family: _Family):
        self.model = model
        self.config = model.config
        self.family = family
        self.hidden = self.size(family.fields.hidden)
        self.base = next(name for name, m in model.named_modules() if m is model.base_model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.seen: set[str] = set()

    def roles(self) -> Roles:
        family = self.family
        for name, value in family.requires:
            if getattr(self.config, name) != value:
                raise ModelError(f"its config says {name}={getattr(self.config, name)}")
        blocks = self.inside(family.blocks)
        count = len(list(_module(self.model, blocks).children()))
        if count != self.size(family.fields.blocks):
            raise ModelError(f"it has {count} blocks, and its config says otherwise")
        first, last = (
            self.norm(self.inside(name)) if name else None
            for name in (family.embedding_norm, family.final_norm)
        )
        result = Roles(
            family=self.config.model_type,
            hidden=self.hidden,
            fields=family.fields,
            embeddings=tuple(self.embedding(self.inside(name)) for name in family.embeddings),
            embedding_norm=first,
            blocks=tuple(self.block(f"{blocks}.{index}") for index in range(count)),
            final_norm=last,
            heads=tuple(self.heads()),
            tied=tuple(self.tied()),
        )
        for name in self.parameters:
            if name not in self.seen:
                raise ModelError(f"nothing is known of its parameter '{name}'")
        return result

    def block(self, name: str) -> Block:
        field = self.family.parallel
        parallel = field is not None and bool(getattr(self.config, field))
        return Block(name, self.attention(name), self.mlp(name), parallel)

    def attention(self, block: str) -> Attention:
        fields = self.family.fields
        heads = self.size(fields.heads)
        kv_heads = self.size(fields.kv_heads) or heads
        head_dim = self.size(fields.head_dim) or self.hidden // heads
        widths = heads * head_dim, kv_heads * head_dim, kv_heads * head_dim
        *inputs, output = (f"{block}.{name}" for name in self.family.attention)
        if inputs[0] != inputs[1]:
            q, k, v = (self.layer(n, w, self.hidden) for n, w in zip(inputs, widths, strict=True))
        else:
            self.layer(inputs[0], sum(widths), self.hidden)
            ends = [sum(widths[:part]) for part in range(4)]
            rows: list[tuple[range, ...]] = [(range(*pair),) for pair in itertools.pairwise(ends)]
            if self.family.interleaved:
                rows = [
                    tuple(range(at, at + head_dim) for at in range(first, ends[3], 3 * head_dim))
                    for first in range(0, 3 * head_dim, head_dim)
                ]
            q, k, v = (Layer(inputs[0], part) for part in rows)
        q_norm = k_norm = None
        if self.family.qk_norm is not None:
            q_norm, k_norm = (
                self.norm(f"{block}.{name}", head_dim, width)
                for name, width in zip(self.family.qk_norm, widths[:2], strict=True)
            )
        o = self.layer(output, self.hidden, widths[0])
        norms = self.norms(block, 0)
        return Attention(q, k, v, o, heads, kv_heads, head_dim, norms, q_norm, k_norm)

    def mlp(self, block: str) -> Mlp | Experts:
        fields = self.family.fields
        norms = self.norms(block, 1)
        router, *names = (f"{block}.{name}" for name in self.family.experts or ("",))
        if f"{router}.weight" not in self.parameters:
            names = [f"{block}.{name}" for name in self.family.mlp]
            return self.one_mlp(names, self.size(fields.intermediate), norms)
        count = self.size(fields.experts)
        width = self.size(fields.expert_intermediate)
        if any(len(self.parameters.get(name, ())) != count for name in names):
            raise ModelError(f"'{names[0]}' does not hold {count} experts")
        experts = (
            self.one_mlp([f"{name}.{expert}" for name in names], width, norms)
            for expert in range(count)
        )
        return Experts(self.layer(router, count, self.hidden), tuple(experts), norms)

    def one_mlp(self, names: Sequence[str], width: int, norms: Norms) -> Mlp:
        *gates, up, down = names
        width = width or Layer(up).target(self.model).view.shape[0]
        if up in gates:
            self.layer(up, 2 * width, self.hidden)
            gate: Layer | None = Layer(up, (range(width),))
            other = Layer(up, (range(width, 2 * width),))
        else:
            gate = self.layer(gates[0], width, self.hidden) if gates else None
            other = self.layer(up, width, self.hidden)
        return Mlp(other, self.layer(down, self.hidden, width), gate, width, norms)

    def heads(self) -> Iterator[Layer]:
        """Yield the layers that read the stream at its end; note what reads their outputs."""
        pooler = self.inside("pooler.dense")
        for head in self.family.heads:
            name = pooler if head == "pooler.dense" else head
            if f"{name}.weight" not in self.parameters:
                continue
            if head == "classifier" and f"{pooler}.weight" in self.parameters:
                self.seen |= {"classifier.weight", "classifier.bias"}
            else:
                yield self.layer(name, 0, self.hidden)
        self.seen.update(name for name in self.parameters if name.startswith(self.family.pooled))

    def tied(self) -> Iterator[str]:
        names = [self.inside(name) for name in self.family.embeddings]
        embeddings = {id(self.parameters.get(name)) for name in names}
        for name, parameter in self.parameters.items():
            if id(parameter) in embeddings and name not in names:
                yield name

    def embedding(self, name: str) -> Embedding | Layer:
        parameter = self.parameters.get(name)
        if parameter is None:
            return self.layer(name, self.hidden, 0)
        if parameter.shape[-1] != self.hidden:
            raise ModelError(f"'{name}' is {tuple(parameter.shape)}")
        self.seen.add(name)
        return Embedding(name, parameter.ndim - 1)

    def layer(self, name: str, rows: int, inputs: int) -> Layer:
        """Return a layer, its shape checked; 0 allows any number."""
        target = Layer(name).target(self.model)
        shape = tuple(target.view.shape)
        if rows not in (0, shape[0]) or inputs not in (0, shape[1]):
            raise ModelError(f"'{name}' is {shape}, not ({rows or 'any'}, {inputs or 'any'})")
        self.seen |= {target.parameter_name, f"{name}.bias"}
        return Layer(name)

    def norms(self, block: str, part: int) -> Norms:
        pairs = (self.family.before, self.family.after, self.family.stream)
        return Norms(*(pair and self.norm(f"{block}.{pair[part]}") for pair in pairs))

    def norm(self, name: str, *sizes: int) -> Norm:
        """Return a norm over as many channels as one of the sizes, or as the stream by default."""
        weight = self.parameters.get(f"{name}.weight")
        if weight is None or tuple(weight.shape) not in [(n,) for n in sizes or (self.hidden,)]:
            raise ModelError(f"'{name}' is not a norm over {sizes or self.hidden} channels")
        self.seen |= {f"{name}.weight", f"{name}.bias"}
        return Norm(name, self.family.centered, self.family.offset, len(weight))

    def inside(self, name: str) -> str:
        """Return the name in the whole model of something in the base model."""
        return f"{self.base}.{name}" if self.base else name

    def size(self, field: str | None) -> int:
        """Return what a config field says, or 0 where it says nothing."""
        return (field and getattr(self.config, field, None)) or 0


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"it has no module '{name}'") from error
