"""The kind of samples that a model reads, with every option."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, ViTImageProcessorPil

from optimum_order.data import images as images_module
from optimum_order.data.load import load_evaluation, load_samples
from optimum_order.data.samples import Images, Windows
from optimum_order.errors import DataError, ModelError


@dataclasses.dataclass
class Reader:
    model: Any
    processor: Any = None
    processor_error: Any = None

    @property
    def config(self):
        return self.model.config

    @property
    def main_input_name(self):
        return self.model.main_input_name


@pytest.fixture(scope="module")
def language(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    return Reader(LlamaForCausalLM.from_pretrained(tiny_llama_folder), tokenizer)


@pytest.fixture(scope="module")
def vision(make_image_model):
    return Reader(
        make_image_model("resnet"), ViTImageProcessorPil(size={"height": 16, "width": 16})
    )


def test_the_main_input_decides(language, vision, prose):
    windows = load_samples(language, [prose], samples=3, length=16)
    assert isinstance(windows, Windows) and windows.ids.shape == (3, 16)
    images = load_samples(vision, "builtin", samples=3, length=16)
    assert isinstance(images, Images) and images.pixels.shape == (3, 3, 16, 16)
    assert images.labels is not None


def test_every_option_arrives(language, vision):
    permutation = torch.randperm(20, generator=torch.Generator().manual_seed(5)).tolist()
    for reader, source in [
        (language, torch.arange(20)[:, None].expand(20, 2)),
        (vision, torch.arange(20.0).view(20, 1, 1, 1)),
    ]:
        for purpose, order in [("calibration", permutation), ("evaluation", list(range(20)))]:
            samples = load_samples(reader, source, samples=6, length=2, seed=5, purpose=purpose)
            (tensor,) = samples.tensors.values()
            assert tensor[:, 0].flatten().tolist() == order[:6]


def test_an_evaluation_reads_some_windows_from_all_over_the_text(language, prose):
    whole = load_evaluation(language, [prose], length=32)
    assert (
        whole.digest
        == load_samples(language, [prose], samples=None, length=32, purpose="evaluation").digest
    )
    some = load_evaluation(language, [prose], length=32, samples=4)
    assert torch.equal(some.ids, whole.ids[[i * len(whole) // 4 for i in range(4)]])
    assert load_evaluation(language, [prose], length=32, samples=10**6).digest == whole.digest


def test_an_evaluation_decodes_only_the_images_it_takes(vision, monkeypatch):
    decoded = []
    upright = images_module._upright
    monkeypatch.setattr(images_module, "_upright", lambda i: decoded.append(i) or upright(i))
    some = load_evaluation(vision, "builtin", length=2, samples=5)
    assert len(some) == len(decoded) == 5


def test_a_processor_that_cannot_be_used_matters_only_where_it_is_needed(language, vision, prose):
    error = ModelError("The model has a 'tokenizer.json' that cannot be used")
    for reader, source, own in (
        (language, [prose], torch.arange(20)),
        (vision, "builtin", torch.rand(9, 3, 16, 16)),
    ):
        broken = Reader(reader.model, None, error)
        with pytest.raises(ModelError, match=r"'tokenizer\.json' that cannot be used"):
            load_samples(broken, source, samples=2, length=8)
        assert len(load_samples(broken, own, samples=2, length=8)) == 2
        with pytest.raises(DataError, match="there is none with the model"):
            load_samples(Reader(reader.model), source, samples=2, length=8)
