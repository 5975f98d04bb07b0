"""Equalizing leaves every bit of the outputs alone, and rounding that follows hurts less."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.engine.recipe import Recipe, method
from optimum_order.engine.runner import Prefixes
from optimum_order.errors import DataError, OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order, Stage

IDS = torch.randint(2, 90, (8, 24), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "attention_bias": True,
}
OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "opt": (OPTForCausalLM, OPTConfig, OPT),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
}


def make(family="llama", dtype=torch.float32):
    """Return a model, two channels of whose normalized stream are large."""
    torch.manual_seed(0)
    model_class, config_class, sizes = FAMILIES[family]
    model = model_class(config_class(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # gains and biases that would be missed
            parameter.data.uniform_(0.2, 2)
        if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight")):
            parameter.data[[5, 17]] *= 30
        parameter.data = parameter.data.to(dtype)  # and buffers stay as they are
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def compressed(model, order, **options):
    compressor = JointCompressor(model, calibration=IDS, sequence_length=24, device="cpu")
    return compressor.compress(order, progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_of_the_outputs_stays(family, dtype):
    model = make(family, dtype)
    result = compressed(model, "equalize:3")
    weights = model.state_dict()
    moved = {
        name.rpartition(".")[2] if name.endswith("bias") else name.split(".")[-2]
        for name, tensor in result.model.state_dict().items()
        if not torch.equal(tensor, weights[name])
    }
    wanted = {
        "llama": {"input_layernorm", "q_proj", "v_proj", "up_proj", "down_proj", "bias"},
        "opt": {"self_attn_layer_norm", "q_proj", "fc1", "bias"},
        "gpt2": {"ln_1", "c_attn", "c_fc", "bias"},
    }
    assert wanted[family] <= moved
    assert torch.equal(logits(result.model), logits(model))


def test_rounding_hurts_less_where_inputs_have_outliers():
    """The claim of the method."""
    model = make()
    errors = []
    for order in (
        "rtn(bits=3, group_size=-1)",
        "equalize(bits=3, group_size=-1) > rtn(bits=3, group_size=-1)",
    ):
        result = compressed(model, order)
        errors.append((logits(result.model) - logits(model)).square().mean().item())
    plain, equalized = errors
    assert equalized < 0.8 * plain


def test_the_strength_is_the_best_of_all_that_are_tried(gaussian, inputs):
    """No strength of the rule loses less, and none at all is among those that are tried."""
    x = inputs("correlated", 256, 32)
    stage = method(Stage("equalize", bits=3, group_size=-1))
    rounding = method(Stage("rtn", bits=3, group_size=-1))
    gram = x[Gram].clone()
    size = torch.ones(32)
    size[[3, 20]] = 50.0
    gram *= size * size[:, None]
    state = LayerState(gaussian(16, 32))

    def error(exponents):
        scaled = LayerState(torch.ldexp(state.weight, exponents.int()))
        change = torch.ldexp(rounding.apply(scaled).weight, -exponents.int()) - state.weight
        return ((change @ gram) * change).sum().item()

    chosen = stage.exponents([state], Statistics(256, {Gram: gram}), torch.arange(32))
    assert chosen.dtype == torch.int8 and chosen[[3, 20]].min() > chosen.median()
    sizes = gram.diagonal().sqrt()
    for strength in torch.arange(21) / 20:
        other = (strength * (sizes / sizes.median()).log2()).round().clamp(-6, 6).to(torch.int8)
        assert error(chosen) <= error(other) * (1 + 1e-6)


def test_columns_of_one_source_get_one_exponent_and_dead_inputs_are_no_trouble(gaussian, inputs):
    gram = inputs("correlated", 256, 32)[Gram].clone()
    gram[:4] = 0
    gram[:, :4] = 0
    gram[8] *= 90
    gram[:, 8] *= 90
    rows = torch.arange(32) % 16
    stage = method(Stage("equalize", bits=3, group_size=-1))
    chosen = stage.exponents([LayerState(gaussian(16, 32))], Statistics(9, {Gram: gram}), rows)
    assert torch.equal(chosen[:16], chosen[16:]) and chosen.any()
    nothing = Statistics(9, {Gram: torch.zeros(32, 32)})
    assert not stage.exponents([LayerState(gaussian(16, 32))], nothing, rows).any()


def test_it_may_follow_a_pruner_and_not_a_quantizer(tmp_path):
    model = make()
    pruned = compressed(model, "wanda:0.5")
    order = "wanda:0.5 > equalize:4 > rtn(bits=4, group_size=16)"
    whole = compressed(model, order, work_dir=tmp_path / "work")
    for name, layer in pruned.layers.items():
        assert torch.equal(layer.pruned, whole.layers[name].pruned), name
    equalized = compressed(model, "wanda:0.5 > equalize:4")
    assert torch.equal(logits(equalized.model), logits(pruned.model))
    again = compressed(model, order, work_dir=tmp_path / "work", resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    for first in ("rtn(bits=4, group_size=16)", "activations:8"):
        with pytest.raises(OrderError, match=r"'equalize:4' .* cannot follow .* Put it first\.$"):
            compressed(model, f"{first} > equalize:4")
    with pytest.raises(DataError, match="'equalize:4' needs calibration data"):
        JointCompressor(model).compress("equalize:4")


def test_a_model_that_is_compressed_already_is_refused(tmp_path):
    folder = tmp_path / "rounded"
    compressed(make(), "rtn(bits=4, group_size=16)").save_pretrained(folder, "compressed-tensors")
    compressor = JointCompressor.from_pretrained(folder, calibration=IDS)
    for stage in ("equalize:4", "rotate"):
        with pytest.raises(OrderError, match=r"was compressed before this run.*original model"):
            compressor.compress(stage, progress=False)


def test_a_model_with_no_place_for_the_powers_is_refused(make_model):
    model = make_model("llama")
    compressor = JointCompressor(
        model, calibration=IDS % 60, sequence_length=24, device="cpu", targets=["*.k_proj"]
    )
    with pytest.raises(OrderError, match="'equalize:4': no norm and no layer"):
        compressor.compress("equalize:4", progress=False)


def test_the_result_is_a_stock_model_and_runs_can_share_it(tmp_path):
    model = make(dtype=torch.bfloat16)
    order = "equalize:4 > gptq(bits=4, group_size=16)"
    result = compressed(model, order)
    for format in ("dense", "compressed-tensors"):
        folder = tmp_path / format
        result.save_pretrained(folder, format=format)
        assert verify(folder) == []
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), logits(result.model)), format
    compressor = JointCompressor(model, calibration=IDS, sequence_length=24, device="cpu")
    recipe = Recipe.of(Order(order))
    alone = compressor.runner(recipe, progress=False)
    alone.run(Order(order))
    runner = compressor.runner(recipe, progress=False)
    runner.prefixes = Prefixes(tmp_path / "prefixes", 2**30)
    runner.run(Order("equalize:4"))
    runner.run(Order("rtn:8"))  # from the original model again
    runner.run(Order(order))  # from what the first has left
    assert torch.equal(logits(runner.model), logits(alone.model))
    assert compressor.estimate(order).as_dict()
