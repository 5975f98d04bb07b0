"""The definitions on figures worked by hand, and the split of an advantage on layers whose answer is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from optimum_order.engine.recipe import method
from optimum_order.errors import DataError
from optimum_order.evaluation import Measurement
from optimum_order.evaluation.comparison import difference_over_draws, paired_bootstrap
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.order import Order, Stage
from optimum_order.study.advantage import (
    Correlation,
    Ratio,
    Split,
    compression_equivalent_interval,
    compression_equivalent_ratio,
    intensity,
    order_advantage,
    performance_gap,
    spearman,
    split_advantage,
)

CURVE = {2: -6.0, 3: -4.0, 4: -3.0, 8: -2.0}  # log-perplexity, negated, of a quantiser by its bits


def measurement(performances, *, name="perplexity", digest="0" * 64):
    scores = tuple(-float(m) for m in performances)
    return Measurement(name, 1.0, None, scores, False, "made up", digest)


@pytest.fixture
def noise():
    return torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10


# Gap and advantage


def test_the_gap_is_positive_where_the_second_method_is_stronger(noise):
    mild, strong = measurement(noise[0] - 1), measurement(noise[1] - 2)
    found = performance_gap(mild, strong)
    assert found == paired_bootstrap(mild, strong)
    assert found.low < 1 < found.high and found.decisive
    assert performance_gap(strong, mild).mean == -found.mean


def test_the_advantage_is_positive_where_the_first_order_is_better(noise):
    forward, reverse = measurement(noise[0] - 1), measurement(noise[1] - 1.5)
    found = order_advantage(forward, reverse)
    assert found.mean == pytest.approx(0.5 + (noise[0] - noise[1]).mean().item())
    assert found.over == "samples" and found.decisive
    assert order_advantage([forward], [reverse]) == found
    assert order_advantage(reverse, forward).mean == -found.mean


def test_the_advantage_over_draws(noise):
    forward = [measurement(noise[0] + shift) for shift in (-0.5, 0.1, 0.4)]
    reverse = [measurement(noise[i]) for i in (1, 2, 3)]
    found = order_advantage(forward, reverse)
    shifted = torch.stack([noise[0] + s - noise[i] for s, i in ((-0.5, 1), (0.1, 2), (0.4, 3))])
    assert found.as_dict() == pytest.approx(difference_over_draws(shifted).as_dict())
    assert found.over == "draws and samples"
    # each draw on its own would have claimed to know, and not the same
    assert {d.decisive and d.mean > 0 for d in map(order_advantage, forward, reverse)} == {
        True,
        False,
    }
    assert not found.decisive


@pytest.mark.parametrize(
    "forward, reverse, message",
    [
        ([], [], "for each calibration draw, got 0 and 0"),
        ([measurement([1, 2])] * 2, measurement([1, 2]), "got 2 and 1"),
        (measurement([1, 2]), measurement([1, 2], digest="1" * 64), "same samples"),
        (
            *[[measurement([1, 2]), measurement([1, 2], digest="1" * 64)]] * 2,
            "draw must be measured by one metric",
        ),
        (
            *[[measurement([1, 2]), measurement([1, 2], name="fidelity")]] * 2,
            "draw must be measured by one metric",
        ),
    ],
)
def test_measurements_that_do_not_belong_together(forward, reverse, message):
    with pytest.raises(DataError, match=message):
        order_advantage(forward, reverse)


# Compression-equivalent ratio


@pytest.mark.parametrize("bits", CURVE)
def test_at_a_measured_width_it_is_the_ratio_of_that_width(bits):
    assert compression_equivalent_ratio(CURVE[bits], CURVE) == Ratio(1 - bits / 16, "exact")


@pytest.mark.parametrize("performance, bits", [(-5.0, 2.5), (-3.25, 3.75), (-2.25, 7)])
def test_between_widths_it_is_interpolated(performance, bits):
    assert compression_equivalent_ratio(performance, CURVE) == Ratio(
        pytest.approx(1 - bits / 16), "exact"
    )


@pytest.mark.parametrize(
    "performance, expected", [(-9.0, Ratio(1 - 2 / 16, "at least")), (-1.9, Ratio(0.5, "at most"))]
)
def test_outside_the_curve_it_is_a_bound(performance, expected):
    assert compression_equivalent_ratio(performance, CURVE) == expected


def test_the_original_may_end_the_curve():
    curve = CURVE | {16: -1.8}
    assert compression_equivalent_ratio(-1.9, curve) == Ratio(pytest.approx(1 - 12 / 16), "exact")
    assert compression_equivalent_ratio(-1.8, curve) == Ratio(0, "exact")


def test_a_wider_width_that_does_worse_counts_as_the_best_below_it():
    curve = {2: -5.0, 3: -2.0, 4: -2.5, 6: -1.0}
    assert compression_equivalent_ratio(-2.5, curve) == Ratio(
        pytest.approx(1 - (2 + 2.5 / 3) / 16), "exact"
    )
    assert compression_equivalent_ratio(-2.0, curve) == Ratio(1 - 3 / 16, "exact")
    assert compression_equivalent_ratio(-1.5, curve) == Ratio(pytest.approx(1 - 5 / 16), "exact")


def test_a_curve_of_one_point():
    assert [compression_equivalent_ratio(m, {4: -3.0}).bound for m in (-4, -3, -2)] == [
        "at least",
        "exact",
        "at most",
    ]


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
    "performance, curve, message",
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


def test_the_interval_of_the_ratio(noise):
    hardness = 5 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curve = {bits: m + hardness for bits, m in CURVE.items()}
    method = (
        hardness - 3.5 + noise[0]
    )  # half-way between 3 and 4 bit; what makes a sample hard is common to all
    low, high = compression_equivalent_interval(method, curve)
    assert {low.bound, high.bound} == {"exact"}
    assert low.value < 1 - 3.5 / 16 < high.value
    half = stats.t.ppf(0.975, 39) * noise[0].std().item() / 40**0.5 / 16  # one bit is one nat here
    assert high.value - low.value == pytest.approx(2 * half, rel=0.15)
    assert compression_equivalent_interval(method, curve, seed=0) == (low, high)


def test_an_end_of_the_interval_may_be_a_bound(noise):
    curve = {bits: m + 0 * noise[0] for bits, m in CURVE.items()}
    low, high = compression_equivalent_interval(noise[0] * 5 - 6.0, curve)
    assert high == Ratio(1 - 2 / 16, "at least") and low.bound == "exact" and low.value < high.value
    low, high = compression_equivalent_interval(noise[0] * 5 - 2.0, curve)
    assert low == Ratio(0.5, "at most") and high.bound == "exact" and high.value > low.value
    low, high = compression_equivalent_interval(noise[0] - 9.0, curve)
    assert low == high == Ratio(1 - 2 / 16, "at least")


@pytest.mark.parametrize("counts", [(3, 2), (1, 1)])
def test_an_interval_needs_the_same_samples(counts):
    with pytest.raises(DataError, match="on the same samples, two or more"):
        compression_equivalent_interval(torch.zeros(counts[0]), {4: torch.zeros(counts[1])})


# Intensity


@pytest.mark.parametrize("bits", CURVE)
def test_with_the_reference_quantiser_intensity_is_that_of_the_paper(bits):
    found = intensity(-3.5, CURVE[bits], CURVE)
    assert found == Ratio(
        pytest.approx(compression_equivalent_ratio(-3.5, CURVE).value - (1 - bits / 16)), "exact"
    )


@pytest.mark.parametrize(
    "pruning, quantization, bound",
    [
        (-3.5, -2.5, "exact"),
        (-9.0, -3.0, "at least"),
        (-1.0, -3.0, "at most"),
        (-3.0, -9.0, "at most"),
        (-3.0, -1.0, "at least"),
        (-9.0, -1.0, "at least"),
        (-1.0, -9.0, "at most"),
        (-9.0, -9.0, "unknown"),
        (-1.0, -1.0, "unknown"),
    ],
)
def test_bounds_carry_over_to_the_intensity(pruning, quantization, bound):
    found = intensity(pruning, quantization, CURVE)
    p, q = (compression_equivalent_ratio(m, CURVE).value for m in (pruning, quantization))
    assert found == Ratio(p - q, bound)


# The split


def statistics(gram, tokens=100):
    return Statistics(tokens, {Gram: gram})


def random_layer(seed, out=24, inputs=64, tokens=256):
    """W, and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inputs, generator=generator)
    X = torch.randn(tokens, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    return W, statistics(X.T @ X)


def run(W, known, order):
    state = LayerState(W)
    for stage in Order.parse(order):
        state = method(stage).apply(state, known)
    return state


def errors(W, known, *states):
    deltas = [state.weight.double() - W.double() for state in states]
    H = known[Gram].double()
    size = ((W.double() @ H) * W.double()).sum().item()
    return [((D @ H) * D).sum().item() / size for D in deltas]


def test_the_split_worked_by_hand():
    W, H = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    first = LayerState(torch.tensor([[0.0, 2.0]]), pruned=torch.tensor([[True, False]]))
    second = LayerState(
        torch.tensor([[1.0, 0.0]]), pruned=None
    )  # rounded to zero, which is not pruned
    # D1 = [-1, 0], E1 = 2; D2 = [0, -2], E2 = 12; tr(W H W^T) = 18
    # D2 - D1 = [1, -2], (D2 + D1) H = [-4, -7], so the shares are -4 and 14
    found = split_advantage(W, first, second, statistics(H))
    assert found == Split(pytest.approx(10 / 18), pytest.approx(-4 / 18), pytest.approx(14 / 18))
    assert split_advantage(W, second, first, statistics(H)) == Split(
        *(pytest.approx(-v / 18) for v in (10, -4, 14))
    )


ORDERS = [
    ("magnitude:0.5", "rtn:3"),
    ("wanda:0.5", "gptq:4"),
    ("sparsegpt:0.6", "rtn:2"),
    ("sparsegpt:0.5", "gptq:3"),
]


@pytest.mark.parametrize("pruner, quantizer", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_sum_to_the_whole(pruner, quantizer, dtype):
    W, known = random_layer(0)
    W = W.to(dtype)
    first, second = (
        run(W, known, f"{a} > {b}") for a, b in ((pruner, quantizer), (quantizer, pruner))
    )
    found = split_advantage(W, first, second, known)
    one, other = errors(W, known, first, second)
    assert found.whole == pytest.approx(other - one, rel=1e-6)
    assert found.owner + found.interference == pytest.approx(found.whole, rel=1e-6)
    assert found.owner != 0 and found.interference != 0


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
    X = normal(rank, shape[1]) * 10 ** (
        spread * torch.rand(shape[1], generator=generator) - spread / 2
    )
    known = statistics(X.T @ X)
    masks = [normal(*shape) > 0 for _ in range(2)]
    one = W + normal(*shape)
    other = one + near * normal(*shape)
    first, second = (
        LayerState(weight.masked_fill(mask & (near == 1), 0.0), pruned=mask)
        for weight, mask in zip((one, other), masks, strict=True)
    )
    found = split_advantage(W, first, second, known)
    # what float64 can hold of a difference of sums: all their terms, were they of one sign, times its rounding
    H = known[Gram].double().abs()
    D1, D2 = ((state.weight.double() - W).abs() for state in (first, second))
    terms = (
        ((D1 @ H) * D1).sum() + ((D2 @ H) * D2).sum() + (((D1 + D2) @ H) * (D2 - D1).abs()).sum()
    )
    size = ((W.double() @ known[Gram].double()) * W).sum().item()
    rounding = 1e-14 * terms.item() / size
    assert abs(found.owner + found.interference - found.whole) <= max(
        1e-6 * abs(found.whole), rounding
    )


def test_a_gram_matrix_that_rounding_left_unsymmetric():
    W, known = random_layer(1)
    skewed = Statistics(
        100, known[SquaredNorms], known[Gram] + 1e-3 * torch.randn(64, 64).triu() * known[Gram]
    )
    first, second = (run(W, known, order) for order in ("wanda:0.5 > rtn:3", "rtn:3 > wanda:0.5"))
    found = split_advantage(W, first, second, skewed)
    assert found.owner + found.interference == pytest.approx(found.whole, rel=1e-6)
    assert found.whole == pytest.approx(np.subtract(*errors(W, skewed, second, first)), rel=1e-6)


@pytest.mark.parametrize("bits, sparsity", [(2, 0.7), (3, 0.5), (4, 0.7)])
def test_with_disjoint_selectivity_only_owner_changes_count(bits, sparsity):
    """Theorem 1: one grid whatever was pruned, each weight on its own. What both orders round, both round alike."""
    W, known = random_layer(2)
    grid = UniformGrid.fit(W, bits=bits, group_size=32)

    def prune(state):
        return method(Stage("magnitude", sparsity)).apply(state)

    pruned = prune(LayerState(W))
    first = LayerState(grid.nearest(pruned.weight), pruned.pruned, grid)
    second = prune(LayerState(grid.nearest(W), grid=grid))
    assert (first.mask != second.mask).any() and known[Gram][
        0, 1
    ] != 0  # neither trivial, nor one column at a time
    found = split_advantage(W, first, second, known)
    assert (
        found.interference == 0.0
    )  # exactly, though shares hold cross terms of H: each has a factor D2 - D1 of 0
    assert found.owner == pytest.approx(found.whole, rel=1e-6) and found.whole != 0


def test_pruning_what_the_quantiser_rounds_to_zero_is_worth_nothing():
    W, known = random_layer(2)
    grid, mask = (
        UniformGrid.fit(W, bits=2),
        method(Stage("magnitude", 0.3)).apply(LayerState(W)).pruned,
    )
    rounded = LayerState(grid.nearest(W), grid=grid)
    assert not rounded.weight[mask].any()
    assert split_advantage(W, rounded, LayerState(rounded.weight, mask, grid), known) == Split(
        0.0, 0.0, 0.0
    )


def test_without_owner_changes_and_interference_there_is_no_advantage():
    W, known = random_layer(2)
    grid = UniformGrid.fit(W, bits=4)
    mask = method(Stage("magnitude", 0.5)).apply(LayerState(W)).pruned
    first = LayerState(grid.nearest(W.masked_fill(mask, 0.0)), mask, grid)
    second = LayerState(grid.nearest(W).masked_fill(mask, 0.0), mask, grid)
    assert split_advantage(W, first, second, known) == Split(0.0, 0.0, 0.0)


def test_where_pruning_moves_the_scale_of_a_group_there_is_interference():
    """Wanda takes a group's largest weight where its input is silent, and the group then rounds on a finer grid."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(16, 64, generator=generator), torch.randn(256, 64, generator=generator)
    W[:, ::32] *= 20
    X[:, ::32] *= 1e-3
    known = statistics(X.T @ X)
    quantizer = "rtn(bits=4, group_size=32, clip=none)"
    first, second = (
        run(W, known, o) for o in (f"wanda:0.5 > {quantizer}", f"{quantizer} > wanda:0.5")
    )
    found = split_advantage(W, first, second, known)
    assert found.interference > 0.01  # in the first order's favour, by over 1 % of the output
    assert found.owner + found.interference == pytest.approx(found.whole, rel=1e-6)


def test_without_a_gram_matrix_errors_are_weighted_by_the_inputs():
    W, known = random_layer(3)
    first, second = (run(W, known, o) for o in ("wanda:0.5 > rtn:3", "rtn:3 > wanda:0.5"))
    norms = Statistics(100, {SquaredNorms: known[SquaredNorms]})
    found = split_advantage(W, first, second, norms)
    diagonal = statistics(known[SquaredNorms].diag())
    assert found == split_advantage(W, first, second, diagonal)
    size = norms.squared_error(W)
    expected = (
        norms.squared_error(second.weight - W) - norms.squared_error(first.weight - W)
    ) / size
    assert found.whole == pytest.approx(expected, rel=1e-4)


def test_a_layer_that_no_token_reached():
    W, _ = random_layer(4)
    first, second = (run(W, None, o) for o in ("magnitude:0.5 > rtn:3", "rtn:3 > magnitude:0.5"))
    idle = statistics(torch.zeros(64, 64), tokens=0)
    assert split_advantage(W, first, second, idle) == split_advantage(
        W, first, second, statistics(torch.eye(64))
    )


def test_a_layer_of_zeros():
    states = [
        LayerState(torch.zeros(2, 3), pruned=mask)
        for mask in (None, torch.ones(2, 3, dtype=torch.bool))
    ]
    assert split_advantage(torch.zeros(2, 3), *states, statistics(torch.eye(3))) == Split(
        0.0, 0.0, 0.0
    )


# Spearman's rho


def pairs(rho, count, seed):
    x, noise = np.random.default_rng(seed).standard_normal((2, count))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def test_rho_is_that_of_scipy_ties_included():
    x, y = pairs(0.5, 54, 0)
    for a, b in [(x, y), (np.round(x), np.round(2 * y))]:
        found = spearman(a.tolist(), b.tolist())
        assert found.rho == pytest.approx(stats.spearmanr(a, b).statistic)
        assert found.low < found.rho < found.high and found.reason == ""
        assert spearman(a.tolist(), b.tolist()) == found


def test_rho_of_what_rises_together_is_one():
    assert spearman([1, 2, 3, 5, 8], [1, 4, 9, 25, 64]) == Correlation(*[pytest.approx(1.0)] * 3)
    assert spearman([1, 2, 3, 5, 8], [-1, -4, -9, -25, -64]).high == pytest.approx(-1.0)


def test_the_interval_of_rho_holds_the_truth():
    truth = 6 / math.pi * math.asin(0.25)  # Spearman's rho of two normals correlated by 0.5
    found = [spearman(*pairs(0.5, 54, seed), resamples=400) for seed in range(200)]
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.91
    assert 0.3 < np.mean([each.high - each.low for each in found]) < 0.6


@pytest.mark.parametrize(
    "x, y, reason",
    [
        ([], [], "there are only 0 pairs"),
        ([1, 2], [1, 2], "there are only 2 pairs"),
        ([1, 2, 3], [5, 5, 5], "one of the two is the same in every pair"),
        ([0.1] * 3, [1, 2, 3], "one of the two is the same in every pair"),
    ],
)
def test_what_has_no_rho(x, y, reason):
    assert spearman(x, y) == Correlation(None, None, None, reason)


def test_a_rho_without_an_interval():
    count = 40  # a single odd one out is missing from 36 % of the samples: enough are left; of pairs of zeros not
    assert spearman(range(count), [0] * (count - 1) + [1]).low is not None
    found = spearman([0, 0, 0, 1], [0, 0, 1, 0])
    assert (
        found.rho == pytest.approx(-1 / 3)
        and found.low is None
        and "one figure only" in found.reason
    )


@pytest.mark.parametrize(
    "x, y", [([1, 2, 3], [1, 2]), ([1, 2, math.nan], [1, 2, 3]), ([1, 2, 3], [1, math.inf, 3])]
)
def test_what_is_no_pair_of_numbers(x, y):
    with pytest.raises(DataError, match="pairs of finite numbers"):
        spearman(x, y)
