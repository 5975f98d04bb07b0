"""Which kind of samples a model gets, and how many at a time."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, ViTImageProcessorPil

from optimum_order.data.load import batch_size, inputs, samples_for
from optimum_order.evaluation import Images, Windows


def test_the_main_input_decides(make_image_model, tiny_llama_folder, prose):
    llama, tokenizer = (
        cls.from_pretrained(tiny_llama_folder) for cls in (LlamaForCausalLM, AutoTokenizer)
    )
    text = samples_for(llama, [prose], tokenizer, samples=3, length=16)
    assert isinstance(text, Windows) and text.ids.shape == (3, 16)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = samples_for(make_image_model("resnet"), "builtin", processor, samples=3, length=16)
    assert (
        isinstance(images, Images)
        and images.pixels.shape == (3, 3, 16, 16)
        and images.labels is not None
    )


@pytest.mark.parametrize("reader", ["text", "images"])
def test_every_option_arrives(make_image_model, tiny_llama_folder, reader):
    """The second draw of a seed is the second of its permutation; an evaluation takes the first as they come."""
    if reader == "text":
        model, source = (
            LlamaForCausalLM.from_pretrained(tiny_llama_folder),
            torch.arange(20)[:, None].expand(20, 2),
        )
        first = lambda found: found.ids[:, 0].tolist()  # noqa: E731
    else:
        model, source = make_image_model("vit"), torch.arange(20.0).view(20, 1, 1, 1)
        first = lambda found: found.pixels.flatten().tolist()  # noqa: E731
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5)).tolist()
    options = {"samples": 6, "length": 2}
    assert first(samples_for(model, source, None, **options, seed=5, draw=1)) == order[6:12]
    assert first(samples_for(model, source, None, **options, purpose="evaluation", seed=5)) == list(
        range(6)
    )


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (Windows(torch.zeros(9, 512, dtype=torch.long), "made up"), 4),
        (Windows(torch.zeros(1, 9999, dtype=torch.long), "made up"), 1),
        (Images(torch.zeros(100, 3, 8, 8), "made up"), 64),
        (Images(torch.zeros(2, 3, 224, 224), "made up"), 27),
        (Images(torch.zeros(1, 3, 2000, 2000), "made up"), 1),
    ],
)
def test_a_batch_is_as_large_as_memory_should_be(samples, expected):
    assert batch_size(samples) == expected


def test_a_walk_gets_no_labels():
    images = Images(torch.randn(70, 3, 8, 8), "made up", torch.zeros(70, dtype=torch.long))
    batches = inputs(images)
    assert [set(batch) for batch in batches] == [{"pixel_values"}] * 2
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), images.pixels)
