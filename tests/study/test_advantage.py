"""The definitions on figures worked by hand, and splits of layers whose answer is certain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from optimum_order.engine.recipe import method
from optimum_order.errors import DataError
from optimum_order.layers.error import squared_error
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.order import Order, Stage
from optimum_order.study.advantage import (
    Correlation,
    Ratio,
    Split,
    compression_equivalent_ratio,
    spearman,
    split_advantage,
)

CURVE = {2: -6.0, 3: -4.0, 4: -3.0, 8: -2.0}
"""Minus log-perplexity of a quantizer by its bits."""

# Compression-equivalent ratio


def test_at_a_measured_width_the_ratio_is_that_of_the_width():
    for bits, performance in CURVE.items():
        assert compression_equivalent_ratio(performance, CURVE) == Ratio(1 - bits / 16, "exact")


def test_between_widths_the_ratio_is_interpolated():
    for performance, bits in ((-5.0, 2.5), (-3.25, 3.75), (-2.25, 7)):
        ratio = compression_equivalent_ratio(performance, CURVE)
        assert ratio == Ratio(pytest.approx(1 - bits / 16), "exact")


def test_outside_the_curve_the_ratio_is_a_bound():
    assert compression_equivalent_ratio(-9.0, CURVE) == Ratio(1 - 2 / 16, "at least")
    assert compression_equivalent_ratio(-1.9, CURVE) == Ratio(0.5, "at most")


def test_the_original_may_end_the_curve():
    curve = CURVE | {16: -1.8}
    assert compression_equivalent_ratio(-1.9, curve) == Ratio(pytest.approx(1 - 12 / 16), "exact")
    assert compression_equivalent_ratio(-1.8, curve) == Ratio(0, "exact")


def test_a_wider_width_that_does_worse_counts_as_the_best_below_it():
    curve = {2: -5.0, 3: -2.0, 4: -2.5, 6: -1.0}
    for performance, bits in ((-2.5, 2 + 2.5 / 3), (-2.0, 3), (-1.5, 5)):
        ratio = compression_equivalent_ratio(performance, curve)
        assert ratio == Ratio(pytest.approx(1 - bits / 16), "exact")


def test_a_curve_of_one_point():
    bounds = [compression_equivalent_ratio(m, {4: -3.0}).bound for m in (-4, -3, -2)]
    assert bounds == ["at least", "exact", "at most"]


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, 16), st.floats(-100, 100), min_size=1),
    st.lists(st.floats(-110, 110), min_size=2, max_size=2).map(sorted),
)
def test_the_worse_the_performance_the_larger_the_ratio(curve, performances):
    worse, better = (compression_equivalent_ratio(m, curve) for m in performances)
    assert worse.value >= better.value
    assert 1 - max(curve) / 16 <= better.value <= worse.value <= 1 - min(curve) / 16


@pytest.mark.parametrize(
    ("performance", "curve", "message"),
    [
        (-1.0, {}, r"above 0 and up to 16, got \[\]"),
        (-1.0, {0: -2.0}, r"got \[0\]"),
        (-1.0, {4: -2.0, 32: -1.0}, r"got \[4, 32\]"),
        (math.nan, CURVE, "finite performances, got nan"),
        (-1.0, {2: -math.inf, 4: -1.0}, "Leave out widths at which the model breaks"),
    ],
)
def test_a_curve_that_cannot_be_read(performance, curve, message):
    with pytest.raises(DataError, match=message):
        compression_equivalent_ratio(performance, curve)


# Intensity


def test_with_the_reference_quantizer_intensity_is_that_of_the_paper():
    pruning = compression_equivalent_ratio(-3.5, CURVE)
    for bits, performance in CURVE.items():
        intensity = pruning - compression_equivalent_ratio(performance, CURVE)
        assert intensity == Ratio(pytest.approx(pruning.value - (1 - bits / 16)), "exact")


def test_bounds_carry_over_to_the_intensity():
    for pruning, quantization, bound in (
        (-3.5, -2.5, "exact"),
        (-9.0, -3.0, "at least"),
        (-1.0, -3.0, "at most"),
        (-3.0, -9.0, "at most"),
        (-3.0, -1.0, "at least"),
        (-9.0, -1.0, "at least"),
        (-1.0, -9.0, "at most"),
        (-9.0, -9.0, "unknown"),
        (-1.0, -1.0, "unknown"),
    ):
        p, q = (compression_equivalent_ratio(m, CURVE) for m in (pruning, quantization))
        assert p - q == Ratio(p.value - q.value, bound)


# The split


def statistics(gram, tokens=100):
    return Statistics(tokens, {Gram: gram})


def random_layer(seed, out=24, inputs=64, tokens=256):
    """Return W, and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inputs, generator=generator)
    X = torch.randn(tokens, inputs, generator=generator)
    X = X @ torch.randn(inputs, inputs, generator=generator)
    return W, statistics(X.T @ X)


