"""Everything that a user does, on a GPU: run where one is, with `pytest -m gpu`."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.models.source import InMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = {"calibration_samples": 8, "sequence_length": 64}
ORDERS = {
    "wanda:0.5 > gptq:4": "compressed-tensors",
    "sparsegpt:0.5 > rtn:4": "sparse",
    "magnitude:0.5": "dense",
    "gptq(bits=4, group_size=32)": "gptq",
    "mixed_precision:4": "compressed-tensors",
    "ecsq:3": "coded",
    "ecsq(rate=3, sensitivity=none)": "coded",
    "bitsandbytes:nf4": "bitsandbytes",
    "bitsandbytes:int8": "bitsandbytes",
}

OTHERS = [
    "alps:0.5 > gptq:4",
    "sparsegpt(sparsity=0.5, allocation=owl)",
    "wanda(sparsity=0.5, allocation=global)",
    "rotate > gptq:4",
    "equalize > rtn:4",
    "width:0.25 > gptq:4",
    "gptq:4 > width:0.25",
    "heads:0.5 > gptq:4",
    "depth:1 > gptq:4",
    "gptq:3 > refit",
    "wanda:0.5 > gptq:3 > distill(steps=4)",
    "gptq:3 > eora",
    "gptq:3 > lora(steps=4)",
    "activations > gptq:4",
    "wanda:0.5 > ecsq:3",
]
"""Orders in a format that is chosen, compressed with a pause at blocks alone."""


@pytest.fixture(scope="module")
def compressors(text_file):
    """The same settings on the GPU and on the CPU, in bfloat16."""
    settings = {"calibration": str(text_file), "dtype": "bfloat16", **SMALL}
    return {
        device: JointCompressor.from_pretrained("tiny-llama", device=device, **settings)
        for device in ("cuda", "cpu")
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pause", ["block", "group"])
def test_a_model_is_compressed_measured_and_saved_as_on_the_cpu(
    compressors, text_file, tmp_path, order, pause
):
    losses = {}
    for device, compressor in compressors.items():
        compressed = compressor.compress(order, pause=pause, progress=False)
        format = ORDERS[order]
        measured = compressed.evaluate(str(text_file), format=format, progress=False)
        losses[device] = measured.performance
        compressed.save_pretrained(tmp_path / device, format=format)
        assert verify(tmp_path / device) == []
        again = compressed.evaluate(str(text_file), format=format, progress=False)
        assert again.performance == pytest.approx(measured.performance, abs=1e-4)
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.05)


@pytest.mark.parametrize("order", OTHERS)
def test_every_kind_of_stage_gives_the_same_as_on_the_cpu(compressors, text_file, tmp_path, order):
    losses = {}
    for device, compressor in compressors.items():
        compressed = compressor.compress(order, pause="block", progress=False)
        losses[device] = compressed.evaluate(str(text_file), progress=False).performance
        compressed.save_pretrained(tmp_path / device)
        assert verify(tmp_path / device) == []
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.05)


def test_a_schedule_of_blocks_low_memory_and_a_resumed_run_give_the_same(compressors, tmp_path):
    compressor = compressors["cuda"]
    order = "wanda:0.5 > gptq:4"
    options = {"schedule": "block", "pause": "block", "progress": False}
    whole = compressor.compress(order, **options)
    for number, low_memory in enumerate((False, True)):
        work = tmp_path / str(number)
        compressed = compressor.compress(order, work_dir=work, low_memory=low_memory, **options)
        for name, state in whole.layers.items():
            assert torch.equal(state.weight.cpu(), compressed.layers[name].weight.cpu())
        compressed.close()
        resumed = compressor.compress(
            order, work_dir=work, resume=True, low_memory=low_memory, **options
        )
        resumed.save_pretrained(tmp_path / f"saved-{number}")
        assert verify(tmp_path / f"saved-{number}") == []
        resumed.close()


def test_orders_are_planned_and_studied(compressors, text_file, tmp_path):
    compressor = compressors["cuda"]
    data = {"evaluation": str(text_file), "evaluation_samples": 8, "progress": False}
    plan = compressor.plan(["wanda:0.5", "gptq:3"], **data)
    assert len(plan.ranking) == 2
    summary = compressor.study(
        ["wanda:0.5 > gptq:3", "gptq:3 > wanda:0.5"], tmp_path, draws=1, **data
    )
    assert not summary["trials"]["missing"] and not summary["trials"]["failed"]


def test_a_model_on_the_gpu_is_taken_and_stays_there(text_file):
    source = JointCompressor.from_pretrained("tiny-vit").source
    model = source.load().to("cuda")
    compressor = JointCompressor(
        model, source.processor, calibration="builtin", calibration_samples=8, device="cuda"
    )
    compressed = compressor.compress("wanda:0.5 > gptq:4", progress=False)
    assert compressed.sparsity == 0.5
    assert compressed.evaluate("builtin", progress=False).value > 0.5
    assert next(model.parameters()).device.type == "cuda"
    assert next(InMemory.of(model).load().parameters()).device.type == "cpu"
