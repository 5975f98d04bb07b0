"""Intervals over a handful of samples, layers and draws, against figures worked by hand."""

import json
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.comparison import Difference
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.search.intervals import (
    BIAS,
    WIDENING,
    conformal,
    extrapolate,
    interval,
    possible,
    student,
    sureness,
    together,
    widened,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_interval_over_samples_is_students():
    difference = student(tensor(1.0, 2.0, 3.0, 4.0), 0.95)
    assert difference.mean == 2.5
    assert difference.high - 2.5 == pytest.approx(3.1824463 * 1.2909944 / 2)
    assert 2.5 - difference.low == pytest.approx(3.1824463 * 1.2909944 / 2)
    assert difference.over == "samples"
    assert isinstance(difference.decisive, bool)


def test_one_draw_is_an_interval_over_samples():
    gaps = tensor([1.0, 2.0, 3.0, 4.0])
    assert interval(Perplexity(), gaps) == student(gaps[0])
    two = interval(Perplexity(), gaps.repeat(2, 1), "draws, layers and samples")
    assert two.over == "draws, layers and samples"
    assert two.mean == 2.5


def test_accuracy_that_did_not_change_is_not_known_exactly():
    difference = interval(Accuracy(), torch.zeros(1, 59))
    # 0.95 ** 59 is 5 % left
    assert (difference.low, difference.high) == pytest.approx((-0.0495, 0.0495), abs=1e-4)
    assert not difference.decisive
    exact = interval(Perplexity(), torch.zeros(1, 59))
    assert exact.low == exact.high == 0


# What layers stand for


def around(mean, half, over="samples"):
    return Difference(mean, mean - half, mean + half, over, 0.95)


def test_a_gap_from_some_layers_is_open_by_samples_layers_and_bias():
    """The errors' ratio is open by hypot(0.24, 0.1) = 0.26, of which each 1 is worth the loss of 3."""
    difference = extrapolate(around(2.0, 0.3), around(0.5, 0.24), loss=3.0)
    half = (0.3**2 + (3.0 * 0.26) ** 2) ** 0.5
    assert (difference.low, difference.high) == pytest.approx((2.0 - half, 2.0 + half))
    assert difference.mean == 2.0
    assert difference.over == "draws, layers and samples"
    assert difference.confidence == 0.95


def test_errors_that_are_as_close_as_some_that_misled_are_not_decisive():
    """In two cases of tiny-llama a ratio pointed the wrong way by 0.05 and 0.07; M goes with it."""
    for ratio, is_decisive in [(0.05, False), (0.07, False), (0.15, True), (0.3, True)]:
        gap = extrapolate(around(2.0 * ratio, 0.0), around(ratio, 0.0), loss=2.0)
        assert gap.decisive == is_decisive


def test_where_nothing_is_lost_layers_leave_nothing_open():
    for loss in (0.0, -1.0):
        difference = extrapolate(around(0.1, 0.3), around(0.5, 0.24), loss)
        assert (difference.low, difference.high) == pytest.approx((-0.2, 0.4))


# Two witnesses


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1),
    st.floats(0.05, 0.95),
)
def test_a_mean_is_as_sure_as_the_interval_that_ends_at_zero(values, confidence):
    differences = tensor(*values)
    spread = student(differences, confidence)
    sure = abs(sureness(differences))
    level = NormalDist().inv_cdf((1 + confidence) / 2)
    if sure < 7.9 and abs(sure - level) > 1e-6:
        assert (sure > level) == (spread.low > 0 or spread.high < 0)
    assert sureness(-differences) == pytest.approx(-sureness(differences))


def test_a_ratio_of_errors_that_may_be_off_is_less_sure():
    """0.053 +- 0.001 in all layers of tiny-resnet pointed the wrong way."""
    ratios = tensor(0.052, 0.053, 0.054, 0.053)
    assert sureness(ratios) > 3
    assert 0 < sureness(ratios, BIAS) < 1
    assert sureness(tensor(0.5, 0.51, 0.52, 0.53), BIAS) > 2.5


def test_the_surest_is_finite_and_one_sample_says_nothing():
    assert sureness(tensor(1.0, 1.0, 1.0)) == 8.0
    assert sureness(tensor(-1.0, -1.0)) == -8.0
    assert sureness(tensor(0.0, 0.0)) == sureness(tensor(3.0)) == 0.0


def test_witnesses_add_up_and_take_each_other_back():
    assert together(1.2, 1.2) == pytest.approx(1.2 * 2**0.5)
    assert together(3.0, -3.0) == 0.0
    assert together(2.0) == 2.0


def test_a_gap_never_reaches_beyond_what_the_metric_can_be():
    wide = Difference(-0.23, -1.08, 0.62, "samples", 0.95)
    assert possible(Accuracy(), wide) == Difference(-0.23, -1.0, 0.62, "samples", 0.95)
    assert possible(Perplexity(), wide) == wide


# Widening

PLANS = json.loads((Path(__file__).parents[2] / "benchmarks" / "plans.json").read_text())
"""Plans whose truth was measured in full (benchmarks/planner.py --only intervals)."""


def ratios(ranked_by):
    """Return how far the truth lay from the middle of each interval, in its half-widths."""
    rows = [row for row in PLANS if row["ranked_by"] == ranked_by]
    return [abs(row["true"] - row["mean"]) / row["half"] for row in rows]


def test_widened_intervals_hold_the_truth_of_the_stored_plans():
    held = [ratio <= factor for kind, factor in WIDENING.items() for ratio in ratios(kind)]
    assert len(held) == len(PLANS) >= 50
    assert sum(held) >= 0.95 * len(held)


@pytest.mark.parametrize("ranked_by", WIDENING)
def test_the_factors_are_those_that_the_stored_plans_ask_for(ranked_by):
    """And no larger: an interval that always holds the truth says nothing."""
    assert WIDENING[ranked_by] == pytest.approx(max(1.0, conformal(ratios(ranked_by))), abs=0.06)


@pytest.mark.parametrize("ranked_by", WIDENING)
def test_intervals_are_widened_around_their_middle(ranked_by):
    narrow = Difference(1.0, 0.5, 2.0, "draws, layers and samples", 0.95)
    factor = WIDENING[ranked_by]
    wide = widened(narrow, ranked_by)
    assert wide.mean == 1.0
    assert (wide.low, wide.high) == pytest.approx((1 - factor * 0.5, 1 + factor))


def test_a_conformal_factor_holds_the_truth_of_one_more():
    """Of 40 intervals and one more, 95 % are 39; fewer than 19 cannot say, and take the largest."""
    assert conformal([number / 10 for number in range(40)], 0.95) == 3.8
    assert conformal([0.5, 2.0, 1.0], 0.95) == 2.0


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.floats(0.5, 0.99))
def test_a_conformal_factor_covers_at_least_what_it_says(values, confidence):
    factor = conformal(values, confidence)
    assert sum(value <= factor for value in values) >= min(
        confidence * len(values), len(values)
    ) or factor == max(values)
