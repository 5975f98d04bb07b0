import pytest
import torch

from optimum_order.backends.magnitude import Magnitude
from optimum_order.backends.wanda import Wanda
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import SquaredNorms, Statistics
from optimum_order.order import Stage
from optimum_order.testing import BackendContract


class TestContract(BackendContract):
    backend = Wanda
    stages = ("wanda:0.5", "wanda(pattern=2:4)", "wanda(sparsity=0.3, off_grid=true)")


def reference(W, X, sparsity):
    """Algorithm 1 of the paper."""
    metric = W.abs() * X.norm(p=2, dim=0)
    _, sorted_indices = torch.sort(metric, dim=1, stable=True)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    pruned.scatter_(1, sorted_indices[:, : int(W.shape[1] * sparsity)], True)
    return W.masked_fill(pruned, 0)


def reference_n_of_m(W, X, n, m):
    """Section 4.2: the same metric within every m consecutive weights."""
    metric = (W.abs() * X.norm(p=2, dim=0)).view(W.shape[0], -1, m)
    largest = metric.topk(n, dim=2).indices
    return W * torch.zeros_like(metric).scatter(2, largest, 1).view_as(W)


@pytest.fixture
def X():
    generator = torch.Generator().manual_seed(5)
    spread = torch.rand(32, generator=torch.Generator().manual_seed(6)).exp() ** 3
    return torch.randn(100, 32, generator=generator) * spread


def apply(weight, X, value=None, **options):
    statistics = Statistics.of(X, [SquaredNorms])
    return Wanda(Stage("wanda", value, **options)).apply(LayerState(weight), statistics)


def by_magnitude(weight, sparsity):
    return Magnitude(Stage("magnitude", sparsity=sparsity, per="row")).apply(LayerState(weight))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_is_the_papers_algorithm(gaussian, X, sparsity):
    state = apply(gaussian(), X, sparsity)
    assert torch.equal(state.weight, reference(gaussian(), X, sparsity))
    assert not torch.equal(state.weight, by_magnitude(gaussian(), sparsity).weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_is_the_papers_n_of_m(gaussian, X, n, m):
    state = apply(gaussian(), X, pattern=f"{n}:{m}")
    assert torch.equal(state.weight, reference_n_of_m(gaussian(), X, n, m))


def test_ranks_by_magnitude_where_no_token_came_by(gaussian):
    state = apply(gaussian(), torch.zeros(0, 32), 0.5)
    assert torch.equal(state.weight, by_magnitude(gaussian(), 0.5).weight)


def test_does_not_depend_on_the_scale_of_the_inputs(gaussian, X):
    masks = [apply(gaussian(), X * scale, 0.5).pruned for scale in (1e-3, 1e3)]
    assert torch.equal(*masks)


def test_needs_the_norms_alone():
    assert Wanda.needs == {SquaredNorms}
