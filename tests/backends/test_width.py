"""Channels are removed where they matter least; the result is a stock model of every family."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.engine.recipe import method
from optimum_order.errors import ModelError, OrderError
from optimum_order.models.architecture import require_roles
from optimum_order.order import Stage

WIDTH = "width(multiple=8, ratio=0.3)"
IDS = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "bert": "intermediate_size",
    "gemma3_text": "intermediate_size",
    "gpt2": "n_inner",
    "gpt_neox": "intermediate_size",
    "llama": "intermediate_size",
    "opt": "ffn_dim",
    "phi3": "intermediate_size",
    "qwen3": "intermediate_size",
    "vit": "intermediate_size",
}


def build(architecture, make_model, make_image_model):
    if architecture == "vit":
        return make_image_model("vit")
    if architecture != "phi3":
        return make_model(architecture)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "phi3", **sizes, num_attention_heads=4, vocab_size=64, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_loads_with_equal_outputs(
    make_model, make_image_model, tmp_path, architecture
):
    model = build(architecture, make_model, make_image_model)
    images = architecture == "vit"
    data = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) if images else IDS
    settings = {} if images else {"sequence_length": 16}
    compressor = JointCompressor(model, calibration=data, device="cpu", **settings)
    whole = require_roles(model).blocks[0].mlp.width
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    auto = AutoModel if architecture == "bert" else auto
    for order in (f"{WIDTH} > rtn:4", f"sparsegpt:0.5 > gptq:4 > {WIDTH}"):
        compressed = compressor.compress(order, progress=False)
        with torch.no_grad():
            expected = compressed.model(data[:2])[0]
        folder = tmp_path / order[:5]
        compressed.save_pretrained(folder, format="dense")
        assert verify(folder) == []
        loaded = auto.from_pretrained(folder)
        width = round(whole * 0.7 / 8) * 8
        assert getattr(loaded.config, FAMILIES[architecture]) == width
        assert require_roles(loaded).blocks[1].mlp.width == width
        with torch.no_grad():
            assert torch.equal(loaded(data[:2])[0], expected), order
        for state in compressed.layers.values():
            state.check(order)
        assert sum(state.sparsity for state in compressed.layers.values()) > 0 or "rtn" in order
        facts = compressed.manifest["smaller"]
        assert facts == [{"stage": WIDTH, "sizes": {FAMILIES[architecture]: width}}]


def test_what_cannot_be_is_refused_in_one_line_before_any_work(make_model):
    def order(architecture, text, **changes):
        model = make_model(architecture, **changes)
        compressor = JointCompressor(model, calibration=IDS, sequence_length=16, device="cpu")
        for ask in (compressor.compress, compressor.estimate):
            with pytest.raises((OrderError, ModelError)) as caught:
                ask(text)
            assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "would leave 0 of 48 channels, in multiples of 32" in order("llama", "width:0.9")
    assert "would leave 48 of 48 channels" in order("llama", "width(ratio=0.01, multiple=8)")
    assert "treats all blocks alike" in order("llama", "width(ratio=0.5, targets=*.up_proj)")
    assert "has experts: experts:0.25" in order("mixtral", "width:0.5")
    assert "Roles unknown for GptOssForCausalLM" in order("gpt_oss", WIDTH)
    nested = order("llama", f"wanda(pattern=2:4) > {WIDTH}")
    assert "N:M groups of 'wanda(pattern=2:4)' would be none. Put it first." in nested
    groups = order("llama", "rtn(bits=4, group_size=16) > width(ratio=0.5, multiple=8)")
    assert "cannot compress" in groups and "16" in groups
    for text in ("width:0", "width:1", "width", "width(ratio=0.5, multiple=0)"):
        with pytest.raises(OrderError):
            method(Stage(text) if text == "width" else parse(text))


def parse(text):
    from optimum_order.order import Order

    return Order.parse(text).stages[0]


def test_a_model_with_a_layer_left_out_is_cut_as_a_whole(make_model, tmp_path):
    """What the user ignores is not quantized, and has to fit all the same."""
    compressor = JointCompressor(
        make_model("llama"),
        calibration=IDS,
        sequence_length=16,
        device="cpu",
        ignore=["*.gate_proj", "*.0.mlp.down_proj"],
    )
    compressed = compressor.compress(f"{WIDTH} > rtn:4", progress=False)
    assert "model.layers.0.mlp.gate_proj" not in compressed.layers
    assert compressed.model.model.layers[0].mlp.gate_proj.weight.shape == (32, 32)
    compressed.save_pretrained(tmp_path / "out", format="dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, compressed.model(IDS).logits)


@pytest.mark.slow
def test_plans_and_studies_vary_its_place(make_compressor, text_file, tmp_path):
    compressor = make_compressor()
    stages = ["width(multiple=8, ratio=0.5)", "rtn:3", "depth(skip=[1])"]
    text = text_file.read_text(encoding="utf-8")[:4000]
    with pytest.raises(OrderError, match="remove 0 at most"):
        compressor.plan(stages, evaluation=[text], evaluation_samples=4, progress=False)
    del stages[2]
    for strategy in ("auto", "measure"):
        plan = compressor.plan(
            stages, strategy=strategy, evaluation=[text], evaluation_samples=4, progress=False
        )
        assert len(plan.ranking) == 2
    orders = [" > ".join(stages), " > ".join(reversed(stages))]
    summary = compressor.study(
        orders,
        tmp_path / "study",
        draws=1,
        evaluation=[text],
        evaluation_samples=4,
        progress=False,
    )
    (pair,) = [pair for pair in summary["pairs"] if set(pair["orders"]) == set(orders)]
    assert pair["prunes_and_quantizes"]
    for order in orders:
        compressed = compressor.compress(order, pause="block", progress=False)
        figure = compressed.evaluate([text], progress=False).value
        assert figure > 0


def test_a_grid_that_was_there_before_the_run_is_not_broken(make_model, tmp_path):
    compressor = JointCompressor(
        make_model("llama"), calibration=IDS, sequence_length=16, device="cpu"
    )
    for order, broken in [("rtn(bits=4, group_size=8)", True), ("rtn:4", False)]:
        folder = tmp_path / order[:5]
        compressor.compress(order, progress=False).save_pretrained(
            folder, format="compressed-tensors"
        )
        again = JointCompressor.from_pretrained(folder, calibration=IDS, sequence_length=16)
        if broken:
            with pytest.raises(OrderError, match="was quantized before this run") as caught:
                again.compress(WIDTH, progress=False)
            assert "\n" not in str(caught.value)
            continue
        compressed = again.compress(WIDTH, progress=False)
        assert all(state.grid.bits == 4 for state in compressed.layers.values())
