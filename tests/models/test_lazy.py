"""A model filled block by block is that of `from_pretrained`, in the memory of a block."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_order.errors import ModelError
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.lazy import planned
from optimum_order.models.source import EMBEDDED, Checkpoint, weights_digest
from optimum_order.models.units import find_units

CASES = [
    ("albert", "float32", "auto"),
    ("bert", "float32", "float16"),
    ("gemma", "bfloat16", "auto"),
    ("gpt2", "float32", "bfloat16"),
    ("gpt_neox", "float16", "auto"),
    ("gpt_oss", "bfloat16", "auto"),
    ("llama", "bfloat16", "float32"),
    ("mixtral", "bfloat16", "float16"),
    ("opt", "float16", "auto"),
    ("qwen3_moe", "float32", "auto"),
]


def open_checkpoint(folder, dtype="auto"):
    return Checkpoint(folder, revision=None, token=None, dtype=dtype, trust_remote_code=False)


def same(one, other):
    """Equal bit for bit, -0.0 and all."""
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(a, b)


def edit(folder, change):
    """Change the tensors of an unsharded checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_equal(checkpoint):
    """Everything about a filled model is as in the ordinary one."""
    model, weights = checkpoint.load(), checkpoint.load_empty()
    empty = weights.model
    assert type(empty) is type(model) and not empty.training
    assert empty.config.to_dict() == model.config.to_dict()
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(same(buffers[name], buffer) for name, buffer in model.named_buffers())
    state = model.state_dict()
    assert list(weights) == list(state) and len(weights) == len(state)
    assert all(same(weights[name], tensor) for name, tensor in state.items())
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert weights_digest(weights) == weights_digest(model)

    objects = {
        name: id(parameter) for name, parameter in empty.named_parameters(remove_duplicate=False)
    }
    units, targets = (
        find_units(empty),
        {t.name: t for unit in find_units(model) for t in unit.targets},
    )
    assert [target.name for unit in units for target in unit.targets] == list(targets)
    with torch.inference_mode():  # as in a walk
        for unit in units:
            names = weights.within(unit.name)
            weights.materialize(names)
            assert names and all(same(empty.get_parameter(name), state[name]) for name in names)
            assert all(same(target.view, targets[target.name].view) for target in unit.targets)
            weights.release(names)
            assert all(parameter.is_meta for parameter in empty.parameters())
    weights.materialize(state)
    assert objects == {
        name: id(parameter) for name, parameter in empty.named_parameters(remove_duplicate=False)
    }
    assert all(
        same(parameter, model.get_parameter(name))
        for name, parameter in empty.named_parameters(remove_duplicate=False)
    )
    assert [name for name, _ in empty.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    assert not any(parameter.is_inference() for parameter in empty.parameters())
    return weights


@torch.no_grad()
def test_a_filled_model_is_the_model(make_model, batches, tmp_path):
    for architecture, stored, dtype in CASES:
        folder = tmp_path / architecture
        model = make_model(architecture).to(getattr(torch, stored))
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        weights = check_equal(open_checkpoint(folder, dtype))
        model = open_checkpoint(folder, dtype).load()
        assert torch.equal(weights.model(**batches[0])[0], model(**batches[0])[0])


def test_so_is_a_filled_image_classifier(make_image_model, tmp_path):
    for architecture in ("convnext", "deit", "regnet", "resnet", "swin"):
        make_image_model(architecture).save_pretrained(tmp_path / architecture)
        check_equal(open_checkpoint(tmp_path / architecture))


def test_so_is_an_embedded_model():
    for name in EMBEDDED:
        check_equal(open_checkpoint(name))


def test_saving_undoes_what_loading_did(make_model, tmp_path):
    """transformers remembers on the model how it read the checkpoint, and writes it back so."""
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "one")
    weights = open_checkpoint(tmp_path / "one").load_empty()
    weights.materialize(weights)
    weights.model.save_pretrained(tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def test_names_without_the_models_own_prefix(make_model, tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit(tmp_path, strip)
    weights = check_equal(open_checkpoint(tmp_path))
    assert same(weights["transformer.wte.weight"], model.transformer.wte.weight)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def head_only(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def both(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def two(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1


@pytest.mark.parametrize(("stored", "tied"), [(head_only, True), (both, True), (two, False)])
def test_ties_are_those_that_transformers_makes(make_model, stored, tied, tmp_path):
    make_model("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, stored)
    model = check_equal(open_checkpoint(tmp_path)).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert bool(model.all_tied_weights_keys) == tied


def test_what_a_walk_needs_outside_the_blocks(make_model, tmp_path):
    for tie in (False, True):
        make_model("llama", tie_word_embeddings=tie).save_pretrained(tmp_path)
        weights = open_checkpoint(tmp_path).load_empty()
        units = find_units(weights.model)
        expected = ["model.embed_tokens.weight", "model.norm.weight"] + (
            ["lm_head.weight"] if tie else []
        )
        assert weights.outside(units) == expected
        assert (
            "lm_head.weight" in weights.outside(find_units(weights.model, ["*up_proj"]))[-1:]
            or not tie
        )
    weights.model.model.layers[0].mlp = weights.model.model.layers[1].mlp
    shared = open_checkpoint(tmp_path).load_empty()
    shared._parameters["model.layers.0.mlp.up_proj.weight"] = shared._parameters[
        "model.layers.1.mlp.up_proj.weight"
    ]
    with pytest.raises(ModelError, match="shared between blocks"):
        shared.outside(units)


def test_weights_that_are_written_are_lost_with_the_block(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    weights = open_checkpoint(tmp_path).load_empty()
    target = find_units(weights.model)[0].targets[0]
    with pytest.raises(KeyError):
        weights["model.layers.7.mlp.up_proj.weight"]
    names = [f"{target.name}.weight"]
    weights.materialize(names)
    target.write(torch.zeros_like(target.view))
    weights.materialize(names)
    assert not target.view.any()
    weights.release(names)
    weights.release(names)
    weights.materialize(names)
    assert same(target.view, weights[names[0]])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_overlaid_tensors_are_those_of_a_compressed_model(make_model, architecture, tmp_path):
    make_model(architecture).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    weights, model = checkpoint.load_empty(), checkpoint.load()
    targets = {target.name: target for unit in find_units(model) for target in unit.targets[::2]}
    states = {name: LayerState(target.read().neg()) for name, target in targets.items()}
    for name, target in targets.items():
        target.write(states[name].weight)
    empty = {
        target.name: target for unit in find_units(weights.model) for target in unit.targets[::2]
    }
    overlaid = weights.overlaid(empty, states)
    state = model.state_dict()
    assert list(overlaid) == list(state) and len(overlaid) == len(state)
    assert all(same(overlaid[name], tensor) for name, tensor in state.items())
    assert all(
        same(weights[name], tensor) for name, tensor in checkpoint.load().state_dict().items()
    )


def test_a_checkpoint_that_does_not_fit_is_refused_as_in_an_ordinary_load(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(match, change):
        edit(tmp_path, change)
        for load in (open_checkpoint(tmp_path).load, open_checkpoint(tmp_path).load_empty):
            with pytest.raises(ModelError, match=match):
                load()
        (tmp_path / "model.safetensors").write_bytes(whole)

    refused(r"up_proj.*would be random", lambda tensors: tensors.pop(name))
    refused(
        "Cannot load the weights",
        lambda tensors: tensors.update({name: tensors[name][:-1].clone()}),
    )
    refused("Cannot load the weights", lambda tensors: tensors.update({name: torch.zeros(1)}))
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for load in (open_checkpoint(tmp_path).load, open_checkpoint(tmp_path).load_empty):
        with pytest.raises(ModelError, match=r"Cannot load the weights|cannot be read"):
            load()


def test_a_checkpoint_that_changes_meanwhile_is_an_error(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    weights = open_checkpoint(tmp_path).load_empty()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' cannot be read"):
        weights["model.layers.1.mlp.up_proj.weight"]


def test_what_cannot_be_followed_is_refused(make_model, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(hf.CheckpointNames, "destination", lambda self, key: None)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be followed a block at a time"):
        open_checkpoint(tmp_path).load_empty()
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_auto_class", "AutoModelForCausalLM")
    with pytest.raises(ModelError, match="LlamaForCausalLM comes with code of its own"):
        open_checkpoint(tmp_path).load_empty()


def test_loading_is_ordinary_again_afterwards(make_model, tmp_path):
    with pytest.raises(RuntimeError), planned():
        raise RuntimeError
    make_model("llama").save_pretrained(tmp_path)
    open_checkpoint(tmp_path).load_empty()
    assert not any(parameter.is_meta for parameter in open_checkpoint(tmp_path).load().parameters())


CHILD = """
import resource, sys
from optimum_order.models.source import Checkpoint, weights_digest
from optimum_order.models.units import find_units

def memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

first, *checkpoints = [
    Checkpoint(name, revision=None, token=None, dtype="auto", trust_remote_code=False)
    for name in ["tiny-llama", *sys.argv[1:]]
]
first.load_empty()  # what is imported on the way is not what is measured
limit = memory() + 32 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for checkpoint in checkpoints:
    weights = checkpoint.load_empty()
    units = find_units(weights.model)
    weights.materialize(weights.outside(units))
    for unit in units:
        weights.materialize(weights.within(unit.name))
        assert all(target.view.any() for target in unit.targets)
        weights.release(weights.within(unit.name))
    weights.release(weights)
    print(weights_digest(weights), flush=True)
checkpoint.load()
print("the ordinary load fits as well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_block_at_a_time_takes_a_block_of_memory_from_a_folder_or_the_hubs_cache(
    large_llama, tmp_path
):
    """100 MB of weights where 32 MB may be taken, which the ordinary load cannot do."""
    model, folder = large_llama
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 100_000_000
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--large"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder)
    command = [sys.executable, "-c", CHILD, str(folder), "me/large"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
    )
    assert done.stdout.split() == [weights_digest(model)] * 2, done.stderr
    assert done.returncode != 0


def test_another_thread_loads_its_own_model_meanwhile(tiny_llama_folder):
    expected = transformers.LlamaForCausalLM.from_pretrained(tiny_llama_folder).state_dict()
    loaded = {}

    def load():
        loaded.update(transformers.LlamaForCausalLM.from_pretrained(tiny_llama_folder).state_dict())

    with planned() as plan:
        other = threading.Thread(target=load)
        other.start()
        other.join()
        ours = transformers.LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    assert plan.sources and all(parameter.is_meta for parameter in ours.parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
