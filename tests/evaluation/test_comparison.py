"""Intervals hold what they promise: checked on data whose true mean is known."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from optimum_order.errors import DataError
from optimum_order.evaluation import Measurement, comparison
from optimum_order.evaluation.comparison import (
    Comparison,
    Flips,
    bootstrap_means,
    difference_over_draws,
    percentiles,
)


def layout(generator, draws, samples, s_draw, s_sample, s_error):
    """Differences of mean 0 with these components."""
    return (
        s_draw * torch.randn(draws, 1, generator=generator, dtype=torch.float64)
        + s_sample * torch.randn(1, samples, generator=generator, dtype=torch.float64)
        + s_error * torch.randn(draws, samples, generator=generator, dtype=torch.float64)
    )


def coverage(simulations, make):
    """How often the interval holds 0, the truth; and how wide it is on average."""
    generator = torch.Generator().manual_seed(0)
    intervals = [make(generator) for _ in range(simulations)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    width = np.mean([interval.high - interval.low for interval in intervals])
    return float(covered), float(width)


def over_samples(values, **options):
    """The difference of one draw, whose interval is the bootstrap's over samples."""
    return difference_over_draws(torch.as_tensor(values)[None], **options)


def test_the_bootstrap_interval():
    gain = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 1
    difference = over_samples(gain)
    assert difference.mean == pytest.approx(gain.mean().item(), rel=1e-5)
    # of 100 nearly normal differences, on which the bootstrap and Student agree
    half = stats.t.ppf(0.975, 99) * gain.std().item() / 10
    assert difference.mean - difference.low == pytest.approx(half, rel=0.1)
    assert difference.high - difference.mean == pytest.approx(half, rel=0.1)
    assert (difference.over, difference.confidence, difference.decisive) == ("samples", 0.95, True)
    assert difference == over_samples(gain)
    assert difference != over_samples(gain, seed=1)
    wider = over_samples(gain, confidence=0.99)
    assert wider.low < difference.low and wider.high > difference.high


def test_the_interval_is_scipys_bootstrap_at_moved_percentiles():
    values = np.random.default_rng(3).exponential(1, 20)
    low, high = percentiles(20, 0.9)
    assert low == pytest.approx(stats.norm.cdf(-np.sqrt(20 / 19) * stats.t.ppf(0.95, 19)))
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, confidence_level=high - low, method="percentile"
    )
    ours = over_samples(values, resamples=40_000, confidence=0.9)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)


def test_few_samples_are_covered_too():
    def make(generator):
        return difference_over_draws(layout(generator, 1, 12, 0, 1, 0), resamples=1000)

    covered, width = coverage(1000, make)
    assert covered >= 0.93  # plain percentiles: 0.90
    assert width < 1.25 * 2 * 1.96 / 12**0.5


def test_the_means_do_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    means = bootstrap_means(values, resamples=50, seed=0)
    assert means.shape == (50,) and abs(means.mean() - values.mean().item()) < 0.1
    monkeypatch.setattr(comparison, "_AT_ONCE", 7 * 30)
    assert (bootstrap_means(values, resamples=50, seed=0) == means).all()


def test_draws_and_samples_are_covered():
    """At two or three draws of 64 samples, without an absurdly wide interval."""
    for draws, components, widest in [
        (3, (0.0, 1.0, 1.0), 1.5),  # calibration makes no difference
        (3, (0.0, 0.0, 1.0), 2.1),  # nothing but noise of single runs
        (3, (0.2, 1.0, 1.0), 1.8),
        (3, (0.5, 1.0, 1.0), 2.1),  # one t with Satterthwaite's degrees of freedom holds 92 %
        (3, (0.2, 0.0, 1.0), 2.1),
        (
            3,
            (1.0, 0.1, 0.1),
            2.1,
        ),  # calibration alone: Student's t of 2 degrees is 2.2 times as wide
        (2, (0.5, 1.0, 1.0), None),
    ]:
        covered, width = coverage(
            1500, lambda g, a=draws, c=components: difference_over_draws(layout(g, a, 64, *c))
        )
        assert covered >= 0.93, components
        if widest is not None:
            s_draw, s_sample, s_error = components
            variance = s_draw**2 / draws + s_sample**2 / 64 + s_error**2 / (64 * draws)
            # against an interval that is told the components
            assert width <= widest * 2 * 1.96 * variance**0.5, components


def test_samples_alone_would_not_have_covered():
    def make(generator):
        return difference_over_draws(
            layout(generator, 3, 64, 0.5, 1, 1).mean(0, keepdim=True), resamples=500
        )

    assert coverage(300, make)[0] < 0.75


