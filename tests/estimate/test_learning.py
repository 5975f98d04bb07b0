"""What a recovery that learns would take: its steps, its copies of the model, and its adapters."""

import pytest

from optimum_order import estimate as estimate_module
from optimum_order.backends.base import Recovery
from optimum_order.backends.distill import Distill
from optimum_order.errors import OrderError
from optimum_order.estimate.rates import Rates


def test_a_step_that_learns_runs_two_models_and_a_backward_pass(compressor, monkeypatch):
    monkeypatch.setattr(estimate_module, "resident", lambda: 1000)
    monkeypatch.setattr(estimate_module.rates, "measure", lambda *_: Rates(*[1e9] * 6))
    few, many = (
        compressor.estimate(f"rtn:3 > distill(steps={steps}, batch_size=2)").steps[-1]
        for steps in (10, 20)
    )
    vocabulary = 384
    # a walk goes through the first of two blocks twice, and once through the last
    blocks = 2 * compressor.estimate("wanda:0.5", pause="block").steps[0].forward / 3
    head = 2 * vocabulary * 64 * 6 * 24
    # of a step: the original, the copy, its blocks again, and two products for one backward
    step = (5 * blocks + 4 * head) * 2 / 6
    looked = 10 * (2 * blocks + 2 * head) * 2 / 6
    assert many.forward - few.forward == pytest.approx(10 * step)
    assert few.forward == pytest.approx(10 * step + looked + looked / 10)
    assert many.seconds > 1.5 * few.seconds
    assert few.tokens == 6 * 24
    numbers = compressor.source.bytes // 4
    assert few.low_memory == few.memory > compressor.source.bytes + 8 * numbers


def test_a_larger_batch_takes_more_memory(compressor, monkeypatch):
    monkeypatch.setattr(estimate_module, "resident", lambda: 1000)
    one, two = (
        compressor.estimate(f"distill(steps=10, batch_size={size})").memory for size in (1, 2)
    )
    assert one < two


def test_an_adapter_is_counted(compressor, tmp_path):
    order = "rtn:2 > lora(steps=20, rank=4, rate=0.01)"
    compressor.compress(order, progress=False).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter").is_dir()
    files = (tmp_path / "out").rglob("*.safetensors")
    assert compressor.estimate(order).bytes == sum(file.stat().st_size for file in files)


def test_a_recovery_of_unknown_steps_is_refused(compressor, monkeypatch):
    monkeypatch.setattr(Distill, "workload", Recovery.workload)
    with pytest.raises(
        OrderError, match="'distill:10' cannot be estimated: the method distill states no workload"
    ):
        compressor.estimate("rtn:3 > distill:10")
