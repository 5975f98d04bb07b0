"""An estimate of a run: what it counts, and that it needs no weights and finds every error that a run would."""

import json
import shutil
import struct

import pytest

from optimum_order import JointCompressor
from optimum_order import estimate as estimate_module
from optimum_order.errors import DataError, FormatError, ModelError, OrderError
from optimum_order.files import weight_bytes

PRODUCTS = 2 * 64 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) * 6 * 24 // 64 + 4 * 24 * 24 * 64 * 6
"""Floating-point operations of all windows in one block of `tiny_llama_folder`."""


def test_a_walk_runs_every_block_twice_and_the_last_once(compressor):
    step, second = compressor.estimate("sparsegpt:0.5 > gptq:4", pause="block").steps
    assert step.stages == "sparsegpt:0.5" and second.stages == "gptq:4"
    assert step.forward == second.forward == 3 * PRODUCTS
    # qkv, o, gate and up, and down read something different each
    assert step.gram == 2 * 2 * 6 * 24 * (3 * 64**2 + 128**2)
    assert step.tokens == 6 * 24


def test_a_schedule_of_blocks_is_one_walk(compressor):
    (step,) = compressor.estimate("wanda:0.5 > gptq:4", "block", pause="block").steps
    assert step.stages == "wanda:0.5 > gptq:4"
    assert step.forward == 3 * PRODUCTS


def test_groups_need_one_forward_and_all_activations_at_once(compressor, monkeypatch):
    monkeypatch.setattr(estimate_module, "resident", lambda: 1000)  # three processes of one size
    (block,) = compressor.estimate("gptq:4", pause="block").steps
    estimate = compressor.estimate("gptq:4", pause="group")
    (group,) = estimate.steps
    assert estimate.as_dict()["pause"] == "group"
    (plain,) = compressor.estimate("gptq(bits=4, drift=0)", pause="group").steps
    assert (block.forward, plain.forward) == (3 * PRODUCTS, 2 * PRODUCTS)
    assert plain.gram == block.gram
    assert plain.memory > block.memory
    assert (group.forward, group.gram) == (4 * PRODUCTS, 3 * block.gram)  # of the model as it was
    assert group.memory > plain.memory and group.bytes == block.bytes


def test_methods_that_need_no_data_see_none(tiny_llama_folder):
    shaped = JointCompressor.from_pretrained(tiny_llama_folder, device="cpu")
    step, _ = shaped.estimate("magnitude:0.5 > rtn:4").steps
    assert (step.tokens, step.forward, step.gram) == (0, 0, 0)
    assert step.seconds > 0


def test_only_norms_need_no_products(compressor):
    (step,) = compressor.estimate("wanda:0.5").steps
    assert step.gram == 0 < step.forward


def test_an_allocator_measures_first(compressor):
    first, second = compressor.estimate("mixed_precision(bits=4, quantizer=rtn)").steps
    assert first.stages.endswith("measuring")
    # a walk, and the outputs of each of 4 groups with each of 5 widths and of the block as it is, on its one batch
    assert first.forward == 3 * PRODUCTS + 2 * 21 * PRODUCTS
    assert second.bytes < first.bytes and second.format == "compressed-tensors"


def test_a_look_at_all_layers_sees_some_samples(tiny_llama_folder, ids):
    shaped = JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=ids.repeat(2, 1), sequence_length=24, device="cpu"
    )
    look, step = shaped.estimate("ecsq:3").steps
    assert look.stages == "ecsq:3.0: profiling"
    assert (look.tokens, step.tokens) == (8 * 24, 12 * 24)
    assert look.forward > 0 and look.bytes > step.bytes


def test_totals(compressor):
    result = compressor.estimate("wanda:0.5 > gptq:4").as_dict()
    assert json.loads(json.dumps(result)) == result
    steps, total = result["steps"], result["total"]
    assert total["seconds"] == pytest.approx(
        result["loading"] + sum(step["seconds"] for step in steps)
    )
    assert total["memory"] == max(step["memory"] for step in steps)
    assert (total["bytes"], total["exact"], total["tokens"]) == (steps[-1]["bytes"], True, 6 * 24)
    assert result["format"] == "compressed-tensors"


def test_no_weight_is_read(tiny_llama_folder, compressor, ids, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    file = folder / "model.safetensors"
    held = file.read_bytes()
    (length,) = struct.unpack("<Q", held[:8])
    file.write_bytes(
        held[: 8 + length] + bytes([255]) * (len(held) - 8 - length)
    )  # every weight a NaN
    shaped = JointCompressor.from_pretrained(
        folder, calibration=ids, sequence_length=24, device="cpu"
    )
    assert shaped.estimate("gptq:4").bytes == compressor.estimate("gptq:4").bytes
    with pytest.raises(ModelError, match="NaN"):
        shaped.compress("gptq:4", progress=False)


@pytest.mark.parametrize("order", ["wanda:0.5", "sparsegpt(pattern=2:4) > gptq:4"])
def test_bytes_are_those_of_the_run(compressor, order, tmp_path):
    compressor.compress(order, progress=False).save_pretrained(tmp_path / "out")
    assert compressor.estimate(order).bytes == weight_bytes(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "order", "options", "words"),
    [
        (OrderError, "wandda:0.5", {}, "Did you mean 'wanda'"),
        (OrderError, "gptq(bits=4, group_size=48)", {}, "does not divide"),
        (OrderError, "gptq:4", {"schedule": "blocks"}, "Unknown schedule"),
        (FormatError, "gptq:4", {"format": "bitsandbytes"}, "cannot hold"),
        (FormatError, "gptq:4", {"format": "zip"}, "Unknown format"),
    ],
)
def test_errors_are_those_of_a_run(compressor, error, order, options, words):
    with pytest.raises(error, match=words):
        compressor.estimate(order, **options)


def test_only_the_end_must_fit_the_format(compressor):
    first, second = compressor.estimate("wanda:0.5 > rtn:4", format="compressed-tensors").steps
    assert (first.format, second.format) == ("dense", "compressed-tensors")


def test_missing_data_is_an_error(tiny_llama_folder):
    with pytest.raises(DataError, match="needs calibration data"):
        JointCompressor.from_pretrained(tiny_llama_folder, device="cpu").estimate("gptq:4")


def test_images():
    pytest.importorskip("sklearn")
    shaped = JointCompressor.from_pretrained(
        "tiny-resnet", calibration="builtin", calibration_samples=8, device="cpu"
    )
    result = shaped.estimate("gptq:4")
    assert result.steps[0].forward > 0 and result.steps[0].gram > 0
