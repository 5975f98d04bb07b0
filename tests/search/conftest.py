"""Orders to rank on a tiny model of random weights, where fidelity tells them apart."""

import pytest

from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.search.plan import permutations
from optimum_order.search.strategies.base import Effort, Scoring, Task


@pytest.fixture(scope="session")
def search_compressor(make_compressor):
    """The tiny model with 8 calibration windows."""
    return make_compressor(calibration_samples=8)


@pytest.fixture(scope="session")
def scoring(search_compressor, text_file):
    """Fidelity on 128 windows, of which `auto` takes 16."""
    samples = search_compressor.evaluation_samples(str(text_file), 128)
    return Scoring(Fidelity(search_compressor.source.load()), samples)


@pytest.fixture
def make_task(search_compressor, scoring):
    """`make_task(stages, confidence=0.9)`: all orders of some stages, as a planner asks them."""

    def make(stages, scoring=scoring, **effort) -> Task:
        runner = search_compressor.runner(progress=False)
        orders = [runner.check(order) for order in permutations(stages)]
        return Task(runner, orders, scoring, Effort(calibration_samples=8, **effort))

    return make
