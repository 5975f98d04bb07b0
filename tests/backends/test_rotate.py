"""A rotation leaves the function of the model as it is, and the rows without outliers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.backends.rotate import Rotate, hadamard
from optimum_order.engine.recipe import Recipe, method
from optimum_order.engine.transform import transform
from optimum_order.errors import ModelError, OrderError
from optimum_order.order import Order, Stage

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 3}),
}
IDS = torch.randint(2, 90, (8, 24), generator=torch.Generator().manual_seed(0))


def make(family, dtype=torch.float32):
    torch.manual_seed(0)
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**SIZES | own)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # gains that a rotation would not survive unfolded
            parameter.data.uniform_(0.2, 3)
        elif name.endswith("bias"):
            parameter.data.normal_()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@given(st.sampled_from([1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 56, 64, 72, 128, 576]))
@settings(deadline=None, max_examples=16)
def test_hadamard_matrices_are_orthogonal(size):
    matrix = hadamard(size)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 6, 10, 18, 172])
def test_sizes_without_a_hadamard_matrix(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("matrix", ["auto", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family, matrix):
    model = make(family)
    before = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    sizes = transform(method(Stage("rotate", matrix=matrix)), model, [{"input_ids": IDS}])
    error = (logits(model) - before).abs().max() / before.abs().max()
    assert error < 1e-4
    assert sizes == ({"tie_word_embeddings": False} if family in ("llama", "qwen3") else {})
    for name, parameter in model.named_parameters():
        if name in weights and parameter.ndim > 1:  # biases of queries and keys stay
            assert not torch.equal(parameter, weights[name]), f"{name} is as it was"
        if "layernorm" in name:
            assert (parameter == 1).all()


def test_each_seed_is_another_rotation():
    weights = []
    for seed in (0, 0, 1):
        model = make("llama")
        transform(method(Stage("rotate", seed=seed)), model, [{"input_ids": IDS}])
        weights.append(model.model.layers[1].self_attn.v_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_outliers_are_spread_and_rounding_hurts_less():
    """The claim of the method."""
    errors = {}
    for order in ("rtn(bits=4, group_size=-1)", "rotate > rtn(bits=4, group_size=-1)"):
        model = make("llama")
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for reader in (attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight.data[:, 5] *= 30  # a channel of the stream
            attention.o_proj.weight.data[:, ::6] *= 30  # a channel of each head
        before = logits(model)
        compressor = JointCompressor(model, calibration=IDS, sequence_length=24, device="cpu")
        compressed = compressor.compress(order, progress=False)
        errors[order] = (logits(compressed.model) - before).square().mean().item()
    plain, rotated = errors.values()
    assert rotated < 0.8 * plain


def test_a_rotated_model_is_a_stock_model(tmp_path):
    model = make("llama", torch.bfloat16)
    compressor = JointCompressor(model, calibration=IDS, sequence_length=24, device="cpu")
    compressed = compressor.compress("rotate > gptq(bits=4, group_size=-1)", progress=False)
    for format in ("dense", "compressed-tensors", "coded"):
        folder = tmp_path / format
        compressed.save_pretrained(folder, format=format)
        assert verify(folder) == []
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert not loaded.config.tie_word_embeddings
        assert torch.equal(logits(loaded), logits(compressed.model)), format
    assert compressed.manifest["stages"][0]["options"]["seed"] == 0
    assert model.config.tie_word_embeddings and model.lm_head.weight is not None


def test_a_run_is_gone_on_with(tmp_path):
    order = "rotate > wanda:0.3"
    compressor = JointCompressor(make("llama"), calibration=IDS, sequence_length=24, device="cpu")
    whole = compressor.compress(order, progress=False)
    for _ in range(2):
        again = compressor.compress(order, work_dir=tmp_path, resume=True, progress=False)
        weights = again.model.state_dict()
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    with pytest.raises(ModelError, match="low_memory"):
        compressor.compress(order, low_memory=True, work_dir=tmp_path / "other")


def test_the_runner_comes_back_to_the_model():
    compressor = JointCompressor(make("llama"), calibration=IDS, sequence_length=24, device="cpu")
    order = Order("rotate > rtn(bits=4, group_size=-1)")
    runner = compressor.runner(Recipe.of(order), progress=False)
    before = logits(runner.model)
    runner.run(order)
    rotated = logits(runner.model)
    runner.reset()
    assert torch.equal(logits(runner.model), before)
    assert runner.model.config.tie_word_embeddings
    runner.run(order)
    assert torch.equal(logits(runner.model), rotated)


class TestRefused:
    def test_norms_that_notice(self):
        for name, what in {"gpt2": "subtract a mean", "olmo2": "stand behind"}.items():
            model = FAMILIES_THAT_NOTICE[name]()
            compressor = JointCompressor(model, calibration=IDS, sequence_length=24, device="cpu")
            with pytest.raises(OrderError, match=f"'rotate.*{name}.*{what}"):
                compressor.compress("rotate > rtn:4", progress=False)

    def test_sizes_without_a_matrix(self):
        stage = method(Stage("rotate", matrix="hadamard"))
        with pytest.raises(OrderError, match=r"no Hadamard matrix of 6 rows.*matrix=random"):
            Rotate._matrix(stage, 6, torch.Generator())

    def test_zeros_and_grids_unless_forced(self):
        compressor = JointCompressor(
            make("llama"), calibration=IDS, sequence_length=24, device="cpu"
        )
        with pytest.raises(OrderError, match=r"cannot follow 'wanda:0.5'.*force=true"):
            compressor.compress("wanda:0.5 > rotate", progress=False)
        forced = compressor.compress("wanda:0.5 > rotate(force=true)", progress=False)
        assert all(state.pruned is None for state in forced.layers.values())
        weight = next(iter(forced.layers.values())).weight
        assert (weight == 0).float().mean() < 0.05


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=24, n_layer=1, n_head=4)).eval()


def _olmo2():
    return Olmo2ForCausalLM(Olmo2Config(**SIZES)).eval()


FAMILIES_THAT_NOTICE = {"gpt2": _gpt2, "olmo2": _olmo2}
