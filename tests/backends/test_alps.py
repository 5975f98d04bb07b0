import itertools

import pytest
import torch

from optimum_order.backends.alps import ALPS
from optimum_order.engine.recipe import method
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram
from optimum_order.order import Stage
from optimum_order.testing import BackendContract


class TestContract(BackendContract):
    backend = ALPS
    stages = ("alps:0.5", "alps(pattern=2:4)", "alps(sparsity=0.3, off_grid=true)")


def test_no_other_mask_of_a_tiny_layer_is_much_better(inputs, gaussian, row_errors):
    """Of all masks of one row, each with its least squares fit, it comes near the best."""
    statistics = inputs("correlated", 64, 10)
    H = statistics[Gram].double()
    ratios = []
    for seed in range(12):
        weight = gaussian(1, 10, seed)
        best = torch.inf
        for chosen in itertools.combinations(range(10), 4):
            remaining = torch.tensor(chosen)
            fit = torch.zeros(1, 10, dtype=torch.float64)
            target = weight.double() @ H[:, remaining]
            fit[:, remaining] = torch.linalg.solve(H[remaining][:, remaining], target.T).T
            best = min(best, row_errors(fit, weight, statistics).item())
        state = method(Stage("alps", sparsity=0.6, damping=1e-6, steps=50)).apply(
            LayerState(weight), statistics
        )
        assert state.pruned.sum() == 6
        ratios.append(row_errors(state.weight, weight, statistics).item() / best)
    assert min(ratios) >= 0.999, "nothing is better than the best"
    assert sorted(ratios)[6] < 1.3 and max(ratios) < 5


def test_survivors_are_the_least_squares_fit_on_their_mask(inputs, gaussian, row_errors):
    statistics = inputs("correlated", 256, 32)
    H = statistics[Gram].double()
    weight = gaussian(8, 32)
    state = method(Stage("alps", sparsity=0.5, damping=1e-6, steps=200)).apply(
        LayerState(weight), statistics
    )
    for row in range(8):
        remaining = (~state.pruned[row]).nonzero()[:, 0]
        target = weight[row].double() @ H[:, remaining]
        fit = torch.linalg.solve(H[remaining][:, remaining], target)
        torch.testing.assert_close(state.weight[row, remaining].double(), fit, atol=5e-3, rtol=5e-3)


def test_it_beats_sparsegpt(inputs, gaussian, row_errors):
    statistics = inputs("correlated", 256, 96)
    for sparsity in (0.5, 0.7):
        errors = []
        for name in ("alps", "sparsegpt"):
            state = method(Stage(name, sparsity)).apply(LayerState(gaussian(48, 96)), statistics)
            errors.append(row_errors(state.weight, gaussian(48, 96), statistics).sum())
        assert errors[0] < 0.03 * errors[1], sparsity


def test_awkward_inputs_give_numbers_and_lose_nothing(
    inputs, input_kinds, gaussian, row_errors, not_worse
):
    weight = gaussian()
    for kind in input_kinds:
        statistics = inputs(kind)
        state = method(Stage("alps", 0.5)).apply(LayerState(weight), statistics)
        state.check(kind)
        assert state.pruned.sum() == 256, kind
        masked = weight.masked_fill(state.pruned, 0.0)
        errors = [row_errors(after, weight, statistics) for after in (state.weight, masked)]
        deltas = (state.weight - weight, masked - weight)
        assert not_worse(*errors, deltas, statistics), kind


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_on_the_grid_of_a_quantized_layer(inputs, gaussian, row_errors, options):
    statistics = inputs("correlated", 128)
    grid = UniformGrid.fit(gaussian(), bits=4, group_size=8)
    weight = grid.nearest(gaussian())
    state = method(Stage("alps", **options)).apply(LayerState(weight, grid=grid), statistics)
    assert state.grid is grid and grid.holds(state.weight)
    masked = weight.masked_fill(state.pruned, 0.0)
    errors = [row_errors(after, weight, statistics).sum() for after in (state.weight, masked)]
    assert errors[0] < errors[1]


def test_what_was_removed_before_stays_and_counts(inputs, gaussian):
    statistics = inputs("correlated", 128)
    first = method(Stage("magnitude", 0.3)).apply(LayerState(gaussian()))
    state = method(Stage("alps", 0.5)).apply(first, statistics)
    assert (state.pruned | ~first.pruned).all() and state.pruned.sum() == 256
