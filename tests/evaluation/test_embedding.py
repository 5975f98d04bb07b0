"""Vectors of texts against a mean and a cosine taken by hand, and what must be refused."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViTConfig,
    ViTModel,
)

from optimum_order.errors import ModelError
from optimum_order.evaluation import Windows, available, choose
from optimum_order.evaluation.embedding import Embedding, vectors
from optimum_order.testing import MetricContract

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert(**changes):
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES | changes)).eval()


def disturbed(model, scale):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture
def windows():
    return Windows(
        torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0)), "made up"
    )


def measure(reference, model, samples):
    return Embedding(reference).measure(model, samples, batch_size=2, progress=False)


def test_it_is_usual_for_what_reads_texts_and_has_no_head():
    with torch.device("meta"):
        models = [
            BertModel(BertConfig(**SIZES)),
            LlamaModel(LlamaConfig(**SIZES)),
            T5EncoderModel(T5Config(num_layers=1, vocab_size=64)),
        ]
        others = [
            BertForMaskedLM(BertConfig(**SIZES)),
            T5Model(T5Config(num_layers=1, vocab_size=64)),
            ViTModel(ViTConfig(num_hidden_layers=1)),
            CLIPModel(CLIPConfig()),
        ]
    assert all(choose(model) is Embedding for model in models)
    assert not any(Embedding.is_usual(model) for model in others)


class TestContract(MetricContract):
    @pytest.fixture(autouse=True)
    def original(self, windows):
        self._original = bert()
        self._windows = windows

    def metric(self):
        return Embedding(self._original)

    def model(self):
        return disturbed(self._original, 0.02)

    def samples(self):
        return self._windows


def test_a_score_is_the_cosine_distance_of_means(windows):
    original, other = bert(), disturbed(bert(), 0.1)
    with torch.no_grad():
        e, f = (
            m(input_ids=windows.ids).last_hidden_state.double().mean(1) for m in (original, other)
        )
    expected = 1 - (e * f).sum(1) / e.norm(dim=1) / f.norm(dim=1)
    assert expected.min() > 1e-3
    result = measure(original, other, windows)
    assert result.scores == pytest.approx(expected.tolist(), rel=1e-3)
    assert result.performance == -result.value and not result.higher_is_better


def test_lengths_do_not_count_and_a_model_is_like_itself(windows):
    original, longer = bert(), bert()
    norm = longer.encoder.layer[0].output.LayerNorm
    norm.weight.data *= 3
    norm.bias.data *= 3
    assert measure(original, longer, windows).value < 1e-6
    assert measure(original, bert(), windows).value == 0


def test_padding_is_left_out():
    model = bert()
    ids = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        padded = vectors(model, {"input_ids": ids, "attention_mask": mask})
        alone = vectors(model, {"input_ids": ids[:, :5]})
    assert torch.allclose(padded, alone, atol=1e-6)


def test_other_models_are_refused(windows):
    with pytest.raises(ModelError, match="give it as 'reference'"):
        Embedding()
    wider = bert(hidden_size=64)
    with pytest.raises(ModelError, match="vectors have 32 entries, those of the model .* 64"):
        measure(bert(), wider, windows)
    headed = BertForMaskedLM(BertConfig(**SIZES)).eval()
    with pytest.raises(ModelError, match="BertForMaskedLM returns none. Load .* AutoModel"):
        measure(headed, headed, windows)
    sizes = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    pair = T5Model(T5Config(vocab_size=64, **sizes)).eval()
    with pytest.raises(ModelError, match="one input, got T5Model, whose decoder"):
        measure(pair, pair, windows)


def test_a_user_names_it():
    assert available()["embedding"] is Embedding
