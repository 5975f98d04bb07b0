"""Accuracy against counting by hand, and everything that it must refuse."""

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


def test_it_counts_what_is_right(model, pixels, answers):
    labels = answers.clone()
    labels[[2, 5, 7]] = (labels[[2, 5, 7]] + 1) % 10
    found = measure(model, Images(pixels, "made up", labels))
    assert found.name == "accuracy" and found.value == pytest.approx(8 / 11)
    assert [i for i, score in enumerate(found.per_sequence) if score == 0] == [2, 5, 7]
    assert found.standard_error == pytest.approx(
        math.sqrt(8 / 11 * 3 / 11 / 10)
    )  # sample variance, 11 images
    assert found.performance == found.value and found.tokens is None
    assert "tokens" not in found.as_dict() and found.as_dict()["samples"] == 11


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_batch_size_does_not_matter(model, pixels, answers, batch_size):
    assert measure(model, Images(pixels, "made up", answers), batch_size=batch_size).value == 1


@pytest.mark.parametrize("architecture", ["deit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_come_in_the_dtype_of_the_model(make_image_model, pixels, architecture, dtype):
    model = make_image_model(architecture).to(dtype)
    with torch.no_grad():
        answers = model(pixels.to(dtype)).logits.argmax(-1)
    assert measure(model, Images(pixels, "made up", answers), batch_size=11).value == 1


def test_images_without_labels(model, pixels):
    with pytest.raises(
        DataError, match="The images of made up have no labels, and accuracy needs them"
    ):
        measure(model, Images(pixels, "made up"))


@pytest.mark.parametrize("wrong", [-1, 10])
def test_labels_outside_the_classes(model, pixels, answers, wrong):
    labels = answers.clone()
    labels[4] = wrong
    with pytest.raises(DataError, match=f"knows classes 0 to 9, got label {wrong} from made up"):
        measure(model, Images(pixels, "made up", labels))


def test_images_of_other_channels(model, answers):
    with pytest.raises(DataError, match="reads images of 3 channels, got 1 from made up"):
        measure(model, Images(torch.zeros(11, 1, 16, 16), "made up", answers))


def test_text(model):
    with pytest.raises(DataError, match="measured on images, got made up, which are windows"):
        measure(model, Windows(torch.zeros(2, 4, dtype=torch.long), "made up"))


def test_models_without_classes_of_images(pixels, answers, tiny_llama_folder):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    others = [
        LlamaForCausalLM.from_pretrained(tiny_llama_folder),
        ViTModel(ViTConfig(**small, image_size=16, patch_size=4)),
        BertForSequenceClassification(BertConfig(**small, vocab_size=50)),
    ]
    for other in others:
        with pytest.raises(
            ModelError, match=f"for image classifiers.*{type(other).__name__} has no head"
        ):
            measure(other, Images(pixels, "made up", answers))


def test_a_model_that_computes_no_numbers(model, pixels, answers):
    with torch.no_grad():
        model.classifier.bias[3] = math.nan
    with pytest.raises(ModelError, match="accuracy of image 1 of 11 is not finite"):
        measure(model, Images(pixels, "made up", answers))
