import pytest
import torch

from optimum_order.calibration.accumulate import Accumulator
from optimum_order.layers.statistics import Gram, SquaredNorms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_all_tokens_at_once(dtype):
    parts = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for shape in [(7, 6), (2, 5, 6), (6,)]
    ]
    X = torch.cat([part.reshape(-1, 6) for part in parts]).double()
    for gram in (True, False):
        accumulator = Accumulator(6, gram=gram, device=torch.device("cpu"))
        for part in parts:
            accumulator.add(part)
        result = accumulator.result()
        assert result.tokens == len(X) == 18
        assert result[SquaredNorms].dtype == torch.float32
        assert torch.allclose(result[SquaredNorms].double(), X.square().sum(0), rtol=1e-5)
        assert (result[Gram] is not None) == gram
        if gram:
            assert torch.allclose(result[Gram].double(), X.T @ X, rtol=1e-5, atol=1e-5)


def test_half_precision_does_not_saturate():
    """A thousand tokens of 100 sum to far more than float16 holds."""
    accumulator = Accumulator(2, gram=True, device=torch.device("cpu"))
    accumulator.add(torch.full((1000, 2), 100.0, dtype=torch.float16))
    assert torch.equal(accumulator.result().gram, torch.full((2, 2), 1e7))


def test_nothing_seen_is_zero_tokens():
    for gram in (True, False):
        result = Accumulator(3, gram=gram, device=torch.device("cpu")).result()
        assert result.tokens == 0
        assert torch.equal(result[SquaredNorms], torch.zeros(3))


def test_no_tokens_add_nothing():
    accumulator = Accumulator(3, gram=True, device=torch.device("cpu"))
    accumulator.add(torch.zeros(0, 3))
    assert accumulator.result().tokens == 0


@pytest.mark.parametrize("inputs", [511, 512, 513, 1300])
def test_what_lies_below_the_diagonal_is_copied(inputs):
    X = torch.randn(20, inputs, generator=torch.Generator().manual_seed(0))
    accumulator = Accumulator(inputs, gram=True, device=torch.device("cpu"))
    for part in X.split(9):
        accumulator.add(part)
    gram = accumulator.result().gram
    assert torch.allclose(gram.double(), X.double().T @ X.double(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(gram, gram.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(accumulator.result().gram, gram)


def test_sums_that_were_taken_in_inference_mode_are_completed_outside():
    X = torch.randn(20, 600, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        accumulator = Accumulator(600, gram=True, device=torch.device("cpu"))
        accumulator.add(X)
    assert torch.allclose(accumulator.result().gram, X.T @ X, rtol=1e-2, atol=1e-1)
