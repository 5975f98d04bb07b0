import math

import pytest
import torch

from optimum_order.backends.obs import BLOCK
from optimum_order.backends.sparsegpt import SparseGPT
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram
from optimum_order.order import Stage
from optimum_order.testing import BackendContract


class TestContract(BackendContract):
    backend = SparseGPT
    stages = ("sparsegpt:0.5", "sparsegpt(pattern=2:4)", "sparsegpt(sparsity=0.3, off_grid=true)")


def damped(gram):
    gram = gram.double()
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def reference(weight, gram, sparsity=None, pattern=None, before=None, grid=None):
    """SparseGPT in float64 with explicit inverses: its mask, and its weight before rows that lose
    to masking are replaced."""
    W = weight.double().clone()
    H = damped(gram)
    width = weight.shape[1]
    before = torch.zeros_like(W, dtype=torch.bool) if before is None else before
    mask = before.clone()
    span = pattern[1] if pattern else BLOCK
    inverse = [torch.linalg.inv(H[j:, j:]) for j in range(width)]
    for j in range(width):
        if j % span == 0:
            here = range(j, min(j + span, width))
            score = torch.stack([W[:, k] ** 2 / inverse[k][0, 0] for k in here], 1)
            score[before[:, here]] = -1
            if pattern:
                for row in range(len(W)):
                    mask[row, j + score[row].argsort()[: pattern[1] - pattern[0]]] = True
            else:
                count = math.floor(sparsity * score.numel() + 1e-9)
                order = score.flatten().argsort(stable=True)[:count]
                mask[order // len(here), j + order % len(here)] = True
        q = W[:, j]
        if grid is not None:
            q = grid.nearest(W[:, j : j + 1].float(), slice(j, j + 1))[:, 0].double()
        q = q.masked_fill(mask[:, j], 0)
        error = (W[:, j] - q) / inverse[j][0, 0]
        W[:, j:] -= torch.outer(error, inverse[j][0])
        W[:, j] = q
    return W, mask


def compare(state, weight, statistics, expected, mask, row_errors):
    assert torch.equal(state.pruned, mask)
    plain = weight.masked_fill(mask, 0.0)
    errors = [row_errors(after, weight, statistics) for after in (expected, plain)]
    better = errors[0] < errors[1]
    assert better.float().mean() > 0.5
    expected = torch.where(better[:, None], expected, plain.double())
    assert torch.allclose(state.weight.double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (32, {"sparsity": 0.5}),
        (BLOCK + 16, {"sparsity": 0.6}),
        (32, {"pattern": (2, 4)}),
        (BLOCK + 16, {"pattern": (2, 4)}),
        (30, {"pattern": (1, 3)}),
    ],
)
def test_is_the_papers_method(inputs, gaussian, row_errors, width, options):
    weight = gaussian(8, width)
    statistics = inputs("correlated", 4 * width, width)
    expected, mask = reference(weight, statistics[Gram], **options)
    written = {k: f"{v[0]}:{v[1]}" if k == "pattern" else v for k, v in options.items()}
    state = method(Stage("sparsegpt", **written)).apply(LayerState(weight), statistics)
    compare(state, weight, statistics, expected, mask, row_errors)


def test_prunes_on_the_grid_of_a_quantized_layer(inputs, gaussian, row_errors):
    statistics = inputs("correlated", 128)
    grid = UniformGrid.fit(gaussian(), bits=4, group_size=8)
    weight = grid.nearest(gaussian())
    expected, mask = reference(weight, statistics[Gram], sparsity=0.5, grid=grid)
    state = method(Stage("sparsegpt", 0.5)).apply(LayerState(weight, grid=grid), statistics)
    compare(state, weight, statistics, expected, mask, row_errors)
    assert grid.holds(state.weight)
    stage = Stage("sparsegpt", sparsity=0.5, off_grid=True)
    off = method(stage).apply(LayerState(weight, grid=grid), statistics)
    assert off.grid is None
    errors = [row_errors(after.weight, weight, statistics).sum() for after in (off, state)]
    assert errors[0] < errors[1]


def test_what_was_removed_before_stays_and_counts(inputs, gaussian, row_errors):
    statistics = inputs("correlated", 128)
    first = method(Stage("magnitude", 0.3)).apply(LayerState(gaussian()))
    expected, mask = reference(first.weight, statistics[Gram], sparsity=0.5, before=first.pruned)
    state = method(Stage("sparsegpt", 0.5)).apply(first, statistics)
    compare(state, first.weight, statistics, expected, mask, row_errors)
    assert state.pruned.sum() == 256


def test_correcting_survivors_pays(inputs, gaussian, row_errors):
    """On correlated inputs most of what masking would lose is recovered."""
    weight = gaussian(64, 32)
    statistics = inputs("correlated", 256)
    state = method(Stage("sparsegpt", 0.5)).apply(LayerState(weight), statistics)
    masked = row_errors(weight.masked_fill(state.pruned, 0.0), weight, statistics).sum()
    wanda = method(Stage("wanda", 0.5)).apply(LayerState(weight), statistics)
    mine = row_errors(state.weight, weight, statistics).sum()
    assert mine < 0.5 * masked
    assert mine < 0.8 * row_errors(wanda.weight, weight, statistics).sum()


def test_is_magnitude_within_the_block_where_no_token_came_by(inputs, gaussian):
    statistics = inputs("silent", tokens=0)
    assert statistics.tokens == 0
    state = method(Stage("sparsegpt", 0.5)).apply(LayerState(gaussian()), statistics)
    magnitude = method(Stage("magnitude", 0.5)).apply(LayerState(gaussian()))
    assert torch.equal(state.weight, magnitude.weight)
    assert "no calibration token reached this layer" in state.notes[0]


@pytest.mark.parametrize("damping", [0, -1, 1.5, "much"])
def test_damping_is_a_positive_fraction(damping):
    with pytest.raises(OrderError, match=r"'damping' .* must be in \(0, 1\]"):
        method(Stage("sparsegpt", sparsity=0.5, damping=damping))
