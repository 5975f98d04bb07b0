"""A small model with calibration text and text to measure it on, for studies that take seconds."""

import functools
import math
import statistics

import pytest

from optimum_order import JointCompressor
from optimum_order.study.study import Trials


@pytest.fixture(scope="session")
def make_compressor(tiny_llama_folder, text_file):
    """`make_compressor(calibration_samples=4)`: for `tiny_llama_folder`, with windows of 32 tokens."""

    def make(**changes) -> JointCompressor:
        options = {
            "calibration": str(text_file),
            "calibration_samples": 4,
            "sequence_length": 32,
            "device": "cpu",
        }
        return JointCompressor.from_pretrained(tiny_llama_folder, **options | changes)

    return make


@pytest.fixture
def make_trials(store_trials, tmp_path):
    """`store_trials` in a folder of the test's own."""
    return functools.partial(store_trials, tmp_path / "trials")


@pytest.fixture(scope="session")
def store_trials():
    """`store_trials(folder, {"wanda:0.5": [[-3.0, -3.2], ...]})`: performances, (draws, samples) for each order.

    A list of numbers instead of rows is one draw. `more` adds to the row of an order, `pairs` and `planned` fill the
    other tables.
    """

    def make(folder, performances, *, more=None, pairs=None, planned=(), **settings) -> Trials:
        evaluation = {"source": "held-out.txt", "samples": 2, "digest": "0" * 64}
        about = {
            "model": "made-up",
            "layers": ["a", "b"],
            "metric": "perplexity",
            "evaluation": evaluation,
        }
        trials = Trials(folder, about | settings)
        for order, draws in performances.items():
            for draw, values in enumerate(
                draws if isinstance(draws[0], (list, type(None))) else [draws]
            ):
                if values is not None:
                    row = {
                        "performance": statistics.fmean(values),
                        "performances": list(values),
                        "value": math.exp(-statistics.fmean(values)),
                        "stages": order.split(" > "),
                        "seconds": [1.0] * order.count(":"),
                    }
                    trials.add({("trials", order, draw): row | (more or {}).get(order, {})})
        for (orders, draw), layers in (pairs or {}).items():
            trials.add({("pairs", orders, draw): layers})
        trials.plan(planned)
        return trials

    return make
