"""Accuracy against counting by hand, and everything that it must refuse."""

import copy
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Images, Windows
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.testing import MetricContract


@pytest.fixture
def model(make_image_model):
    return make_image_model("vit")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def answers(model, pixels):
    with torch.no_grad():
        return model(pixels).logits.argmax(-1)


def measure(model, samples, **options):
    return Accuracy().measure(model, samples, **{"progress": False} | options)


class TestContract(MetricContract):
    @pytest.fixture(autouse=True)
    def classifier(self, model, pixels, answers):
        self._model = model
        labels = answers.clone()
        labels[3] = (labels[3] + 1) % 10
        self._samples = Images(pixels, "made up", labels)

    def metric(self):
        return Accuracy()

    def model(self):
        return copy.deepcopy(self._model)

    def samples(self):
        return self._samples


def test_the_fraction_of_right_answers(model, pixels, answers):
    labels = answers.clone()
    labels[[2, 5, 7]] = (labels[[2, 5, 7]] + 1) % 10
    result = measure(model, Images(pixels, "made up", labels))
    assert result.name == "accuracy" and result.value == pytest.approx(8 / 11)
    assert [i for i, score in enumerate(result.scores) if score == 0] == [2, 5, 7]
    # the sample variance of 11 images
    assert result.standard_error == pytest.approx(math.sqrt(8 / 11 * 3 / 11 / 10))
    assert result.performance == result.value and result.tokens is None
    assert "tokens" not in result.as_dict() and result.as_dict()["samples"] == 11


def test_pixels_come_in_the_dtype_of_the_model(make_image_model, pixels):
    for architecture in ("deit", "resnet"):
        for dtype in (torch.float32, torch.bfloat16):
            model = make_image_model(architecture).to(dtype)
            with torch.no_grad():
                answers = model(pixels.to(dtype)).logits.argmax(-1)
            assert measure(model, Images(pixels, "made up", answers), batch_size=11).value == 1


def test_samples_that_are_refused(model, pixels, answers):
    def labeled(label):
        labels = answers.clone()
        labels[4] = label
        return Images(pixels, "made up", labels)

    text = Windows(torch.zeros(2, 4, dtype=torch.long), "made up")
    for samples, message in [
        (Images(pixels, "made up"), "The images of made up have no labels, and accuracy needs"),
        (labeled(-1), "knows classes 0 to 9, got label -1 from made up"),
        (labeled(10), "knows classes 0 to 9, got label 10 from made up"),
        (Images(torch.zeros(11, 1, 16, 16), "made up", answers), "of 3 channels, got 1 from made"),
        (text, "measured on images, got made up, which are windows"),
    ]:
        with pytest.raises(DataError, match=message):
            measure(model, samples)


def test_models_without_classes_of_images(pixels, answers, tiny_llama_folder):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    for other in (
        LlamaForCausalLM.from_pretrained(tiny_llama_folder),
        ViTModel(ViTConfig(**small, image_size=16, patch_size=4)),
        BertForSequenceClassification(BertConfig(**small, vocab_size=50)),
    ):
        message = f"for image classifiers.*{type(other).__name__} has no head"
        with pytest.raises(ModelError, match=message):
            measure(other, Images(pixels, "made up", answers))


def test_one_broken_logit_breaks_the_image(model, pixels, answers):
    """The largest of broken logits says nothing."""
    with torch.no_grad():
        model.classifier.bias[3] = math.nan
    with pytest.raises(ModelError, match="accuracy of image 1 of 11 is not finite"):
        measure(model, Images(pixels, "made up", answers))
