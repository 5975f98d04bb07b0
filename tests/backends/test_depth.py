"""Blocks are removed as a whole, the least missed first, and a cache of keys still works."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.order import Order

IDS = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(0))


def compressor_of(make_model, architecture="llama", **changes):
    model = make_model(architecture, **changes)
    return JointCompressor(model, calibration=IDS, sequence_length=16, device="cpu")


def test_a_block_that_does_nothing_goes_first(make_model):
    model = make_model("llama", num_hidden_layers=5)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    compressor = JointCompressor(model, calibration=IDS, sequence_length=16, device="cpu")
    compressed = compressor.compress("depth:1", progress=False)
    assert compressed.manifest["smaller"] == [
        {"stage": "depth:1", "sizes": {"num_hidden_layers": 4}, "removed": [3]}
    ]
    with torch.no_grad():
        torch.testing.assert_close(compressed.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"num_hidden_layers": 5}),
        (
            "gemma3_text",
            {
                "num_hidden_layers": 5,
                "layer_types": [
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ],
            },
        ),
        ("gpt2", {"n_layer": 5}),
        ("qwen3", {"num_hidden_layers": 5}),
    ],
)
def test_what_is_left_loads_and_generates_with_a_cache(make_model, tmp_path, architecture, changes):
    compressor = compressor_of(make_model, architecture, **changes)
    compressed = compressor.compress("rtn:8 > depth:2 > magnitude:0.3", progress=False)
    model = compressed.model
    (facts,) = compressed.manifest["smaller"]
    removed = facts["removed"]
    assert len(removed) == 2 and not {0, 4} & set(removed)
    names = {name.split(".")[2] for name in compressed.layers}
    assert names == {"0", "1", "2"}
    compressed.save_pretrained(tmp_path / "out", format="dense")
    assert verify(tmp_path / "out") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.to_dict().get("layer_types") == facts["sizes"].get("layer_types")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for runnable in (model, loaded):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        cached = runnable.generate(IDS[:1], use_cache=True, **options)
        plain = runnable.generate(IDS[:1], use_cache=False, **options)
        assert torch.equal(cached, plain)
    skip = ", ".join(map(str, removed))
    again = compressor.compress(f"rtn:8 > depth(skip=[{skip}]) > magnitude:0.3", progress=False)
    assert again.layers.keys() == compressed.layers.keys()
    for name, state in again.layers.items():
        assert torch.equal(state.weight, compressed.layers[name].weight)


def test_the_last_of_several_is_chosen_with_the_others_gone(make_model):
    """Two blocks that undo each other: alone neither goes, and then both do."""
    compressor = compressor_of(make_model, num_hidden_layers=4)
    one = compressor.compress("depth:1", progress=False).manifest["smaller"][0]["removed"]
    two = compressor.compress("depth:2", progress=False).manifest["smaller"][0]["removed"]
    assert set(one) < set(two) == {1, 2}


def test_what_cannot_be_is_refused_in_one_line(make_model):
    compressor = compressor_of(make_model, num_hidden_layers=4)
    for text, message in [
        ("depth:3", "would remove 3 of 4 blocks, and the first and the last stay: remove 2"),
        ("depth(skip=[0])", "block 0 cannot be removed. 'skip' names blocks from 1 to 2"),
        ("depth(skip=3)", "block 3 cannot be removed"),
        ("depth:1 > depth:2", "Stage 'depth:2' would remove 2 of 3 blocks"),
    ]:
        with pytest.raises(OrderError, match=message) as caught:
            compressor.compress(text, progress=False)
        assert "\n" not in str(caught.value)
    for text in ("depth", "depth:0", "depth(blocks=2, skip=[1])", "depth(skip=[1,1])"):
        with pytest.raises(OrderError):
            method(Order.parse(text).stages[0])
    skipping = method(Order.parse("depth(skip=[4, 11])").stages[0])
    assert str(skipping.stage) == "depth(skip=[4,11])" and not skipping.needs_data
    assert method(Order.parse("depth:2").stages[0]).needs_data
