"""Our metrics as modules of the `evaluate` library."""

import evaluate
import pytest
import torch
from transformers import LlamaForCausalLM, ViTConfig, ViTForImageClassification

from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Images, Metric, Windows
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.evaluation.interop import to_evaluate
from optimum_order.evaluation.perplexity import Perplexity


def test_a_module_gives_the_figures_of_measure(tiny_llama_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    module = to_evaluate(Perplexity())
    assert isinstance(module, evaluate.Metric) and Perplexity.summary in module.description
    facts = module.compute(predictions=ids.tolist(), model=model, batch_size=2, progress=False)
    expected = Perplexity().measure(model, Windows(ids, "ids in memory"), progress=False).as_dict()
    assert facts["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert facts["digest"] == expected["digest"] and set(facts) == set(expected)


class Labeled(Metric):
    """How sure a classifier is of the true class."""

    name = "labeled"
    summary = "a metric for tests"
    higher_is_better = True

    def score(self, model, batch):
        chances = model(pixel_values=batch["pixel_values"]).logits.softmax(-1)
        return chances.gather(1, batch["labels"][:, None])[:, 0]


@pytest.fixture
def models():
    """An image classifier and one that differs from it."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval(), ViTForImageClassification(config).eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randn(6, 3, 8, 8, generator=generator), "pixels", torch.tensor([0, 1, 2, 3, 4, 0])
    )


def test_images_and_their_labels(models, images):
    for metric in (Labeled, Accuracy):
        expected = metric().measure(models[0], images, progress=False).as_dict()
        for convert in (torch.Tensor.tolist, torch.Tensor.numpy, lambda tensor: tensor):
            facts = to_evaluate(metric).compute(
                predictions=convert(images.pixels),
                references=convert(images.labels),
                model=models[0],
                progress=False,
            )
            assert facts == expected | {"source": "pixels in memory"}


def test_the_original_model_is_given_by_name(models, images):
    original, model = models
    samples = Images(images.pixels, "pixels in memory")
    expected = Fidelity(original).measure(model, samples, progress=False).as_dict()
    assert expected["value"] > 0
    for module, options in [
        (to_evaluate(Fidelity), {"reference": original}),
        (to_evaluate(Fidelity(original)), {}),
    ]:
        facts = module.compute(predictions=images.pixels, model=model, progress=False, **options)
        assert facts == expected


def test_fidelity_of_a_language_model(make_model):
    ids = torch.arange(40).view(4, 10)
    original, other = (make_model("llama") for _ in range(2))
    torch.nn.init.zeros_(other.lm_head.weight)
    facts = to_evaluate(Fidelity).compute(
        predictions=ids, model=other, reference=original, progress=False
    )
    expected = Fidelity(original).measure(other, Windows(ids, "ids"), progress=False)
    assert facts["value"] == expected.value > 0


def test_a_class_that_needs_the_original_and_was_not_given_it(models, images):
    with pytest.raises(ModelError, match="give it as 'reference'"):
        to_evaluate(Fidelity).compute(predictions=images.pixels, model=models[0])


def test_batches_are_added_up(models, images):
    module = to_evaluate(Labeled)
    for part in (slice(0, 2), slice(2, 6)):
        module.add_batch(predictions=images.pixels[part], references=images.labels[part])
    facts = module.compute(model=models[0], progress=False)
    assert facts["samples"] == 6 and facts["digest"] == images.digest


def test_predictions_that_are_refused(models):
    for predictions, references, message in [
        ([[1, 2], [3, 4]], [0, 1], "token ids have none"),
        ([[1, 2], [3]], None, "of one shape"),
        (torch.zeros(2, 3, 8, 8), [0, None], "for all samples or for none, got 1"),
    ]:
        with pytest.raises(DataError, match=message):
            to_evaluate(Labeled).compute(
                predictions=predictions, references=references, model=models[0]
            )
