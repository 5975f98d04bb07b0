import torch

from optimum_order.layers.statistics import Drift, Statistics
from optimum_order.testing import DTYPES, gaussian


def gathered(*pairs):
    sums = Drift(pairs[0][0].shape[1], torch.device("cpu"))
    for rows, before in pairs:
        sums.compare(rows, before)
    return sums


def test_the_matrix_is_that_of_all_tokens_at_once():
    for dtype in DTYPES:
        X = gaussian(300, 24).to(dtype)
        before = (X.float() + 0.1 * gaussian(300, 24, seed=1)).to(dtype)
        expected = (before.double() - X.double()).T @ X.double()
        whole = gathered((X, before)).result()
        assert whole.dtype == torch.float32
        assert torch.allclose(whole.double(), expected, rtol=1e-4, atol=1e-4)
        parts = gathered((X[:100], before[:100]))
        parts.merge(gathered((X[100:], before[100:])))
        assert torch.allclose(parts.result(), whole, rtol=1e-4, atol=1e-4)


def test_inputs_that_did_not_change_have_none():
    X = gaussian(30, 8)
    assert not gathered((X, X)).result().any()
    assert not Statistics.of(X, [Drift])[Drift].any()
    assert not Drift.isotropic(gathered((X, X + 1)).result()).any()
