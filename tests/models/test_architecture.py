"""Roles are proven by what they allow: rewrites of a model that change nothing.

A rewrite knows no name of a module. It uses what `roles` says of a tiny model of random weights,
and the logits must stay equal; a layer that is left out, or has the wrong rows or norm, changes
them.
"""

import math

import pytest
import torch
import transformers
from torch import nn

from optimum_order.errors import ModelError
from optimum_order.models import hf
from optimum_order.models.architecture import Embedding, Experts, Mlp, require_roles, roles
from optimum_order.models.units import Target

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
ROUTED = {"num_experts_per_tok": 2}
IMAGES = SIZES | {"image_size": 16, "patch_size": 4, "num_labels": 10}
LISTED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

FAMILIES = {
    "arcee": GROUPED,
    "bert": TEXT,
    "cwm": GROUPED | LISTED,
    "deit": IMAGES | {"architectures": ["DeiTForImageClassification"]},
    "ernie4_5": GROUPED,
    "exaone4": GROUPED | LISTED,
    "gemma": GROUPED,
    "gemma2": GROUPED | LISTED,
    "gemma3_text": GROUPED | LISTED,
    "glm": GROUPED,
    "glm4": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 64}
    | {"n_positions": 64, "tie_word_embeddings": False},
    "gpt_neox": TEXT | {"tie_word_embeddings": False},
    "granite": GROUPED,
    "jais2": GROUPED,
    "llama": GROUPED | {"attention_bias": True, "mlp_bias": True},
    "ministral": GROUPED | LISTED,
    "ministral3": GROUPED,
    "mistral": GROUPED,
    "mixtral": GROUPED | ROUTED | {"num_local_experts": 4},
    "olmo2": GROUPED,
    "olmo3": GROUPED | LISTED,
    "opt": TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "qwen3_moe": GROUPED
    | ROUTED
    | {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "seed_oss": GROUPED,
    "smollm3": GROUPED | LISTED | {"no_rope_layers": [1, 0]},
    "stablelm": GROUPED | {"head_dim": None},
    "starcoder2": GROUPED,
    "vaultgemma": GROUPED | LISTED,
    "vit": IMAGES,
}
QK_NORMS = ["exaone4", "gemma3_text", "olmo2", "olmo3", "qwen3", "qwen3_moe"]
AUTO = {
    "bert": transformers.AutoModel,
    "deit": transformers.AutoModelForImageClassification,
    "vit": transformers.AutoModelForImageClassification,
}


def build(family, auto=None, **changes):
    """Return a model of random weights, each so large that no mistake hides in a near-zero."""
    config = transformers.AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    auto = auto or AUTO.get(family, transformers.AutoModelForCausalLM)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


def inputs(model):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(1, 64, (2, 12), generator=generator)}


@torch.no_grad()
def run(model):
    """Return what the model computes, and its residual stream around each block."""
    with hf.eager_experts(model):
        output = model(**inputs(model), output_hidden_states=True)
    assert output[0].std() > 0.1
    return output[0], output.hidden_states