def test_the_formula_on_a_layout_worked_by_hand():
    # row means 2, 4; column means 1, 3, 5; grand mean 3; all residuals 0
    difference = difference_over_draws(torch.tensor([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]]))
    # MS_draw = 3 * (1 + 1) / 1 = 6, MS_sample = 2 * (4 + 0 + 4) / 2 = 8, MS_e = 0
    half = ((stats.t.ppf(0.975, 1) ** 2 * 6 + stats.t.ppf(0.975, 2) ** 2 * 8) / 6) ** 0.5
    interval = (difference.mean, difference.low, difference.high)
    assert interval == pytest.approx((3, 3 - half, 3 + half))
    assert difference.over == "draws and samples" and not difference.decisive


def test_draws_that_make_no_difference_at_all():
    """As with methods that need no calibration: only the samples are noise then."""
    row = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = difference_over_draws(row.expand(3, 64))
    half = stats.t.ppf(0.975, 63) * row.std().item() / 8
    mean = row.mean().item()
    assert (difference.low, difference.high) == pytest.approx((mean - half, mean + half))


def test_an_interval_decides_where_it_excludes_0():
    for draws in (1, 3):
        equal = difference_over_draws(torch.zeros(draws, 8))
        assert (equal.mean, equal.low, equal.high, equal.decisive) == (0, 0, 0, False)
        for sign in (-1, 1):
            assert difference_over_draws(torch.full((draws, 8), 0.5 * sign)).decisive


def test_differences_without_an_interval():
    for differences, options, message in [
        (torch.zeros(3, 1), {}, "at least two samples"),
        (torch.zeros(1, 1), {}, "at least two samples"),
        (torch.zeros(4), {}, r"shape \(draws, samples\), got \(4,\)"),
        (torch.zeros(0, 4), {}, r"shape \(draws, samples\), got \(0, 4\)"),
        (torch.tensor([[1.0, torch.nan]]), {}, "not finite"),
        (torch.zeros(3, 4), {"confidence": 95}, "between 0 and 1, got 95"),
    ]:
        with pytest.raises(DataError, match=message):
            difference_over_draws(differences, **options)


def test_a_difference_is_ready_for_json():
    differences = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) + 3
    facts = difference_over_draws(differences).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert list(facts) == ["mean", "low", "high", "over", "confidence", "decisive"]
    assert facts["decisive"] is True


def measured(*scores, **changes):
    facts = {"name": "accuracy", "value": 0.0, "standard_error": None, "higher_is_better": True}
    return Measurement(
        **facts | {"source": "made up", "digest": "12ab", "scores": scores} | changes
    )


def mcnemar(right, wrong):
    """The exact two-sided test, by counting: both tails of the binomial distribution."""
    count = right + wrong
    fewer = sum(math.comb(count, k) for k in range(min(right, wrong) + 1))
    return min(1.0, 2 * fewer / 2**count)


def test_flips_are_samples_that_one_model_alone_gets_right():
    for right, wrong, both in [(0, 0, 5), (1, 0, 3), (3, 9, 2), (12, 2, 0), (6, 6, 1)]:
        first = (1.0,) * right + (0.0,) * wrong + (1.0,) * both + (0.0,) * both
        second = (0.0,) * right + (1.0,) * wrong + (1.0,) * both + (0.0,) * both
        names = tuple(f"task/{number}" for number in range(len(first)))
        flips = Flips.between(measured(*first, names=names), measured(*second, names=names))
        assert flips.to_right == names[:right] and flips.to_wrong == names[right : right + wrong]
        assert flips.p == pytest.approx(mcnemar(right, wrong))
    assert Flips.between(measured(0.0, 1.0), measured(1.0, 1.0)).to_wrong == ("1",), "numbered"
    assert Flips.between(measured(0.0, 0.5), measured(1.0, 1.0)) is None


def test_two_measurements_are_compared_on_the_same_samples_alone():
    one = measured(1.0, 2.0, 4.0, higher_is_better=False)
    other = measured(1.5, 2.5, 5.0, higher_is_better=False)
    compared = Comparison.of(one, other)
    assert compared.difference.mean == pytest.approx(2 / 3), "a lower score is better"
    facts = compared.as_dict()
    assert json.loads(json.dumps(facts)) == facts and facts["flips"] is None
    for changes in ({"digest": "34cd"}, {"name": "fidelity"}):
        with pytest.raises(DataError, match="by one metric on the same samples"):
            Comparison.of(one, measured(1.5, 2.5, 5.0, **changes))
