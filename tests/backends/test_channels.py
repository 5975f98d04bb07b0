"""The scores are the errors that removals add, and the refit is the least squares fit."""

import itertools

import pytest
import torch

from optimum_order.backends.channels import (
    ChannelOptions,
    _scores,
    breaks,
    cut_columns,
    remaining_groups,
)
from optimum_order.engine.recipe import method
from optimum_order.errors import InvariantError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram
from optimum_order.order import Order, Stage

SLIGHT = 1e-6
"""A damping that changes nothing which can be seen."""


def error(after, before, columns, gram):
    """Return tr(dW H dW^T), the columns that are gone taken as zeros, in float64."""
    whole = torch.zeros_like(before, dtype=torch.float64)
    whole[:, columns] = after.double()
    apart = whole - before.double()
    return (apart @ gram.double() * apart).sum().item()


def best(weight, gram, columns):
    """Return the least squares fit W H[:,K] (H[K,K])^-1 in float64."""
    H = gram.double()
    square = H[columns][:, columns]
    return weight.double() @ H[:, columns] @ torch.linalg.inv(square)


def options(**changes):
    return ChannelOptions(**{"ratio": 0.5, "damping": SLIGHT} | changes)


def cut(weight, statistics, columns, **changes):
    state = weight if isinstance(weight, LayerState) else LayerState(weight)
    return cut_columns(
        "a", state, statistics, columns, stage=Stage("width", 0.5), options=options(**changes)
    )


@pytest.mark.parametrize("size", [1, 3])
def test_the_group_that_goes_first_is_the_one_whose_removal_costs_least(gaussian, inputs, size):
    for seed in range(5):
        weight = gaussian(6, 12, seed)
        gram = inputs("correlated", tokens=200, width=12, seed=seed)[Gram]
        groups = 12 // size
        remaining = remaining_groups(weight, gram, size=size, count=groups - 1, options=options())
        costs = []
        for gone in range(groups):
            columns = [c for c in range(12) if c // size != gone]
            costs.append(error(best(weight, gram, columns), weight, columns, gram))
        (gone,) = set(range(groups)) - set(remaining.tolist())
        assert costs[gone] == pytest.approx(min(costs), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_without_a_refit_the_group_that_adds_least_goes(gaussian, inputs, size):
    for seed in range(5):
        weight = gaussian(6, 12, seed)
        gram = inputs("correlated", tokens=200, width=12, seed=seed)[Gram]
        groups = 12 // size
        remaining = remaining_groups(
            weight, gram, size=size, count=groups - 1, options=options(refit=False)
        )
        costs = []
        for gone in range(groups):
            columns = [c for c in range(12) if c // size != gone]
            costs.append(error(weight[:, columns], weight, columns, gram))
        (gone,) = set(range(groups)) - set(remaining.tolist())
        assert costs[gone] == pytest.approx(min(costs), rel=1e-5)


def test_several_that_go_are_near_the_best_there_are(gaussian, inputs):
    ratios = []
    for seed in range(5):
        weight = gaussian(4, 8, seed)
        gram = inputs("correlated", tokens=100, width=8, seed=seed)[Gram]
        costs = {
            chosen: error(best(weight, gram, list(chosen)), weight, list(chosen), gram)
            for chosen in itertools.combinations(range(8), 5)
        }
        remaining = remaining_groups(weight, gram, size=1, count=5, options=options())
        assert remaining.tolist() == sorted(set(remaining.tolist())) and len(remaining) == 5
        ratios.append(costs[tuple(remaining.tolist())] / min(costs.values()))
    assert max(ratios) < 2
    assert sorted(ratios)[2] < 1.25, "in the middle"


def test_the_refit_is_the_least_squares_fit(gaussian, inputs):
    columns = torch.tensor([0, 3, 4, 9, 11])
    weight = gaussian(6, 12)
    statistics = inputs("correlated", tokens=300, width=12)
    refitted = cut(weight, statistics, columns)
    torch.testing.assert_close(
        refitted.weight.double(), best(weight, statistics[Gram], columns), rtol=1e-3, atol=1e-3
    )
    assert cut(weight, statistics, columns, refit=False).weight is None


@pytest.mark.parametrize(
    "order",
    ["magnitude:0.5", "rtn(bits=4, group_size=-1)", "magnitude:0.5 > rtn(bits=3, group_size=-1)"],
)
def test_a_refit_stays_on_mask_and_grid_and_is_no_worse_than_none(
    gaussian, inputs, row_errors, order
):
    state = LayerState(gaussian(16, 32))
    for stage in Order.parse(order):
        state = method(stage).apply(state)
    columns = torch.arange(0, 32, 3)
    statistics = inputs("correlated", tokens=200, width=32)
    refitted = cut(state, statistics, columns, damping=0.01)
    grid = None if state.grid is None else state.grid.take(columns=columns)
    mask = state.mask[:, columns]
    after = LayerState(refitted.weight, mask, grid)
    after.check("refitted")
    before = error(state.weight[:, columns], state.weight, columns, statistics[Gram])
    assert error(after.weight, state.weight, columns, statistics[Gram]) < 0.9 * before
    assert "refitted column by column, on its" in refitted.notes[0]


def test_awkward_inputs_leave_finite_weights(gaussian, inputs, input_kinds):
    for kind, size in itertools.product(input_kinds, (1, 4)):
        weight = gaussian(8, 32)
        statistics = inputs(kind, tokens=40, width=32)
        groups = remaining_groups(
            weight, statistics[Gram], size=size, count=16 // size, options=options(damping=0.01)
        )
        assert len(groups) == 16 // size, kind
        columns = (groups[:, None] * size + torch.arange(size)).flatten()
        refitted = cut(weight, statistics, columns, damping=0.01)
        assert refitted.weight.isfinite().all(), kind
        if kind == "silent":
            torch.testing.assert_close(refitted.weight, weight[:, columns])
    with pytest.raises(InvariantError):
        remaining_groups(
            weight, torch.full((32, 32), torch.nan), size=1, count=8, options=options()
        )


def test_a_grid_breaks_where_its_groups_do(gaussian):
    state = method(Stage("rtn", bits=4, group_size=8)).apply(LayerState(gaussian(4, 32)))
    assert breaks(state.grid, torch.arange(31))
    assert not breaks(state.grid, torch.arange(8, 24))
    assert not breaks(None, torch.arange(3))


def test_what_is_gone_is_not_divided_by(gaussian):
    """Rounding leaves a block of a group that is gone near zero, singular, or below."""
    weight, alive = gaussian(8, 12), torch.tensor([True, False, True])
    inverse = torch.eye(12)
    for left in (0.0, -1e-9, float("nan")):
        inverse[4:8, 4:8] = left
        scores = _scores(weight, inverse, 4, alive)
        assert scores[1] == torch.inf
        expected = weight.square().view(8, 3, 4).sum((0, 2))
        assert torch.allclose(scores[alive], expected[alive], rtol=1e-4)
