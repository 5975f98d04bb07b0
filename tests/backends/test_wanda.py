import pytest
import torch

from optimum_order.engine.recipe import method
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage


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
    kept = metric.topk(n, dim=2).indices
    return W * torch.zeros_like(metric).scatter(2, kept, 1).view_as(W)


@pytest.fixture
def X():
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(100, 32, generator=generator) * torch.rand(32, generator=generator).exp() ** 3
    )


def known(X):
    from optimum_order.layers.statistics import SquaredNorms, Statistics

    return Statistics(len(X), {SquaredNorms: X.square().sum(0)})


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_is_the_papers_algorithm(gaussian, X, sparsity):
    weight = gaussian()
    state = method(Stage("wanda", sparsity)).apply(LayerState(weight), known(X))
    assert torch.equal(state.weight, reference(weight, X, sparsity))
    magnitude = method(Stage("magnitude", sparsity=sparsity, per="row")).apply(LayerState(weight))
    assert not torch.equal(state.weight, magnitude.weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_is_the_papers_n_of_m(gaussian, X, n, m):
    weight = gaussian()
    state = method(Stage("wanda", pattern=f"{n}:{m}")).apply(LayerState(weight), known(X))
    assert torch.equal(state.weight, reference_n_of_m(weight, X, n, m))


def test_ranks_by_magnitude_where_no_token_came_by(gaussian, inputs):
    X = torch.zeros(0, 32)
    state = method(Stage("wanda", 0.5)).apply(LayerState(gaussian()), known(X))
    magnitude = method(Stage("magnitude", sparsity=0.5, per="row")).apply(LayerState(gaussian()))
    assert torch.equal(state.weight, magnitude.weight)
    assert state.notes == (
        "wanda:0.5: no calibration token reached this layer; its inputs were taken as white noise",
    )


def test_does_not_depend_on_the_scale_of_the_inputs(gaussian, X):
    small, large = (
        method(Stage("wanda", 0.5)).apply(LayerState(gaussian()), known(X * s)) for s in (1e-3, 1e3)
    )
    assert torch.equal(small.pruned, large.pruned)


def test_needs_the_norms_alone():
    assert method(Stage("wanda", 0.5)).needs == {"squared_norms"}
