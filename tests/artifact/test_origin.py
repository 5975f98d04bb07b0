"""A compressed model is a starting point: masks and grids stay, and the record is a chain."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.compressed import CompressedModel
from optimum_order.errors import FormatError, ModelError
from optimum_order.testing import same

SMALL = {"calibration_samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def bfloat16(tiny_llama_folder, tmp_path_factory):
    """`tiny_llama_folder`, in the dtype in which most formats hold it."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path_factory.mktemp("bfloat16") / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def go_on(text_file):
    """`go_on(folder, order, to, format)`: compress a folder with data, save it; the result."""

    def run(folder, order, to, format="dense", **options):
        compressor = JointCompressor.from_pretrained(folder, calibration=str(text_file), **SMALL)
        compressed = compressor.compress(order, progress=False, **options)
        compressed.save_pretrained(to, format=format)
        assert verify(to) == []
        return compressed

    return run


@pytest.fixture(scope="module")
def pruned(go_on, bfloat16, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "dense"
    return folder, go_on(bfloat16, "wanda:0.5", folder, pause="block")


def test_a_pruned_model_is_quantized_as_in_one_run(go_on, bfloat16, pruned, tmp_path):
    folder, first = pruned
    second = go_on(folder, "gptq:4", tmp_path / "second", "sparse", pause="block")
    whole = go_on(bfloat16, "wanda:0.5 > gptq:4", tmp_path / "whole", "sparse", pause="block")
    assert second.sparsity == first.sparsity == 0.5
    for name, state in second.layers.items():
        assert torch.equal(state.pruned, first.layers[name].pruned)
        assert torch.equal(state.weight, whole.layers[name].weight)
    chain = manifest.load(tmp_path / "second")["continues"]
    before = manifest.load(folder)
    assert chain["order"] == "wanda:0.5" and chain["digest"] == before["digest"]
    assert chain["base_model"] == before["base_model"] and chain["continues"] is None
    third = go_on(tmp_path / "second", "magnitude:0.7", tmp_path / "third", "sparse")
    assert manifest.load(tmp_path / "third")["continues"]["continues"]["order"] == "wanda:0.5"
    for name, state in third.layers.items():
        assert state.bits == 4 and bool((state.pruned >= first.layers[name].pruned).all())


@pytest.mark.parametrize(
    "scheme", [("8, group_size=-1", "8"), ("4, group_size=32", "8"), ("fp8",) * 2]
)
def test_rounded_inputs_stay(go_on, bfloat16, tmp_path, scheme):
    """Also those of somebody else's folder, which has no manifest."""
    weights, inputs = scheme
    order = f"gptq(bits={weights}) > activations(bits={inputs}, per=tensor)"
    first = go_on(bfloat16, order, tmp_path / "first", "compressed-tensors")
    layers = manifest.load(tmp_path / "first")["layers"].values()
    (words,) = {layer["inputs"] for layer in layers}
    assert words.endswith(" per tensor")
    theirs = shutil.copytree(tmp_path / "first", tmp_path / "theirs")
    (theirs / manifest.FILE).unlink()
    ids = torch.arange(2, 26).view(2, 12)
    logits = []
    for folder, to in ((tmp_path / "first", "second"), (theirs, "third")):
        after = go_on(folder, "wanda:0.5", tmp_path / to, "compressed-tensors")
        for name, state in after.layers.items():
            assert same(state.inputs, first.layers[name].inputs) and state.sparsity == 0.5
        again = CompressedModel.from_pretrained(tmp_path / to).model
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        with torch.no_grad():
            logits += [model(input_ids=ids).logits for model in (after.model, again, stock)]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    with pytest.raises(FormatError, match="stores weights alone"):
        go_on(tmp_path / "first", "magnitude:0.5", tmp_path / "dense", "dense")
    with pytest.raises(FormatError, match="stores weights alone"):
        convert(tmp_path / "first", tmp_path / "sparse", "sparse")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "sparse"])
def test_a_quantized_model_is_pruned_on_its_grid(go_on, bfloat16, tmp_path, format):
    order = "rtn(bits=4, group_size=32)"
    first = go_on(bfloat16, order, tmp_path / "first", format)
    second = go_on(tmp_path / "first", "wanda:0.5", tmp_path / "second", format)
    theirs = shutil.copytree(tmp_path / "first", tmp_path / "theirs")
    (theirs / manifest.FILE).unlink()  # somebody else's folder has none
    config = json.loads((theirs / "config.json").read_text())
    del config["optimum_order"]
    (theirs / "config.json").write_text(json.dumps(config))
    third = go_on(theirs, "wanda:0.5", tmp_path / "third", format)
    for name, state in second.layers.items():
        assert torch.equal(state.weight, third.layers[name].weight)
        assert state.bits == 4 and state.sparsity == 0.5
        rest = ~state.pruned
        assert torch.equal(state.weight[rest], first.layers[name].weight[rest]), "same codes"


def test_what_a_format_did_not_store_is_refused_before_the_work(go_on, bfloat16, tmp_path):
    go_on(bfloat16, "wanda:0.5 > rtn:2", tmp_path / "dense", "dense")
    with pytest.raises(ModelError, match="2 bits and is stored as plain values"):
        go_on(tmp_path / "dense", "magnitude:0.7", tmp_path / "out")
    go_on(bfloat16, "wanda:0.5 > rtn:2", tmp_path / "packed", "compressed-tensors")
    with pytest.raises(ModelError, match="does not store which"):
        go_on(tmp_path / "packed", "magnitude:0.7", tmp_path / "out")


def test_what_cannot_be_gone_on_from_is_one_line(pruned, bfloat16, go_on, tmp_path):
    folder, _ = pruned
    with pytest.raises(ModelError, match="leave out dtype"):
        JointCompressor.from_pretrained(folder, dtype="float32")
    with pytest.raises(ModelError, match="leave out low_memory"):
        JointCompressor.from_pretrained(folder).compress(
            "rtn:4", work_dir=tmp_path / "work", low_memory=True, progress=False
        )
    with pytest.raises(ModelError, match=r"gptq\(bits=4, targets="):
        compressor = JointCompressor.from_pretrained(folder, targets=["*.mlp.*"])
        compressor.compress("rtn:4", progress=False)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="not what its manifest says"):
        JointCompressor.from_pretrained(damaged)
    foreign = shutil.copytree(bfloat16, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized with 'awq', which is none of"):
        JointCompressor.from_pretrained(foreign)


def test_it_is_estimated_planned_and_resumed_like_any_model(pruned, text_file, tmp_path):
    folder, _ = pruned
    compressor = JointCompressor.from_pretrained(folder, calibration=str(text_file), **SMALL)
    assert compressor.estimate("gptq:4").bytes > 0
    plan = compressor.plan(
        ["gptq:4", "magnitude:0.6"],
        evaluation=str(text_file),
        evaluation_samples=4,
        progress=False,
    )
    assert len(plan.ranking) == 2
    done = compressor.compress("gptq:4", work_dir=tmp_path / "work", progress=False)
    again = compressor.compress("gptq:4", work_dir=tmp_path / "work", resume=True, progress=False)
    assert again.sparsity == done.sparsity == 0.5
    for name, state in done.layers.items():
        assert torch.equal(state.weight, again.layers[name].weight)
