import torch

from optimum_order.layers.statistics import AbsMax, Statistics
from optimum_order.testing import DTYPES, AccumulatorContract, gaussian


class TestContract(AccumulatorContract):
    accumulator = AbsMax


def test_the_largest_size_of_each_input_of_either_sign():
    X = torch.tensor([[1.0, -5.0, 0.0], [-2.0, 4.0, 0.0]])
    assert Statistics.of(X, [AbsMax])[AbsMax].tolist() == [2.0, 5.0, 0.0]
    for dtype in DTYPES:
        rows = gaussian(50, 6).to(dtype)
        assert torch.equal(Statistics.of(rows, [AbsMax])[AbsMax], rows.float().abs().amax(0))


def test_no_tokens_are_zeros():
    assert torch.equal(AbsMax(3, torch.device("cpu")).result(), torch.zeros(3))
