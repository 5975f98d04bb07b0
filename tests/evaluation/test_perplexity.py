"""Perplexity against transformers' own loss, and every model it must refuse."""

import copy
import json
import math

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Images, Windows
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.models import precision
from optimum_order.testing import MetricContract


@pytest.fixture
def model(tiny_llama_folder):
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder)


@pytest.fixture(scope="module")
def windows(tiny_llama_folder, prose):
    ids = AutoTokenizer.from_pretrained(tiny_llama_folder)(prose, verbose=False)["input_ids"]
    return Windows(torch.tensor(ids[: 11 * 24]).view(11, 24), "prose", bytes=500)


def measure(model, windows, **options):
    return Perplexity().measure(model, windows, **{"progress": False} | options)


class TestContract(MetricContract):
    @pytest.fixture(autouse=True)
    def trained(self, model, windows):
        """A few steps on the windows make the model better than one with noise."""
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(5):
            model(input_ids=windows.ids, labels=windows.ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self._model = model
        self._windows = windows

    def metric(self):
        return Perplexity()

    def model(self):
        return copy.deepcopy(self._model)

    def samples(self):
        return self._windows


def test_the_exponential_of_the_loss_of_transformers(model, windows):
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows.ids]
    result = measure(model, windows)
    assert result.scores == pytest.approx(losses, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / 11), rel=1e-5)
    assert result.details["log_perplexity"] == pytest.approx(sum(losses) / 11, rel=1e-6)
    error = torch.tensor(losses).std().item() / math.sqrt(11)
    assert result.standard_error == pytest.approx(error, rel=1e-4)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, windows):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = measure(model, windows)
    assert result.value == pytest.approx(model.config.vocab_size, rel=1e-6)
    bits = 11 * 23 * math.log2(model.config.vocab_size)  # the first token is not predicted
    assert result.details["bits_per_byte"] == pytest.approx(bits / 500, rel=1e-6)


def test_no_bits_per_byte_without_bytes(model, windows):
    assert set(measure(model, Windows(windows.ids, "prose")).details) == {"log_perplexity"}


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(model, windows):
    model.to(torch.bfloat16)
    with torch.no_grad(), precision.forwards(model.dtype, model.dtype, model.device):
        logits = model(input_ids=windows.ids).logits
    assert logits.dtype == torch.bfloat16
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows.ids[:, 1:].flatten()
    )
    result = measure(model, windows, batch_size=11)
    assert result.details["log_perplexity"] == pytest.approx(expected.item(), rel=1e-6)


def test_other_architectures(windows):
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    assert 300 < measure(GPT2LMHeadModel(config), windows).value < 600


def test_only_causal_language_models(model, windows):
    bert = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    t5 = T5Config(vocab_size=400, d_model=32, d_ff=32, num_layers=1, num_heads=2)
    for other in (
        LlamaModel(model.config),
        BertForMaskedLM(bert),
        T5ForConditionalGeneration(t5),
    ):
        message = f"for causal language models.*{type(other).__name__}"
        with pytest.raises(ModelError, match=message):
            measure(other, windows)


def test_a_model_that_reads_what_it_would_predict_has_no_perplexity(windows):
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for name, settings in (
        ("BertLMHeadModel", sizes),
        ("RobertaForCausalLM", sizes),
        (
            "XLNetLMHeadModel",
            {"vocab_size": 400, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48},
        ),
        ("BigBirdForCausalLM", sizes),
    ):
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            other = model_class(model_class.config_class(**settings)).to(dtype)
            with pytest.raises(ModelError, match=f"causal language models.*{name}|{name} reads"):
                measure(other, windows)
            assert other.training, "the mode of the model is its own"
    # the same classes as decoders, and experts whose batches round differently
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    for name, settings in (
        ("BertLMHeadModel", sizes | {"is_decoder": True}),
        ("Qwen3MoeForCausalLM", sizes | moe | heads),
        ("MambaForCausalLM", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1}),
    ):
        model_class = getattr(transformers, name)
        for dtype in (torch.float32, torch.bfloat16):
            other = model_class(model_class.config_class(**settings)).to(dtype)
            assert Perplexity.is_usual(other)
            assert measure(other, windows).value > 1


def test_samples_that_are_refused(model):
    for samples, message in [
        (
            Windows(torch.zeros(1, 129, dtype=torch.long), "x"),
            "128 tokens at once, got windows of 1",
        ),
        (Images(torch.zeros(1, 3, 8, 8), "x"), "measured on text, got x, which are images"),
    ]:
        with pytest.raises(DataError, match=message):
            measure(model, samples)


def test_a_model_that_computes_no_numbers(model, windows):
    for value in (math.nan, math.inf):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = value
        with pytest.raises(ModelError, match="perplexity of window 1 of 11 is not finite"):
            measure(model, windows)


def test_a_loss_that_has_no_exponential(model, windows):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(ModelError, match="no finite perplexity"):
        measure(model, windows)


def test_the_result_is_json_without_single_samples(model, windows):
    facts = measure(model, windows).as_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert list(facts) == [
        "name",
        "value",
        "standard_error_of_mean_score",
        "log_perplexity",
        "bits_per_byte",
        "samples",
        "tokens",
        "source",
        "digest",
    ]
    assert (facts["name"], facts["samples"], facts["tokens"]) == ("perplexity", 11, 11 * 24)
    assert facts["source"] == "prose" and facts["digest"] == windows.digest
    assert not any(isinstance(value, (list, tuple)) for value in facts.values())