def run(W, inputs, order):
    state = LayerState(W)
    for stage in Order.parse(order):
        state = method(stage).apply(state, inputs)
    return state


def both(W, inputs, first, second):
    """Return the layer after both orders of two stages."""
    return run(W, inputs, f"{first} > {second}"), run(W, inputs, f"{second} > {first}")


def errors(W, inputs, *states):
    """Return the relative output error of each state, in float64."""
    H = inputs[Gram].double()
    size = ((W.double() @ H) * W.double()).sum().item()
    deltas = [state.weight.double() - W.double() for state in states]
    return [((D @ H) * D).sum().item() / size for D in deltas]


def test_the_split_worked_by_hand():
    W = torch.tensor([[1.0, 2.0]])
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    first = LayerState(torch.tensor([[0.0, 2.0]]), pruned=torch.tensor([[True, False]]))
    second = LayerState(torch.tensor([[1.0, 0.0]]))  # rounded to zero, which is not pruned
    # D1 = [-1, 0], E1 = 2; D2 = [0, -2], E2 = 12; tr(W H W^T) = 18
    # D2 - D1 = [1, -2], (D2 + D1) H = [-4, -7], so the shares are -4 and 14
    expected = [pytest.approx(part / 18) for part in (10, -4, 14)]
    assert split_advantage(W, first, second, statistics(H)) == Split(*expected)
    expected = [pytest.approx(-part / 18) for part in (10, -4, 14)]
    assert split_advantage(W, second, first, statistics(H)) == Split(*expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_sum_to_the_whole(dtype):
    W, inputs = random_layer(0)
    W = W.to(dtype)
    for pruner, quantizer in (
        ("magnitude:0.5", "rtn:3"),
        ("wanda:0.5", "gptq:4"),
        ("sparsegpt:0.6", "rtn:2"),
        ("sparsegpt:0.5", "gptq:3"),
    ):
        first, second = both(W, inputs, pruner, quantizer)
        split = split_advantage(W, first, second, inputs)
        one, other = errors(W, inputs, first, second)
        assert split.whole == pytest.approx(other - one, rel=1e-6)
        assert split.owner + split.interference == pytest.approx(split.whole, rel=1e-6)
        assert split.owner != 0
        assert split.interference != 0


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 12)),
    spread=st.floats(0, 6),  # of the sizes of the inputs, in powers of ten
    rank=st.integers(1, 12),
    near=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),  # how far one result is from the other
)
def test_the_parts_sum_to_the_whole_for_any_layer(seed, shape, spread, rank, near):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    W = normal(*shape)
    powers = spread * torch.rand(shape[1], generator=generator) - spread / 2
    X = normal(rank, shape[1]) * 10**powers
    inputs = statistics(X.T @ X)
    masks = [normal(*shape) > 0 for _ in range(2)]
    one = W + normal(*shape)
    other = one + near * normal(*shape)
    first, second = (
        LayerState(weight.masked_fill(mask & (near == 1), 0.0), pruned=mask)
        for weight, mask in zip((one, other), masks, strict=True)
    )
    split = split_advantage(W, first, second, inputs)
    # the rounding of float64: of a difference of sums, were all their terms of one sign
    H = inputs[Gram].double().abs()
    D1, D2 = ((state.weight.double() - W).abs() for state in (first, second))
    products = (((D1 @ H) * D1), ((D2 @ H) * D2), ((D1 + D2) @ H) * (D2 - D1).abs())
    size = ((W.double() @ inputs[Gram].double()) * W).sum().item()
    rounding = 1e-14 * sum(product.sum().item() for product in products) / size
    difference = abs(split.owner + split.interference - split.whole)
    assert difference <= max(1e-6 * abs(split.whole), rounding)


