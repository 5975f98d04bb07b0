"""What a worker says of a trial: rows that another can store, and that agree with a run by hand."""

import json

import pytest

from optimum_order import JointCompressor
from optimum_order.order import Order
from optimum_order.study.worker import Task, Worker, reverse

FIRST = Order.parse("wanda:0.5 > rtn:4")


@pytest.fixture(scope="module")
def compressor(tiny_llama_folder, text_file):
    return JointCompressor.from_pretrained(
        tiny_llama_folder,
        calibration=str(text_file),
        calibration_samples=2,
        sequence_length=16,
        device="cpu",
    )


@pytest.fixture
def worker(compressor):
    runner = compressor.runner(progress=False)
    samples = compressor.draw(1)
    return Worker(runner, compressor.metric(runner.model, "perplexity"), samples)


def test_both_orders_of_a_pair_are_rows_and_are_compared_once(worker):
    rows = worker.run(Task((FIRST, reverse(FIRST)), 0))
    assert {(table, order) for table, order, _ in rows} == {
        ("trials", str(FIRST)),
        ("trials", str(reverse(FIRST))),
        ("pairs", f"{FIRST} | {reverse(FIRST)}"),
    }
    assert json.loads(json.dumps(list(rows.values()), allow_nan=False))
    row = rows["trials", str(FIRST), 0]
    assert row["stages"] == [str(stage) for stage in FIRST]
    assert 0.45 < row["sparsity"] < 0.55 and row["bits"] == 4
    assert set(row["bytes"]) >= {"sparse"} and min(row["layer_errors"].values()) > 0


def test_a_row_is_what_a_run_by_hand_measures(worker, compressor):
    row = worker.run(Task((FIRST,), 0))["trials", str(FIRST), 0]
    model = compressor.compress(FIRST, pause="block", progress=False)  # as a runner pauses
    by_hand = worker.metric.measure(model.model, worker.samples, progress=False)
    assert row["performances"] == pytest.approx(by_hand.performances.tolist(), rel=1e-5)
    assert worker.original()["performance"] != row["performance"]
