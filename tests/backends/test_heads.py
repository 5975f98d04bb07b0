"""Whole groups of heads are removed; the result is a stock model, or is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import OrderError

IDS = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(0))
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 8}
FAMILIES = {
    "gemma3_text": WIDE,
    "llama": WIDE | {"attention_bias": True},
    "mixtral": WIDE,
    "qwen3": WIDE,
    "vit": {},
}


def of(model, data=IDS):
    settings = {"sequence_length": 16} if data is IDS else {}
    return JointCompressor(model, calibration=data, device="cpu", **settings)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_loads_with_equal_outputs(
    make_model, make_image_model, tmp_path, architecture
):
    images = architecture == "vit"
    make = make_image_model if images else make_model
    data = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) if images else IDS
    compressor = of(make(architecture, **FAMILIES[architecture]), data)
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    for order in ("heads:0.5 > rtn:4", "magnitude:0.3 > rtn(bits=4, group_size=-1) > heads:0.5"):
        compressed = compressor.compress(order, progress=False)
        for state in compressed.layers.values():
            state.check(order)
        compressed.save_pretrained(tmp_path / order[:5], format="dense")
        assert verify(tmp_path / order[:5]) == []
        loaded = auto.from_pretrained(tmp_path / order[:5])
        assert loaded.config.num_attention_heads == (2 if images else 4)
        assert images or loaded.config.num_key_value_heads == 2
        assert loaded.config.head_dim == 8
        with torch.no_grad():
            assert torch.equal(loaded(data[:2])[0], compressed.model(data[:2])[0]), order
    if not images:
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        cached = loaded.generate(IDS[:1], use_cache=True, **options)
        assert torch.equal(cached, loaded.generate(IDS[:1], use_cache=False, **options))


def test_a_group_that_does_nothing_goes_first(make_model):
    model = make_model("llama", **WIDE)
    with torch.no_grad():
        for layer, group in zip(model.model.layers, (2, 0), strict=True):
            layer.self_attn.o_proj.weight[:, group * 16 : (group + 1) * 16] = 0
    compressed = of(model).compress("heads(ratio=0.5, refit=false)", progress=False)
    rows = compressed.model.model.layers[0].self_attn.v_proj.weight
    before = model.model.layers[0].self_attn.v_proj.weight
    remaining = [g for g in range(4) if (before[g * 8 : g * 8 + 1] == rows).all(1).any()]
    assert 2 not in remaining and len(remaining) == 2


def test_what_no_config_holds_is_refused_with_what_loads(make_model):
    for architecture, changes, order, message in [
        (
            "llama",
            WIDE,
            "heads:0.25",
            "leave 6 query heads and 3 .* of 8 and 4. What loads: 2 . 1, 4",
        ),
        ("llama", WIDE, "heads:0.9", "leave 0 query heads"),
        ("bert", {}, "heads:0.5", "type 'bert': its config gives no size of a head"),
        ("gpt2", {}, "heads:0.5", "gives no size of a head"),
        ("llama", WIDE, "heads(ratio=0.5, targets=*.q_proj)", "treats all blocks alike"),
    ]:
        with pytest.raises(OrderError, match=message) as caught:
            of(make_model(architecture, **changes)).compress(order, progress=False)
        assert "\n" not in str(caught.value)
