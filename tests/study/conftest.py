"""Hand-made trials with figures that are known, and small studies of a tiny model."""

import functools
import itertools
import json
import math
import statistics

import pytest

from optimum_order.study.analysis import summarize
from optimum_order.study.run import Study
from optimum_order.study.trials import Trials


@pytest.fixture
def make_trials(store_trials, tmp_path):
    """`store_trials` in a folder of the test's own."""
    return functools.partial(store_trials, tmp_path / "trials")


@pytest.fixture
def make_summary(store_trials, tmp_path):
    """The summary of trials as `store_trials` makes them; it must be JSON."""
    numbers = itertools.count()

    def make(*arguments, **options):
        folder = tmp_path / f"summarized-{next(numbers)}"
        summary = summarize(store_trials(folder, *arguments, **options))
        assert json.loads(json.dumps(summary, allow_nan=False))
        return summary

    return make


@pytest.fixture(scope="session")
def store_trials():
    """`store_trials(folder, {"wanda:0.5": [[-3.0, -3.2], ...]})`: store made-up performances.

    The performances of an order are (draws, samples), or (samples,) for one draw. `more` adds to
    the row of an order; `pairs` and `planned` fill the other tables.
    """

    def store(folder, performances, *, more=None, pairs=None, planned=(), **settings) -> Trials:
        evaluation = {"source": "held-out.txt", "samples": 2, "digest": "0" * 64}
        defaults = {
            "model": "made-up",
            "layers": ["a", "b"],
            "metric": "perplexity",
            "evaluation": evaluation,
        }
        trials = Trials(folder, defaults | settings)
        rows = {}
        for order, draws in performances.items():
            if not isinstance(draws[0], (list, type(None))):
                draws = [draws]
            for draw, values in enumerate(draws):
                if values is not None:
                    row = {
                        "performance": statistics.fmean(values),
                        "performances": list(values),
                        "value": math.exp(-statistics.fmean(values)),
                        "stages": order.split(" > "),
                        "seconds": [1.0] * order.count(":"),
                    }
                    rows["trials", order, draw] = row | (more or {}).get(order, {})
        for (orders, draw), layers in (pairs or {}).items():
            rows["pairs", orders, draw] = layers
        trials.add(rows)
        trials.plan(planned)
        return trials

    return store


@pytest.fixture(scope="session")
def make_study(make_compressor, text_file):
    """`make_study(folder)`: the tiny model, two calibration windows, four samples."""

    def make(folder, samples=4, settings=None, **changes) -> Study:
        compressor = make_compressor(**{"calibration_samples": 2} | changes)
        runner = compressor.runner(progress=False)
        metric = compressor.metric(runner.model, "auto")
        return Study(
            runner, metric, compressor.evaluation_samples(str(text_file), samples), folder, settings
        )

    return make


@pytest.fixture(scope="session")
def read_rows():
    """`read_rows(folder, table)`: what trials measured, without how long they took."""

    def read(folder, table="trials"):
        timed = {"seconds", "cpu_seconds", "measure_seconds", "measure_cpu_seconds"}
        return {
            key: {name: value for name, value in row.items() if name not in timed}
            for key, row in Trials.open(folder).rows(table).items()
        }

    return read
