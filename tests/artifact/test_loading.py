"""A compressed folder becomes an ordinary model and the states of its layers, or one error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.artifact.loading import format_of, load
from optimum_order.errors import ArtifactError
from optimum_order.models.source import read_config


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    """A model in bfloat16 on grids of 4 bits, packed. Do not write into it."""
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, dtype="bfloat16")
    compressed = compressor.compress("rtn(bits=4, group_size=32)", progress=False)
    out = tmp_path_factory.mktemp("loading") / "out"
    compressed.save_pretrained(out, format="compressed-tensors")
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_ours_and_the_same_files_without_a_manifest_are_one_model(folder):
    ours, theirs = load(folder, manifest.load(folder)), load(folder, None)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for loaded in (ours, theirs):
        assert not loaded.model.training and not loaded.unloaded
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert {layer.bits for layer in loaded.layers.states.values()} == {4}
    assert set(ours.layers.states) == set(theirs.layers.states)
    assert format_of(folder) == "compressed-tensors"
    assert not hasattr(read_config(folder), "quantization_config")


def test_a_tensor_that_the_model_does_not_load_is_handed_over(copy):
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"v_head.bias": torch.ones(3)}, copy / "model.safetensors")
    loaded = load(copy, None)
    assert loaded.unloaded.keys() == {"v_head.bias"}


def test_what_does_not_fill_the_model_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(lacking, copy / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks 'model\.norm\.weight'"):
        load(copy, None)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ArtifactError, match="which LlamaForCausalLM has not"):
        load(copy, None)
    config["quantization_config"] = {"quant_method": "awq"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="'awq', which is none of"):
        load(copy, None)
