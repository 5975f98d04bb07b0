"""Windows and images: slices, batches, digests, and the models that cannot read them."""

import pytest
import torch
from transformers import LlamaForCausalLM

from optimum_order.data.samples import Images, Windows, placed, without_labels
from optimum_order.errors import DataError


@pytest.fixture
def windows():
    return Windows(torch.arange(21).view(7, 3), "made up", bytes=9, note="short")


@pytest.fixture
def images():
    pixels = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Images(pixels, "made up", torch.tensor([5, 6, 7, 8]))


def test_windows_are_taken_in_the_order_of_the_index(windows):
    some = windows.take(torch.tensor([3, 0]))
    assert some.ids.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert (some.bytes, some.source, some.note) == (None, "made up", "short")
    assert some.digest == Windows(some.ids, "elsewhere").digest != windows.digest


def test_images_keep_their_labels(images):
    some = images.take(torch.tensor([2, 1]))
    assert torch.equal(some.pixels, images.pixels[[2, 1]]) and some.labels.tolist() == [7, 6]
    assert Images(images.pixels, "made up").take(torch.tensor([0])).labels is None


def test_batches_are_all_samples_in_order(windows, images):
    batches = [batch["input_ids"] for batch in windows.batches(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), windows.ids)
    first, second = images.batches(3)
    assert set(first) == {"pixel_values", "labels"} and second["labels"].tolist() == [8]
    assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), images.pixels)


def test_a_walk_reads_no_labels():
    images = Images(torch.randn(70, 3, 8, 8), "made up", torch.zeros(70, dtype=torch.long))
    batches = images.inputs()
    assert [set(batch) for batch in batches] == [{"pixel_values"}] * 2
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), images.pixels)
    assert set(without_labels(next(images.batches(1)))) == {"pixel_values"}


def test_a_batch_is_as_large_as_memory_should_be():
    for samples, expected in [
        (Windows(torch.zeros(9, 512, dtype=torch.long), "made up"), 4),
        (Windows(torch.zeros(1, 9999, dtype=torch.long), "made up"), 1),
        (Images(torch.zeros(100, 3, 8, 8), "made up"), 64),
        (Images(torch.zeros(2, 3, 224, 224), "made up"), 27),
        (Images(torch.zeros(1, 3, 2000, 2000), "made up"), 1),
    ]:
        assert samples.batch_size == expected


def test_the_digest_covers_values_shapes_and_labels(windows, images):
    ids = windows.ids
    variants = [
        windows,
        Windows(ids.view(3, 7), "made up"),
        Windows(ids.flip(0), "made up"),
        images,
        Images(images.pixels, "made up"),
        Images(images.pixels, "made up", images.labels.flip(0)),
        Images(images.pixels + 1, "made up", images.labels),
    ]
    assert len({samples.digest for samples in variants}) == len(variants)
    assert all(len(samples.digest) == 64 for samples in variants)
    assert Windows(ids.int(), "elsewhere").digest == windows.digest


def test_a_digest_never_changes():
    """Manifests and studies are compared by it."""
    assert Windows(torch.arange(4).view(2, 2), "").digest.startswith("3a274063b112")
    images = Images(torch.ones(1, 1, 1, 2), "", torch.tensor([3]))
    assert images.digest.startswith("0137ac80bc80")


def test_the_description_is_that_of_a_manifest_and_holds_no_data(windows, images):
    assert windows.describe() == {
        "source": "made up",
        "samples": 7,
        "sequence_length": 3,
        "tokens": 21,
        "digest": windows.digest,
        "note": "short",
    }
    assert list(images.describe()) == ["source", "samples", "image_shape", "digest", "note"]
    assert images.describe()["image_shape"] == [1, 2, 2] and images.tokens is None


def test_a_batch_is_placed_in_the_dtype_of_the_model(make_image_model):
    model = make_image_model("resnet").to(torch.bfloat16)
    batch = {"pixel_values": torch.zeros(1, 3, 16, 16), "labels": torch.tensor([1])}
    dtypes = {name: tensor.dtype for name, tensor in placed(batch, model).items()}
    assert dtypes == {"pixel_values": torch.bfloat16, "labels": torch.int64}


def test_a_model_that_cannot_read_the_samples_is_refused(tiny_llama_folder, make_image_model):
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    resnet = make_image_model("resnet")
    ids = torch.zeros(1, 129, dtype=torch.long)
    for model, samples, message in [
        (llama, Windows(ids, "text"), "at most 128 tokens at once, got windows of 129"),
        (llama, Windows(ids[:, :9] + 1000, "text"), "knows tokens 0 to .*, got token 1000 from te"),
        (llama, Images(torch.zeros(1, 3, 8, 8), "data"), "reads 'input_ids', got data, which are"),
        (resnet, Windows(ids, "text"), "reads 'pixel_values', got text, which is text"),
        (resnet, Images(torch.zeros(1, 1, 8, 8), "data"), "of 3 channels, got 1 from data"),
    ]:
        with pytest.raises(DataError, match=message):
            samples.check(model)
    Windows(ids[:, :9], "text").check(llama)
    Images(torch.zeros(1, 3, 8, 8), "data").check(resnet)
