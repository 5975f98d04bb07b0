"""What llama.cpp does not compute is refused, and what it must know stands in the file."""

import math

import pytest
import torch
import transformers

from optimum_order.formats import gguf_families
from optimum_order.formats.gguf_families import FAMILIES, entries, fields, interleaved, why_not

pytest.importorskip("gguf")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def empty(family, **options):
    """A model without values."""
    config = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config(**(SHAPE | options)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_place_for_every_tensor(name):
    family = name.removesuffix("ForCausalLM")
    model = empty(family, **{"Gemma3": GEMMA, "Qwen3Moe": MOE}.get(family, {}))
    assert why_not(model) is None
    listed = [entry for block in entries(model) for entry in block]
    assert len({entry.name for entry in listed}) == len(listed)
    keys = [key for entry in listed for key in entry.keys]
    assert len(set(keys)) == len(keys) >= 15
    assert all(entry.dtype == torch.float32 for entry in listed if len(entry.shape) == 1)


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("OPT", {}, "none of the architectures that are written"),
        ("Llama", {"hidden_act": "relu"}, "activation is relu"),
        ("Llama", {"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}, r"scaled \(dynamic\)"),
        ("Qwen2", {"rope_parameters": LLAMA3}, r"scaled \(llama3\)"),
        ("Gemma3", GEMMA | {"query_pre_attn_scalar": 64}, "scales queries by 64"),
        ("Gemma3", GEMMA | {"use_bidirectional_attention": True}, "looks ahead"),
        ("Gemma3", GEMMA | {"attention_bias": True}, "no place for the tensor"),
        ("Qwen3", {"attention_bias": True}, r"no place for the tensor '.*o_proj.bias'"),
        ("Qwen3Moe", MOE | {"norm_topk_prob": False}, "norm_topk_prob"),
        ("Qwen3Moe", MOE | {"mlp_only_layers": [1]}, "have no experts"),
        ("Olmo2", {"tie_word_embeddings": True}, "head of its own"),
        ("Phi3", {"head_dim": 32}, "128 wide together"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family, options, match):
    import re

    assert re.search(match, why_not(empty(family, **options)) or ""), why_not(
        empty(family, **options)
    )


def said(model):
    listed = [entry for block in entries(model) for entry in block]
    return fields(model, listed)


def test_what_a_file_says():
    values = said(empty("Llama", head_dim=32, rms_norm_eps=1e-6))
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.vocab_size"] == 64
    assert values["llama.attention.key_length"] == values["llama.rope.dimension_count"] == 32
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    values = said(empty("Llama", rope_parameters=linear))
    assert values["llama.rope.scaling.type"] == "linear"
    assert values["llama.rope.scaling.factor"] == 4.0 and values["llama.rope.freq_base"] == 500.0
    values = said(empty("Gemma3", **GEMMA, num_hidden_layers=6, sliding_window=16))
    assert values["gemma3.attention.sliding_window"] == 16
    assert values["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False]
    assert values["gemma3.rope.freq_base"] != values["gemma3.rope.freq_base_swa"]
    values = said(empty("Qwen3Moe", **MOE, moe_intermediate_size=32))
    assert values["qwen3moe.expert_count"] == 4 and values["qwen3moe.expert_used_count"] == 2
    assert values["qwen3moe.expert_feed_forward_length"] == 32


def test_the_context_ends_where_llama_cpp_has_no_window():
    assert said(empty("Mistral", sliding_window=32))["llama.context_length"] == 32
    assert said(empty("Mistral", sliding_window=None))["llama.context_length"] == 128
    assert said(empty("Phi3", sliding_window=256))["phi3.context_length"] == 128
    assert said(empty("Qwen2", use_sliding_window=False))["qwen2.context_length"] == 128
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    assert said(empty("Qwen2", **window))["qwen2.context_length"] == 16


def test_rope_factors_are_those_of_transformers():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3))
    assert gguf_families.rope_factors(empty("Llama")) is None
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    scaled = plain / gguf_families.rope_factors(model)
    torch.testing.assert_close(scaled, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert not torch.allclose(scaled, plain) and math.isclose(scaled[0], 1.0)


def test_rows_lie_pair_by_pair_and_back():
    rows = interleaved(12, 2)
    assert rows.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    model = empty("Llama", attention_bias=True)
    for entry in [entry for block in entries(model) for entry in block]:
        stored = {
            key: torch.randn(entry.shape[-len(entry.shape) :]).bfloat16() for key in entry.keys
        }
        values = entry.values(stored)
        assert values.dtype == entry.dtype or entry.dtype == torch.float32
        again = entry.undo(values, torch.bfloat16)
        assert all(torch.equal(again[key], stored[key]) for key in stored), entry.name
