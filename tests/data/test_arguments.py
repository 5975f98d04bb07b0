"""Arguments of a forward, in memory and in a file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BatchEncoding, LlamaForCausalLM

from optimum_order.data.arguments import Arguments, is_source, load
from optimum_order.errors import DataError


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 64, (6, 8), generator=generator),
        "pixel_values": torch.rand(6, 3, 4, 4, generator=generator),
    }


def test_every_source_gives_the_same_samples(tensors, tmp_path):
    save_file(tensors, tmp_path / "inputs.safetensors")
    digests = set()
    for source, name in (
        (tensors, "arguments in memory"),
        (BatchEncoding(tensors), "arguments in memory"),
        ({key: value.numpy() for key, value in tensors.items()}, "arguments in memory"),
        ({key: value.tolist() for key, value in tensors.items()}, "arguments in memory"),
        (tmp_path / "inputs.safetensors", "inputs.safetensors"),
        (str(tmp_path / "inputs.safetensors"), "inputs.safetensors"),
    ):
        assert is_source(source)
        loaded = load(source, samples=None, purpose="evaluation")
        assert loaded.source == name and len(loaded) == 6
        assert torch.equal(loaded.tensors["input_ids"], tensors["input_ids"])
        digests.add(loaded.digest)
    assert len(digests) == 1
    assert not any(is_source(source) for source in ("a.txt", [tensors], tensors["input_ids"]))


def test_calibration_draws_and_evaluation_takes_the_first(tensors):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))[:2]
    drawn = load(tensors, samples=2, seed=3)
    for name, tensor in tensors.items():
        assert torch.equal(drawn.tensors[name], tensor[order])
    first = load(tensors, samples=2, seed=3, purpose="evaluation")
    assert torch.equal(first.tensors["input_ids"], tensors["input_ids"][:2])
    assert load(tensors, samples=9).note == "arguments in memory has 6 samples, 9 were asked for"


def test_batches_and_description(tensors):
    samples = load(tensors | {"labels": torch.arange(6)}, samples=None)
    (batch,) = samples.inputs()
    assert set(batch) == {"input_ids", "pixel_values"}
    assert samples.describe()["arguments"] == {
        "input_ids": [8],
        "labels": [],
        "pixel_values": [3, 4, 4],
    }
    long = Arguments({"input_ids": torch.zeros(9, 512, dtype=torch.long)}, "made up")
    assert long.batch_size == 4
    assert Arguments({"x": torch.zeros(99, 1)}, "made up").batch_size == 64


def test_what_is_no_argument_is_one_line(tensors, tmp_path, tiny_llama_folder):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 99)
    for source, message in (
        ({}, "as many rows as there are samples, got nothing"),
        (tensors | {"mask": torch.ones(5)}, "got input_ids: 6, pixel_values: 6, mask: 5"),
        ({"input_ids": torch.zeros(0, 4)}, "input_ids: 0"),
        ({"input_ids": "text"}, "'input_ids' of arguments in memory must be a tensor"),
        ({"input_ids": [[1, 2], [3]]}, "must be a tensor with one row"),
        ({"input_ids": torch.tensor(3)}, "must be a tensor with one row"),
        (tmp_path / "a.safetensors", "'a.safetensors' is not a .safetensors file"),
        (tmp_path / "b.safetensors", "b.safetensors' does not exist"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load(source, samples=None)
        assert "\n" not in str(error.value)
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    with pytest.raises(
        DataError, match="LlamaForCausalLM takes no 'pixel_values', which is in arg"
    ):
        load(tensors, samples=None).check(llama)
    ids = {"input_ids": np.full((2, 4), 1000)}
    with pytest.raises(DataError, match="knows tokens 0 to .*, got token 1000 from arguments in m"):
        load(ids, samples=None).check(llama)
