"""Intervals over a handful of samples, layers and draws, against figures worked by hand."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.comparison import Difference
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.search.intervals import (
    WIDENING,
    conformal,
    extrapolate,
    interval,
    jackknife,
    possible,
    student,
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


# Jackknife


def test_a_jackknife_of_effects_that_add_up_is_their_spread():
    """Each draw's layers add c_r to the gap D; Tukey's pseudo-values are then D + (R - 1) c_r."""
    effects = tensor(0.4, 0.1, 0.3, 0.2)
    whole = effects.sum().repeat(6)
    reduced = (effects.sum() - effects)[:, None].repeat(1, 6)
    difference = jackknife(Perplexity(), whole, reduced)
    assert difference.mean == pytest.approx(1.0)
    assert difference.over == "draws, layers and samples"
    # 3 c_r have a standard deviation of 3 * 0.1291, and t of 3 degrees of freedom is 3.1824
    half = 3.1824463 * 3 * 0.12909944 / 4**0.5
    assert difference.high - 1.0 == pytest.approx(half)
    assert 1.0 - difference.low == pytest.approx(half)


def test_a_jackknife_is_about_the_whole_models():
    """Effects that do not add up move the mean of pseudo-values, and not the gap that was measured."""
    whole = tensor(1.0, 1.2, 0.8, 1.0)
    reduced = torch.stack([0.9 * whole, 0.5 * whole, 0.6 * whole])
    pseudo = 3 * whole - 2 * reduced
    assert pseudo.mean() != pytest.approx(1.0)
    difference = jackknife(Perplexity(), whole, reduced)
    expected = interval(Perplexity(), pseudo)
    assert difference.mean == pytest.approx(1.0)
    assert difference.high - difference.low == pytest.approx(expected.high - expected.low)
    assert (difference.high + difference.low) / 2 == pytest.approx(1.0)


def test_draws_that_change_nothing_add_nothing():
    whole = tensor(0.9, 1.2, 1.0, 1.1)
    reduced = (whole * 0.75).repeat(4, 1)
    difference = jackknife(Perplexity(), whole, reduced)
    plain = interval(Perplexity(), (4 * whole - 3 * 0.75 * whole).repeat(4, 1))
    assert difference.high - difference.mean == pytest.approx(plain.high - plain.mean)
    assert difference.mean == pytest.approx(1.05)


# What layers stand for


def around(mean, half, over="samples"):
    return Difference(mean, mean - half, mean + half, over, 0.95)


def test_a_gap_from_some_layers_is_open_by_samples_layers_and_bias():
    """M goes with the logarithm of the errors' ratio: 0.5 +- hypot(0.24, 0.1) of it, so 26 / 50."""
    difference = extrapolate(around(-2.0, 0.3), around(0.5, 0.24))
    half = (0.3**2 + (2.0 * 0.26 / 0.5) ** 2) ** 0.5
    assert (difference.low, difference.high) == pytest.approx((-2.0 - half, -2.0 + half))
    assert difference.mean == -2.0
    assert difference.over == "draws, layers and samples"
    assert difference.confidence == 0.95


def test_errors_that_are_as_close_as_some_that_misled_are_not_decisive():
    """In two cases of tiny-llama a ratio pointed the wrong way by 0.05 and 0.07."""
    certain = around(1.0, 0.0)
    for ratio in (0.05, 0.07):
        assert not extrapolate(certain, around(ratio, 0.0)).decisive
    for ratio in (0.15, 0.3):
        assert extrapolate(certain, around(ratio, 0.0)).decisive


def test_a_gap_never_reaches_beyond_what_the_metric_can_be():
    wide = Difference(-0.23, -1.08, 0.62, "samples", 0.95)
    assert possible(Accuracy(), wide) == Difference(-0.23, -1.0, 0.62, "samples", 0.95)
    assert possible(Perplexity(), wide) == wide


# Widening

PLANS = json.loads((Path(__file__).parents[2] / "benchmarks" / "plans.json").read_text())
"""Plans whose truth was measured in full (benchmarks/planner.py --only intervals)."""


def ratios(over):
    """Return how far the truth lay from the middle of each interval, in its half-widths."""
    return [abs(row["true"] - row["mean"]) / row["half"] for row in PLANS if row["over"] == over]


def test_widened_intervals_hold_the_truth_of_the_stored_plans():
    held = [
        row["mean"] - WIDENING[row["over"]] * row["half"]
        <= row["true"]
        <= row["mean"] + WIDENING[row["over"]] * row["half"]
        for row in PLANS
    ]
    assert len(held) >= 50
    assert sum(held) >= 0.95 * len(held)


@pytest.mark.parametrize("over", sorted({row["over"] for row in PLANS}))
def test_the_factors_are_those_that_the_stored_plans_ask_for(over):
    """And no larger: an interval that always holds the truth says nothing."""
    assert WIDENING[over] == pytest.approx(max(1.0, conformal(ratios(over))), abs=0.06)


def test_intervals_are_widened_around_their_middle():
    narrow = Difference(1.0, 0.5, 2.0, "draws, layers and samples", 0.95)
    factor = WIDENING[narrow.over]
    wide = widened(narrow)
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
