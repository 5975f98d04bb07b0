"""What measuring takes: the forwards of all samples, and the weights beside the largest batch."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.errors import ModelError
from optimum_order.estimate import empty, measuring
from optimum_order.estimate.measuring import Measuring
from optimum_order.estimate.rates import Rates

CPU = torch.device("cpu")


@pytest.fixture
def slow(monkeypatch):
    """A machine that multiplies 1e9 times in a second, and moves bytes in no time."""
    rates = Rates(1e9, 1.0, 1.0, 1.0, 1e30, 1.0)
    monkeypatch.setattr(measuring.rates, "measure", lambda *_: rates)
    monkeypatch.setattr(measuring, "resident", lambda: 1000)


def test_seconds_are_those_of_the_products(slow):
    compressor = JointCompressor.from_pretrained("tiny-llama", sequence_length=64)
    model = empty(compressor.source)
    samples = compressor.evaluation_samples("builtin", 40)
    result = measuring.measuring(model, samples, CPU)
    assert (result.samples, result.tokens) == (40, 40 * 64)
    weights = model.num_parameters()
    head = model.get_output_embeddings().weight.numel()
    rows = result.tokens * 2 * weights / 1e9  # each weight multiplies each token, but embeddings
    assert 0.5 * rows < result.seconds < 1.5 * rows and head < weights
    assert result.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert result.memory > 1000 + result.weights
    half = compressor.evaluation_samples("builtin", 20)
    fewer = measuring.measuring(model, half, CPU)
    assert fewer.seconds == pytest.approx(result.seconds / 2)
    both = measuring.measuring(model, samples, CPU, models=2)
    assert both.seconds == pytest.approx(2 * result.seconds)
    assert both.weights == 2 * result.weights


def test_images_have_no_tokens(slow):
    result = JointCompressor.from_pretrained("tiny-vit").forecast_evaluation(samples=50)
    assert result.samples == 50 and result.tokens is None and result.seconds > 0
    assert str(result).startswith("50 samples, about ")


def test_in_words():
    result = Measuring(samples=2000, tokens=1024000, weights=10**9, seconds=600, memory=2 * 10**9)
    text = "2,000 samples of 1,024,000 tokens together, about 10 minutes and 2 GB of memory, 1 GB"
    assert str(result) == f"{text} of them weights"
    assert result.as_dict()["summary"] == str(result)


def test_what_cannot_be_measured_is_refused_without_weights():
    with pytest.raises(ModelError, match="Accuracy is for image classifiers"):
        JointCompressor.from_pretrained("tiny-llama").forecast_evaluation(metric="accuracy")
