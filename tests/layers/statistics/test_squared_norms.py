import torch

from optimum_order.layers.statistics import SquaredNorms, Statistics
from optimum_order.testing import DTYPES, AccumulatorContract, gaussian


class TestContract(AccumulatorContract):
    accumulator = SquaredNorms


def test_norms_are_those_of_all_tokens_at_once():
    for dtype in DTYPES:
        X = gaussian(700, 6).to(dtype)
        norms = Statistics.of(X, [SquaredNorms])[SquaredNorms]
        assert norms.dtype == torch.float32 and norms.shape == (6,)
        assert torch.allclose(norms.double(), X.double().square().sum(0), rtol=1e-5)


def test_half_precision_does_not_saturate():
    """A thousand tokens of 100 sum to far more than float16 holds."""
    X = torch.full((1000, 2), 100.0, dtype=torch.float16)
    assert torch.equal(Statistics.of(X, [SquaredNorms])[SquaredNorms], torch.full((2,), 1e7))


def test_no_tokens_are_zeros():
    accumulator = SquaredNorms(3, torch.device("cpu"))
    assert torch.equal(accumulator.result(), torch.zeros(3))