def test_a_gram_matrix_that_rounding_left_unsymmetric():
    W, inputs = random_layer(1)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).triu()
    skewed = statistics(inputs[Gram] + 1e-3 * noise * inputs[Gram])
    first, second = both(W, inputs, "wanda:0.5", "rtn:3")
    split = split_advantage(W, first, second, skewed)
    assert split.owner + split.interference == pytest.approx(split.whole, rel=1e-6)
    assert split.whole == pytest.approx(np.subtract(*errors(W, skewed, second, first)), rel=1e-6)


def test_with_disjoint_selectivity_only_owner_changes_count():
    """Theorem 1: with one grid whatever was pruned, what both orders round, both round alike."""
    W, inputs = random_layer(2)
    for bits, sparsity in ((2, 0.7), (3, 0.5), (4, 0.7)):
        grid = UniformGrid.fit(W, bits=bits, group_size=32)
        prune = method(Stage("magnitude", sparsity))
        pruned = prune.apply(LayerState(W))
        first = LayerState(grid.nearest(pruned.weight), pruned.pruned, grid)
        second = prune.apply(LayerState(grid.nearest(W), grid=grid))
        assert (first.mask != second.mask).any()
        assert inputs[Gram][0, 1] != 0, "shares hold cross terms of H"
        split = split_advantage(W, first, second, inputs)
        assert split.interference == 0.0, "exactly: each share has a factor D2 - D1 of 0"
        assert split.owner == pytest.approx(split.whole, rel=1e-6)
        assert split.whole != 0


def test_pruning_what_the_quantizer_rounds_to_zero_is_worth_nothing():
    W, inputs = random_layer(2)
    grid = UniformGrid.fit(W, bits=2)
    mask = method(Stage("magnitude", 0.3)).apply(LayerState(W)).pruned
    rounded = LayerState(grid.nearest(W), grid=grid)
    assert not rounded.weight[mask].any()
    pruned = LayerState(rounded.weight, mask, grid)
    assert split_advantage(W, rounded, pruned, inputs) == Split(0.0, 0.0, 0.0)


def test_without_owner_changes_and_interference_there_is_no_advantage():
    W, inputs = random_layer(2)
    grid = UniformGrid.fit(W, bits=4)
    mask = method(Stage("magnitude", 0.5)).apply(LayerState(W)).pruned
    first = LayerState(grid.nearest(W.masked_fill(mask, 0.0)), mask, grid)
    second = LayerState(grid.nearest(W).masked_fill(mask, 0.0), mask, grid)
    assert split_advantage(W, first, second, inputs) == Split(0.0, 0.0, 0.0)


