import pytest
import torch

from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.testing import DTYPES, AccumulatorContract, gaussian


class TestContract(AccumulatorContract):
    accumulator = Gram


class TestContractInBlocks(AccumulatorContract):
    """Wide enough that parts of the matrix are copied from the other side of the diagonal."""

    accumulator = Gram
    inputs = 600


def test_the_matrix_is_that_of_all_tokens_at_once():
    for dtype in DTYPES:
        X = gaussian(700, 6).to(dtype)
        statistics = Statistics.of(X, [Gram])
        assert statistics[Gram].dtype == torch.float32
        expected = X.double().T @ X.double()
        assert torch.allclose(statistics[Gram].double(), expected, rtol=1e-5, atol=1e-3)
        assert torch.equal(statistics[SquaredNorms], statistics[Gram].diagonal())


@pytest.mark.parametrize("inputs", [511, 512, 513, 1300])
def test_blocks_below_the_diagonal_are_copied(inputs):
    X = gaussian(20, inputs)
    accumulator = Gram(inputs, torch.device("cpu"))
    for part in X.split(9):
        accumulator.update(part)
    gram = accumulator.result().clone()
    assert torch.allclose(gram.double(), X.double().T @ X.double(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(gram, gram.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(accumulator.result(), gram)


def test_half_precision_does_not_saturate():
    """A thousand tokens of 100 sum to far more than float16 holds."""
    X = torch.full((1000, 2), 100.0, dtype=torch.float16)
    assert torch.equal(Statistics.of(X, [Gram])[Gram], torch.full((2, 2), 1e7))
