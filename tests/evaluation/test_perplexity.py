"""Perplexity against transformers' own loss, and every model it must refuse."""

import json
import math

import pytest
import torch
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
from optimum_order.evaluation import Windows
from optimum_order.evaluation.perplexity import Perplexity


@pytest.fixture
def model(tiny_llama_folder):
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder)


@pytest.fixture(scope="module")
def windows(tiny_llama_folder, prose):
    ids = AutoTokenizer.from_pretrained(tiny_llama_folder)(prose, verbose=False)["input_ids"]
    return Windows(torch.tensor(ids[: 11 * 24]).view(11, 24), "prose", bytes=500)


def measure(model, windows, **options):
    return Perplexity().measure(model, windows, **{"progress": False} | options)


def test_it_is_the_exponential_of_the_loss_of_transformers(model, windows):
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows.ids]
    found = measure(model, windows)
    assert found.per_sequence == pytest.approx(losses, rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(losses) / 11), rel=1e-5)
    assert found.details["log_perplexity"] == pytest.approx(sum(losses) / 11, rel=1e-6)
    assert found.standard_error == pytest.approx(
        torch.tensor(losses).std().item() / math.sqrt(11), rel=1e-4
    )


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, windows):
    torch.nn.init.zeros_(model.lm_head.weight)
    found = measure(model, windows)
    assert found.value == pytest.approx(model.config.vocab_size, rel=1e-6)
    bits = (
        11 * 23 * math.log2(model.config.vocab_size)
    )  # the first token of a window is not predicted
    assert found.details["bits_per_byte"] == pytest.approx(bits / 500, rel=1e-6)


def test_no_bits_per_byte_without_bytes(model, windows):
    assert set(measure(model, Windows(windows.ids, "prose")).details) == {"log_perplexity"}


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_the_batch_size_does_not_matter(model, windows, batch_size):
    expected = measure(model, windows)
    found = measure(model, windows, batch_size=batch_size)
    assert found.per_sequence == pytest.approx(expected.per_sequence, rel=1e-5)


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(model, windows):
    model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=windows.ids).logits
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows.ids[:, 1:].flatten()
    )
    found = measure(model, windows, batch_size=11)
    assert found.details["log_perplexity"] == pytest.approx(expected.item(), rel=1e-6)


def test_other_architectures(windows):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    )
    assert 300 < measure(model, windows).value < 600


@pytest.mark.parametrize(
    "build",
    [
        lambda llama: LlamaModel(llama),
        lambda llama: BertForMaskedLM(
            BertConfig(
                vocab_size=400,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ),
        lambda llama: T5ForConditionalGeneration(
            T5Config(vocab_size=400, d_model=32, d_ff=32, num_layers=1, num_heads=2)
        ),
    ],
)
def test_only_causal_language_models(model, windows, build):
    other = build(model.config)
    with pytest.raises(ModelError, match=f"for causal language models.*{type(other).__name__}"):
        measure(other, windows)


def test_windows_that_the_model_cannot_read(model):
    with pytest.raises(DataError, match="at most 128 tokens at once, got windows of 129"):
        measure(model, Windows(torch.zeros(1, 129, dtype=torch.long), "made up"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_no_numbers(model, windows, value):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ModelError, match="perplexity of window 1 of 11 is not finite"):
        measure(model, windows)


def test_a_loss_that_has_no_exponential(model, windows):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(ModelError, match="no finite perplexity"):
        measure(model, windows)


def test_the_result_is_json_without_single_sequences(model, windows):
    found = measure(model, windows).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["name"] == "perplexity" and found["samples"] == 11 and found["tokens"] == 11 * 24
    assert found["source"] == "prose" and found["digest"] == windows.digest
    assert {"value", "standard_error_of_mean_score", "log_perplexity", "bits_per_byte"} < set(found)
    assert not any(isinstance(value, (list, tuple)) for value in found.values())