def test_where_pruning_changes_the_scale_of_a_group_there_is_interference():
    """Wanda prunes a group's largest weight, whose input is silent; the grid is then finer."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 64, generator=generator)
    X = torch.randn(256, 64, generator=generator)
    W[:, ::32] *= 20
    X[:, ::32] *= 1e-3
    inputs = statistics(X.T @ X)
    first, second = both(W, inputs, "wanda:0.5", "rtn(bits=4, group_size=32, clip=none)")
    split = split_advantage(W, first, second, inputs)
    assert split.interference > 0.01, "in the first order's favor, by over 1 % of the output"
    assert split.owner + split.interference == pytest.approx(split.whole, rel=1e-6)


def test_without_a_gram_matrix_errors_are_weighted_by_the_inputs():
    W, inputs = random_layer(3)
    first, second = both(W, inputs, "wanda:0.5", "rtn:3")
    norms = Statistics(100, {SquaredNorms: inputs[SquaredNorms]})
    split = split_advantage(W, first, second, norms)
    assert split == split_advantage(W, first, second, statistics(inputs[SquaredNorms].diag()))
    one, other = (squared_error(state.weight - W, norms) for state in (first, second))
    assert split.whole == pytest.approx((other - one) / squared_error(W, norms), rel=1e-4)


def test_inputs_of_a_layer_that_no_token_reached_are_white_noise():
    W, _ = random_layer(4)
    first, second = both(W, None, "magnitude:0.5", "rtn:3")
    idle = split_advantage(W, first, second, statistics(torch.zeros(64, 64), tokens=0))
    assert idle == split_advantage(W, first, second, statistics(torch.eye(64)))


def test_a_layer_of_zeros():
    zeros = torch.zeros(2, 3)
    states = [LayerState(zeros, pruned=mask) for mask in (None, zeros == 0)]
    assert split_advantage(zeros, *states, statistics(torch.eye(3))) == Split(0.0, 0.0, 0.0)


# Spearman's rho


def pairs(rho, count, seed):
    x, noise = np.random.default_rng(seed).standard_normal((2, count))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def test_rho_is_that_of_scipy_ties_included():
    x, y = pairs(0.5, 54, 0)
    for a, b in [(x, y), (np.round(x), np.round(2 * y))]:
        correlation = spearman(a.tolist(), b.tolist())
        assert correlation.rho == pytest.approx(stats.spearmanr(a, b).statistic)
        assert correlation.low < correlation.rho < correlation.high
        assert correlation.reason == ""
        assert spearman(a.tolist(), b.tolist()) == correlation


def test_rho_of_what_rises_together_is_one():
    assert spearman([1, 2, 3, 5, 8], [1, 4, 9, 25, 64]) == Correlation(*[pytest.approx(1.0)] * 3)
    assert spearman([1, 2, 3, 5, 8], [-1, -4, -9, -25, -64]).high == pytest.approx(-1.0)


def test_the_interval_of_rho_holds_the_truth():
    truth = 6 / math.pi * math.asin(0.25)  # Spearman's rho of two normals correlated by 0.5
    correlations = [spearman(*pairs(0.5, 54, seed), resamples=400) for seed in range(200)]
    assert np.mean([one.low <= truth <= one.high for one in correlations]) >= 0.91
    assert 0.3 < np.mean([one.high - one.low for one in correlations]) < 0.6


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([], [], "there are only 0 pairs"),
        ([1, 2], [1, 2], "there are only 2 pairs"),
        ([1, 2, 3], [5, 5, 5], "one of the two is the same in every pair"),
        ([0.1] * 3, [1, 2, 3], "one of the two is the same in every pair"),
    ],
)
def test_pairs_without_a_rho(x, y, reason):
    assert spearman(x, y) == Correlation(None, None, None, reason)


def test_a_rho_without_an_interval():
    # a single odd one out is missing from 36 % of the samples: enough are left
    count = 40
    assert spearman(range(count), [0] * (count - 1) + [1]).low is not None
    correlation = spearman([0, 0, 0, 1], [0, 0, 1, 0])
    assert correlation.rho == pytest.approx(-1 / 3)
    assert correlation.low is None
    assert "one figure only" in correlation.reason


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3], [1, 2]), ([1, 2, math.nan], [1, 2, 3]), ([1, 2, 3], [1, math.inf, 3])]
)
def test_what_is_no_pair_of_numbers(x, y):
    with pytest.raises(DataError, match="pairs of finite numbers"):
        spearman(x, y)