def same(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def permutation(count, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def every(model, names):
    """Yield (roles, part) for the parts of a model, to be changed one by one."""
    for part in require_roles(model).parts:
        if isinstance(part, names):
            yield part


def mlps(model):
    for part in every(model, (Mlp, Experts)):
        yield from part.experts if isinstance(part, Experts) else [part]


def attentions(model):
    return (block.attention for block in require_roles(model).blocks)


class Rewrite:
    """Changes weights of a model by roles, each parameter once even if it has two names."""

    def __init__(self, model):
        self.model = model

    def rows(self, layer, change):
        """Replace the rows of a layer (out, in), and its bias as a column (out, 1)."""
        index = layer.index(self.model)
        view = layer.target(self.model).view
        view[index] = change(view[index])
        bias = layer.bias(self.model)
        if bias is not None:
            bias.data[index] = change(bias.data[index, None])[:, 0]

    def columns(self, layer, change):
        """Replace the columns of the rows of a layer, (out, in)."""
        index = layer.index(self.model)
        view = layer.target(self.model).view
        view[index] = change(view[index].T).T

    def gain(self, norm, change, bias=None):
        """Replace the gain of a norm (size,), and its bias."""
        module = self.model.get_submodule(norm.name)
        module.weight.data = change(norm.offset + module.weight.data) - norm.offset
        if getattr(module, "bias", None) is not None:
            module.bias.data = (bias or change)(module.bias.data)

    def writers(self, change):
        """Change everything that the residual stream is the sum of: rows (channels, ...)."""
        model_roles = require_roles(self.model)
        for embedding in model_roles.embeddings:
            if isinstance(embedding, Embedding):
                parameter = self.model.get_parameter(embedding.parameter).data
                parameter.copy_(change(parameter.movedim(embedding.axis, 0)).movedim(0, -1))
            else:
                self.rows(embedding, change)
        for part in model_roles.parts:
            if part.norms.after is not None:
                self.gain(part.norms.after, change)
            else:
                for layer in part.writers:
                    self.rows(layer, change)
            if part.norms.stream is not None:
                self.gain(part.norms.stream, change)
        if model_roles.embedding_norm is not None:
            self.gain(model_roles.embedding_norm, change)


def each_family(check):
    """Make a test of a check: on a model of each family, each of which a failure names."""

    @torch.no_grad()
    def test():
        for family in FAMILIES:
            try:
                check(build(family))
            except AssertionError as error:
                raise AssertionError(f"{family}: {error}") from error

    test.__doc__ = check.__doc__
    return test


@each_family
def test_channels_of_the_stream_can_be_permuted(model):
    """All who read or write the stream, and all norms on it, are named."""
    logits, _ = run(model)
    model_roles = require_roles(model)
    rewrite = Rewrite(model)
    order = permutation(32)
    for embedding in model_roles.embeddings:
        if isinstance(embedding, Embedding):
            parameter = model.get_parameter(embedding.parameter).data
            parameter.copy_(parameter.index_select(embedding.axis, order))
    for layer in model_roles.writers:
        if not isinstance(layer, Embedding):
            rewrite.rows(layer, lambda rows: rows[order])
    for norm in model_roles.stream_norms:
        assert norm.size == 32
        rewrite.gain(norm, lambda gain: gain[order])
    for layer in model_roles.readers:
        rewrite.columns(layer, lambda columns: columns[order])
    if not model_roles.heads or model.config.model_type == "bert":
        logits = logits[..., order]  # what comes out is the stream
    assert same(run(model)[0], logits)


@each_family
def test_the_stream_is_the_sum_of_its_writers(model):
    """Scaled writers scale the stream; readers without a norm before them are told."""
    for module in model.modules():  # which would be noticed beside a small stream
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-12)
    logits, stream = run(model)
    model_roles = require_roles(model)
    rewrite = Rewrite(model)
    rewrite.writers(lambda rows: rows * 4)
    for part in model_roles.parts:
        if part.norms.before is None:
            for layer in part.readers:
                rewrite.columns(layer, lambda columns: columns / 4)
    output, scaled = run(model)
    assert len(stream) == len(model_roles.blocks) + 1
    for before, after in zip(stream[:-1], scaled[:-1], strict=True):
        assert same(before * 4, after)
    assert same(output, logits if model_roles.final_norm else logits * 4)


@each_family
def test_the_gain_of_a_norm_can_be_folded_into_its_readers(model):
    """Which norm each reader reads through, and what its gain is."""
    logits, _ = run(model)
    model_roles = require_roles(model)
    rewrite = Rewrite(model)
    pairs = [(part.norms.before, part.readers) for part in model_roles.parts]
    pairs.append((model_roles.final_norm, model_roles.heads))
    folded = 0
    for norm, readers in pairs:
        if norm is None:
            continue
        module = model.get_submodule(norm.name)
        assert norm.centered == isinstance(module, nn.LayerNorm)
        gain = norm.offset + module.weight.data
        for layer in readers:
            rewrite.columns(layer, lambda columns, gain=gain: columns * gain[:, None])
        rewrite.gain(norm, torch.ones_like, lambda bias, gain=gain: bias / gain)
        folded += 1
    assert folded == {"bert": 0, "olmo2": 1, "olmo3": 1, "exaone4": 1}.get(model_roles.family, 5)
    assert same(run(model)[0], logits)


@each_family
def test_norms_on_the_stream_run_in_the_order_in_which_they_are_named(model):
    """Before attention, after it, before the MLP, and so on to the final one."""
    names = [norm.name for norm in require_roles(model).stream_norms]
    order = []
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    run(model)
    assert order == names and len(set(names)) == len(names)


@each_family
def test_norms_on_queries_and_keys_read_queries_and_keys(model):
    model_roles = require_roles(model)
    told = model_roles.family in QK_NORMS
    for part in attentions(model):
        for layer, norm in ((part.q, part.q_norm), (part.k, part.k_norm)):
            assert (norm is not None) == told
            if norm is not None:
                seen = []
                layer.target(model).module.register_forward_hook(
                    lambda module, args, output, seen=seen: seen.append(output)
                )
                model.get_submodule(norm.name).register_forward_pre_hook(
                    lambda module, args, seen=seen: seen.append(args[0])
                )
                run(model)
                projected, normalized = (tensor.flatten().sort().values for tensor in seen)
                assert torch.equal(projected, normalized)


@each_family
def test_channels_of_an_mlp_can_be_permuted(model):
    logits, _ = run(model)
    rewrite = Rewrite(model)
    for number, mlp in enumerate(mlps(model)):
        order = permutation(mlp.width, number)
        for layer in mlp.readers:
            rewrite.rows(layer, lambda rows, order=order: rows[order])
        rewrite.columns(mlp.down, lambda columns, order=order: columns[order])
    assert same(run(model)[0], logits)


@each_family
def test_an_mlp_is_linear_in_up_and_not_in_gate(model):
    logits, _ = run(model)
    for of_gate in (False, True):
        for mlp in mlps(model):
            rewrite = Rewrite(model)
            if mlp.gate is not None:
                rewrite.rows(mlp.gate if of_gate else mlp.up, lambda rows: rows * 4)
                rewrite.columns(mlp.down, lambda columns: columns / 4)
        gated = any(mlp.gate is not None for mlp in mlps(model))
        assert same(run(model)[0], logits) == (not of_gate or not gated)


@each_family
def test_groups_of_heads_can_be_permuted(model):
    """A key and value head moves with all query heads that read it, and with their norms."""
    logits, _ = run(model)
    rewrite = Rewrite(model)
    for part in attentions(model):
        assert part.kv_heads > 1

        def moved(rows, groups=part.kv_heads):
            return rows.unflatten(0, (groups, -1)).roll(1, 0).flatten(0, 1)

        for layer in part.readers:
            rewrite.rows(layer, moved)
        rewrite.columns(part.o, moved)
        for norm in (part.q_norm, part.k_norm):
            if norm is not None and norm.size != part.head_dim:
                rewrite.gain(norm, moved)
    assert same(run(model)[0], logits)


@each_family
def test_query_heads_of_one_group_can_be_permuted(model):
    logits, _ = run(model)
    rewrite = Rewrite(model)
    for part in attentions(model):
        if part.heads == part.kv_heads:
            continue

        def flipped(rows, part=part):
            shape = (part.kv_heads, part.heads // part.kv_heads, part.head_dim)
            return rows.unflatten(0, shape).flip(1).flatten(0, 2)

        rewrite.rows(part.q, flipped)
        rewrite.columns(part.o, flipped)
        if part.q_norm is not None and part.q_norm.size != part.head_dim:
            rewrite.gain(part.q_norm, flipped)
    assert same(run(model)[0], logits)


@each_family
def test_values_can_be_rotated_within_a_head(model):
    logits, _ = run(model)
    rewrite = Rewrite(model)
    for part in attentions(model):
        generator = torch.Generator().manual_seed(0)
        size = (part.kv_heads, part.head_dim, part.head_dim)
        rotation = torch.linalg.qr(torch.randn(size, generator=generator))[0]

        def rotated(rows, rotation, heads):
            rotation = rotation.repeat_interleave(heads // len(rotation), 0)
            return (rotation @ rows.unflatten(0, (heads, -1))).flatten(0, 1)

        rewrite.rows(part.v, lambda r, p=part, o=rotation: rotated(r, o, p.kv_heads))
        rewrite.columns(part.o, lambda c, p=part, o=rotation: rotated(c, o, p.heads))
    assert same(run(model)[0], logits)


@each_family
def test_a_query_matters_at_its_own_position_and_a_key_at_others(model):
    """The only test that tells queries from keys: one position of one of them is changed."""
    part = require_roles(model).blocks[0].attention
    place = 5

    def attended(layer=None):
        """Return the input of o, (tokens, heads * head_dim), with one row of a layer changed."""

        def change(module, args, output):
            output = output.clone()
            index = layer.index(model)
            output[0, place, index] = output[0, place, index] * -2 + 0.1 * torch.arange(len(index))
            return output

        def keep(module, args):
            attended_inputs.append(args[0])

        attended_inputs = []
        hooks = [part.o.target(model).module.register_forward_pre_hook(keep)]
        if layer is not None:
            hooks.append(layer.target(model).module.register_forward_hook(change))
        run(model)
        for hook in hooks:
            hook.remove()
        return attended_inputs[0][0]

    ordinary = attended()
    changed = {
        role: {
            position
            for position, (one, other) in enumerate(zip(ordinary, attended(layer), strict=True))
            if not torch.allclose(one, other, atol=1e-5)
        }
        for role, layer in (("q", part.q), ("k", part.k), ("v", part.v))
    }
    assert changed["q"] == {place}
    causal = model.config.model_type not in ("bert", "vit", "deit")
    window = getattr(model.config, "sliding_window", None) or math.inf
    reached = {
        position
        for position in range(len(ordinary))
        if not causal or place <= position < place + window
    }
    assert changed["k"] == changed["v"] == reached


@torch.no_grad()
def test_experts_can_be_permuted_with_the_rows_of_their_router():
    for family, count in (("mixtral", 2), ("qwen3_moe", 1)):
        model = build(family)
        logits, _ = run(model)
        rewrite = Rewrite(model)
        mixtures = list(every(model, Experts))
        assert len(mixtures) == count
        for part in mixtures:
            order = permutation(len(part.experts), 1)
            rewrite.rows(part.router, lambda rows, order=order: rows[order])
            for role in ("gate", "up", "down"):
                layers = [getattr(expert, role) for expert in part.experts]
                index = layers[0].index(model)
                views = [layer.target(model).view for layer in layers]
                moved = [views[i][index].clone() for i in order]
                for view, rows in zip(views, moved, strict=True):
                    view[index] = rows
        assert same(run(model)[0], logits)


@torch.no_grad()
def test_parallel_says_whether_the_mlp_sees_what_attention_wrote():
    cases = [("gpt_neox", {}, True), ("gpt_neox", {"use_parallel_residual": False}, False)]
    for family, changes, parallel in [*cases, ("llama", {}, False)]:
        model = build(family, **changes)
        block = require_roles(model).blocks[0]
        assert block.parallel == parallel
        seen = []
        module = block.mlp.up.target(model).module
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        run(model)
        Rewrite(model).rows(block.attention.o, torch.zeros_like)
        run(model)
        hook.remove()
        assert same(*seen) == parallel


@each_family
def test_config_fields_are_those_that_a_model_is_built_from(model):
    """A changed field changes the size that it stands for, and what follows from it."""
    family = model.config.model_type
    fields = require_roles(model).fields

    def sizes(model):
        model_roles = require_roles(model)
        parts = [block.mlp for block in model_roles.blocks]
        dense = {part.width for part in parts if isinstance(part, Mlp)}
        mixtures = [part for part in parts if isinstance(part, Experts)]
        return {
            "hidden": model_roles.hidden,
            "intermediate": dense.pop() if dense else None,
            "heads": model_roles.blocks[0].attention.heads,
            "kv_heads": model_roles.blocks[0].attention.kv_heads,
            "head_dim": model_roles.blocks[0].attention.head_dim,
            "blocks": len(model_roles.blocks),
            "experts": len(mixtures[0].experts) if mixtures else None,
            "expert_intermediate": mixtures[0].experts[0].width if mixtures else None,
        }

    before = sizes(model)
    follows = {"hidden": {"head_dim"}, "heads": {"kv_heads", "head_dim"}}
    for size, field in vars(fields).items():
        if size == "per_block":
            for name in field:
                assert len(getattr(model.config, name)) == before["blocks"]
            continue
        if field is None:
            assert before[size] is None or size in ("kv_heads", "head_dim")
            continue
        value = before[size] * 2
        changes = {field: value}
        if size == "hidden" and family == "opt":
            changes["word_embed_proj_dim"] = value
        if size == "blocks" and fields.per_block:
            changes |= {name: list(getattr(model.config, name)) * 2 for name in fields.per_block}
        after = sizes(build(family, **changes))
        assert after[size] == value, field
        moved = {name for name in before if after[name] != before[name]} - {size}
        assert moved <= follows.get(size, set()), field
        assert after["heads"] * after["head_dim"] == after["hidden"] or fields.head_dim


@each_family
def test_roles_need_no_values(model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert roles(empty) == roles(model) is not None


HEADS = {
    "LlamaModel": (),
    "LlamaForCausalLM": ("lm_head",),
    "LlamaForSequenceClassification": ("score",),
    "LlamaForTokenClassification": ("score",),
    "LlamaForQuestionAnswering": ("qa_outputs",),
    "GPT2ForTokenClassification": ("classifier",),
    "GPTNeoXForQuestionAnswering": ("qa_outputs",),
    "BertModel": ("pooler.dense",),
    "BertForMaskedLM": ("cls.predictions.transform.dense",),
    "BertForPreTraining": ("bert.pooler.dense", "cls.predictions.transform.dense"),
    "BertForNextSentencePrediction": ("bert.pooler.dense",),
    "BertForSequenceClassification": ("bert.pooler.dense",),
    "BertForTokenClassification": ("classifier",),
    "BertForQuestionAnswering": ("qa_outputs",),
    "ViTModel": ("pooler.dense",),
    "ViTForImageClassification": ("classifier",),
    "DeiTForImageClassification": ("classifier",),
    "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
}


def test_heads_are_what_reads_the_end_of_the_stream():
    """Their inputs are the last hidden state, or one position of it; nothing else outside is."""
    for name, heads in HEADS.items():
        cls = getattr(transformers, name)
        config = cls.config_class(**FAMILIES[cls.config_class.model_type])
        torch.manual_seed(0)
        model = cls(config).eval()
        model_roles = require_roles(model)
        assert tuple(layer.name for layer in model_roles.heads) == heads, name
        seen = {}

        def keep(module, args, output, seen=seen):
            seen[module] = args[0] if args and isinstance(args[0], torch.Tensor) else None

        hooks = [module.register_forward_hook(keep) for module in model.modules()]
        with torch.no_grad():
            base = model.base_model(**inputs(model)).last_hidden_state
            seen.clear()
            model(**inputs(model))
        for hook in hooks:
            hook.remove()
        states = {tuple(row.tolist()) for row in base.reshape(-1, 32)}
        readers = {
            module_name
            for module_name, module in model.named_modules()
            if isinstance(module, (nn.Linear, hf.Conv1D))
            and module_name.count("layer") == 0
            and not module_name.startswith("transformer.h.")
            and seen.get(module) is not None
            and all(tuple(row.tolist()) in states for row in seen[module].reshape(-1, 32))
        }
        assert readers == set(heads), name


def test_tied_weights_are_told():
    tied = require_roles(build("llama", tie_word_embeddings=True))
    assert tied.tied == ("lm_head.weight",)
    assert require_roles(build("llama")).tied == ()
    masked = require_roles(build("bert", transformers.AutoModelForMaskedLM))
    assert masked.tied == ("cls.predictions.decoder.weight",)


class TestUnknown:
    """What is not described is not guessed at."""

    def refused(self, model, reason):
        assert roles(model) is None
        with pytest.raises(ModelError, match=f"Roles unknown for {type(model).__name__}: {reason}"):
            require_roles(model)

    def test_families(self, make_model):
        self.refused(
            make_model("gpt_oss"), "its model type is 'gpt_oss', and the families .* bert,"
        )

    def test_parameters_that_the_family_does_not_have(self):
        model = build("llama")
        model.model.layers[1].mlp.register_parameter("scale", nn.Parameter(torch.ones(1)))
        self.refused(model, "nothing is known of its parameter 'model.layers.1.mlp.scale'")
        cross = build("gpt2", add_cross_attention=True)
        self.refused(cross, "nothing is known of its parameter 'transformer.h.0.crossattention")
        self.refused(
            build("opt", word_embed_proj_dim=16), "'model.decoder.embed_tokens.weight' is .64, 16"
        )
        self.refused(transformers.GPT2DoubleHeadsModel(build("gpt2").config), "nothing is known of")

    def test_shapes_that_the_config_does_not_tell(self):
        model = build("llama")
        model.model.layers[0].mlp.up_proj = nn.Linear(32, 40)
        self.refused(model, r"'model.layers.0.mlp.up_proj' is \(40, 32\), not \(48, 32\)")
        model = build("phi3")
        model.config.num_key_value_heads = 1
        self.refused(model, r"'model.layers.0.self_attn.qkv_proj' is \(128, 32\), not \(96, 32\)")
        model = build("mixtral")
        model.config.num_local_experts = 3
        self.refused(model, "'model.layers.0.mlp.experts.gate_up_proj' does not hold 3 experts")
        model = build("qwen3")
        model.model.layers[0].self_attn.q_norm = nn.RMSNorm(8)
        self.refused(model, "'model.layers.0.self_attn.q_norm' is not a norm over")
        model = build("llama")
        del model.model.layers[1]
        self.refused(model, "it has 1 blocks, and its config says otherwise")

    def test_modules_that_are_missing_or_of_another_kind(self):
        model = build("llama")
        model.model.layers[1].mlp.up_proj = nn.ReLU()
        self.refused(model, "'model.layers.1.mlp.up_proj' is not a layer with one matrix")
        model = build("llama")
        del model.model.layers[1].mlp.gate_proj
        self.refused(model, "it has no module 'model.layers.1.mlp.gate_proj'")

    def test_variants_of_a_family(self):
        self.refused(build("opt", do_layer_norm_before=False), "its config says do_layer_norm")
        self.refused(build("opt", layer_norm_elementwise_affine=False), ".* is not a norm over")


def test_a_layer_finds_its_target_and_its_rows():
    model = build("gpt_neox")
    attention = require_roles(model).blocks[1].attention
    name = "gpt_neox.layers.1.attention.query_key_value"
    fused = model.get_submodule(name)
    assert attention.k.target(model) == Target(name, "linear", fused)
    assert attention.k.index(model).tolist() == [
        24 * head + 8 + channel for head in range(4) for channel in range(8)
    ]
    assert attention.k.bias(model) is fused.bias
    model = build("mixtral")
    part = require_roles(model).blocks[0].mlp
    expert = part.experts[3]
    assert expert.gate.index(model).tolist() == list(range(48))
    assert expert.up.index(model).tolist() == list(range(48, 96))
    assert expert.down.bias(model) is None
    assert part.router.target(model).view.shape == (4, 32)
    assert torch.equal(
        expert.down.target(model).view, model.model.layers[0].mlp.experts.down_proj[3]
    )
