"""Choosing a format: the smallest that holds everything, or a refusal that names what can."""

import re

import pytest
import torch
import transformers

from optimum_order import backends, formats
from optimum_order.errors import FormatError
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_units
from optimum_order.order import Order

SHAPE = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, intermediate_size=128))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    config = transformers.MixtralConfig(
        **SHAPE, num_key_value_heads=2, intermediate_size=32, num_local_experts=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    sizes = {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 2,
    }
    config = transformers.Qwen3MoeConfig(
        **SHAPE, **sizes, num_experts_per_tok=1, intermediate_size=64
    )
    return transformers.Qwen3MoeForCausalLM(config)


def compress(model, order, targets=None, last=None):
    """Every target after `order`, the very last one after `last`."""
    found = [target for unit in find_units(model, targets) for target in unit.targets]
    layers = {}
    for target in found:
        state = LayerState(target.read())
        for stage in Order.parse(last if last and target is found[-1] else order):
            state = backends.method(stage).apply(state)
        layers[target.name] = (target, state)
    return layers


@pytest.mark.parametrize(
    "order", ["rtn:4", "bitsandbytes(dtype=nf4, blocksize=32)", "bitsandbytes:int8"]
)
@pytest.mark.parametrize("name", ["compressed-tensors", "bitsandbytes"])
def test_convolutions_are_left_dense_by_what_loads_linear_layers_only(
    make_image_model, order, name
):
    model = make_image_model("resnet", embedding_size=32, hidden_sizes=[32, 32])
    layers = compress(model, order)
    assert formats.choose(model, layers).name == "dense"
    # what is first against it is the grid, where that is another library's
    why = "it is a convolution" if (name == "bitsandbytes") == (name in order) else "grid"
    with pytest.raises(
        FormatError,
        match=rf"cannot hold this model\. Layer 'resnet\.encoder.*{why}.*'dense' or 'auto'",
    ):
        formats.choose(model, layers, name)


def test_every_format_is_found_and_described():
    found = formats.available()
    assert list(found) == ["bitsandbytes", "compressed-tensors", "dense", "gptq", "sparse"]
    assert all(cls.name == name and cls.summary for name, cls in found.items())
    assert [name for name, cls in found.items() if not cls.runs_dense] == ["bitsandbytes"]
    assert [name for name, cls in found.items() if not cls.stock] == ["gptq", "sparse"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("magnitude:0.5", "dense"),
        ("rtn:4", "compressed-tensors"),
        ("rtn:4 > magnitude:0.5", "compressed-tensors"),
        ("rtn:4 > magnitude(sparsity=0.5, off_grid=true)", "dense"),
        ("rtn(bits=4, symmetric=false)", "dense"),
        ("bitsandbytes:nf4", "bitsandbytes"),
        ("bitsandbytes:int8 > magnitude:0.5", "bitsandbytes"),
        ("bitsandbytes:nf4 > rtn:4", "compressed-tensors"),
    ],
)
def test_auto_takes_the_smallest_that_holds_every_layer(order, expected):
    model = llama()
    assert formats.choose(model, compress(model, order)).name == expected


def test_auto_counts_real_bytes():
    """In groups of two, a float32 scale for every pair of 8-bit codes is larger than two bfloat16 weights..."""
    model = llama().to(torch.bfloat16)
    assert formats.choose(model, compress(model, "rtn(bits=8, group_size=2)")).name == "dense"
    assert (
        formats.choose(model, compress(model, "rtn(bits=8, group_size=32)")).name
        == "compressed-tensors"
    )


@pytest.mark.parametrize(
    ("build", "order", "name", "reason", "able"),
    [
        (llama, "magnitude:0.5", "compressed-tensors", "No layer is quantised", "dense"),
        (llama, "magnitude:0.5", "bitsandbytes", "No layer is quantised", "dense"),
        (
            llama,
            "rtn:4",
            "bitsandbytes",
            "Layer 'model.layers.0.self_attn.q_proj': its UniformGrid is not",
            "compressed",
        ),
        (
            llama,
            "bitsandbytes:nf4",
            "compressed-tensors",
            "its BlockGrid is not a grid of equal steps",
            "bitsandbytes",
        ),
        (
            llama,
            "rtn(bits=4, symmetric=false)",
            "compressed-tensors",
            "its grid has zero points",
            "dense",
        ),
        (
            gpt2,
            "rtn:4",
            "compressed-tensors",
            "'transformer.h.0.attn.c_attn': it is a GPT-2 Conv1D",
            "dense",
        ),
        (mixtral, "bitsandbytes:int8", "bitsandbytes", "it is a fused expert", "dense"),
    ],
)
def test_an_explicit_format_that_cannot_hold_a_layer_is_refused(build, order, name, reason, able):
    model = build()
    with pytest.raises(FormatError, match=re.escape(reason)) as caught:
        formats.choose(model, compress(model, order), name)
    assert f"Format '{name}' cannot hold this model" in str(caught.value)
    assert re.search(rf"{able}.* can; choose", str(caught.value))


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_compressed_tensors_wants_all_experts_or_none_of_the_model(build):
    """transformers unpacks all experts with one scheme, and drops any that are not packed."""
    model = build()
    attention, experts = ["*self_attn*"], ["*experts*"]
    for layers, reason in [
        (
            compress(model, "rtn:4", attention),
            "All experts must be quantised along with the rest of the model",
        ),
        (
            compress(model, "rtn:4", last="magnitude:0.5"),
            "All experts must be quantised along with",
        ),
        (compress(model, "rtn:4", last="rtn:8"), "All experts must have one width and group size"),
        (
            compress(model, "rtn:4", last="rtn(bits=4, group_size=16)"),
            "All experts must have one width and group",
        ),
    ]:
        with pytest.raises(FormatError, match=reason):
            formats.choose(model, layers, "compressed-tensors")
        assert formats.choose(model, layers).name == "dense"
    assert (
        formats.choose(model, compress(model, "rtn(bits=4, group_size=32)", experts)).name
        == "compressed-tensors"
    )


def test_bitsandbytes_wants_one_data_type():
    model = llama()
    layers = compress(model, "bitsandbytes:nf4", last="bitsandbytes:int8")
    with pytest.raises(
        FormatError, match=r"All layers must have one data type, these have 2: .*int8.*nf4"
    ):
        formats.choose(model, layers, "bitsandbytes")
    assert formats.choose(model, layers).name == "dense"
    layers = compress(model, "bitsandbytes:nf4", last="bitsandbytes(dtype=nf4, blocksize=128)")
    assert formats.choose(model, layers).name == "bitsandbytes"


def test_bitsandbytes_refuses_what_transformers_would_load_dense():
    """T5 keeps modules called `wo` in float32 whatever the checkpoint says."""
    model = llama()
    model._keep_in_fp32_modules = ["up_proj"]
    layers = compress(model, "bitsandbytes:nf4")
    with pytest.raises(FormatError, match=r"would load layer 'model.layers.0.mlp.up_proj' dense"):
        formats.choose(model, layers, "bitsandbytes")

    class Special(torch.nn.Linear):
        """Not of the very type that transformers replaces."""

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Special
    with pytest.raises(
        FormatError, match=r"'model.layers.0.mlp.up_proj' is a subclass of nn.Linear"
    ):
        formats.choose(model, compress(model, "bitsandbytes:nf4"), "bitsandbytes")


def test_an_unknown_format_gets_a_suggestion():
    model = llama()
    with pytest.raises(FormatError, match=r"Unknown format .*Did you mean 'compressed-tensors'\?"):
        formats.choose(model, compress(model, "rtn:4"), "compressed_tensors")
