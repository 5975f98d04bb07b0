"""Intervals hold what they promise: checked on data whose true mean is known."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from optimum_order.errors import DataError
from optimum_order.evaluation import Measurement
from optimum_order.evaluation.comparison import (
    bootstrap_means,
    difference_over_draws,
    paired_bootstrap,
    paired_differences,
    percentiles,
)


def measurement(scores, *, name="perplexity", higher=False, digest="0" * 64):
    return Measurement(name, 1.0, None, tuple(float(s) for s in scores), higher, "made up", digest)


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
    found = [make(generator) for _ in range(simulations)]
    return float(np.mean([d.low <= 0 <= d.high for d in found])), float(
        np.mean([d.high - d.low for d in found])
    )


def test_differences_are_of_m_and_higher_is_better():
    assert paired_differences(measurement([1, 2]), measurement([3, 7])).tolist() == [
        2,
        5,
    ]  # less loss is better
    one, other = (measurement(s, name="accuracy", higher=True) for s in ([1, 1], [0, 1]))
    assert paired_differences(one, other).tolist() == [1, 0]


@pytest.mark.parametrize(
    "other, message",
    [
        (measurement([1, 2], name="fidelity"), "one metric.*'perplexity' and 'fidelity'"),
        (measurement([1, 2], digest="1" * 64), "the same samples"),
        (measurement([1, 2, 3]), "the same samples"),
    ],
)
def test_what_cannot_be_compared(other, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(measurement([1, 2]), other)


def test_the_bootstrap_interval():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(100, generator=generator) * 5
    gain = torch.randn(100, generator=generator) + 1
    found = paired_bootstrap(measurement(before - gain), measurement(before))
    assert found.mean == pytest.approx(gain.mean().item(), rel=1e-5)
    # 100 nearly normal differences: the bootstrap and Student agree, pairs make it narrow though samples differ a lot
    half = stats.t.ppf(0.975, 99) * gain.std().item() / 10
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.over == "samples" and found.confidence == 0.95 and found.decisive
    assert found == paired_bootstrap(measurement(before - gain), measurement(before))
    assert found != paired_bootstrap(measurement(before - gain), measurement(before), seed=1)
    wider = paired_bootstrap(measurement(before - gain), measurement(before), confidence=0.99)
    assert wider.low < found.low and wider.high > found.high


def test_the_interval_is_scipys_bootstrap_at_moved_percentiles():
    values = np.random.default_rng(3).exponential(1, 20)
    low, high = percentiles(20, 0.9)
    assert low == pytest.approx(stats.norm.cdf(-np.sqrt(20 / 19) * stats.t.ppf(0.95, 19)))
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, confidence_level=high - low, method="percentile"
    )
    ours = paired_bootstrap(
        measurement(-values), measurement(np.zeros(20)), resamples=40_000, confidence=0.9
    )
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)


def test_few_samples_are_covered_too():
    def make(generator):
        return difference_over_draws(layout(generator, 1, 12, 0, 1, 0), resamples=1000)

    found, width = coverage(1000, make)
    assert found >= 0.93  # plain percentiles: 0.90
    assert width < 1.25 * 2 * 1.96 / 12**0.5


def test_rows_are_resampled_together():
    values = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    means = bootstrap_means(
        torch.stack([values[0], 2 * values[0] + 1, values[1]]), resamples=50, seed=0
    )
    assert means.shape == (3, 50)
    assert means[1] == pytest.approx(2 * means[0] + 1)
    assert not np.allclose(means[0], means[2])


@pytest.mark.parametrize(
    "components, widest",
    [
        ((0.0, 1.0, 1.0), 1.5),  # calibration makes no difference
        ((0.0, 0.0, 1.0), 2.1),  # nothing but noise of single runs
        ((0.2, 1.0, 1.0), 1.8),
        ((0.5, 1.0, 1.0), 2.1),  # where one t with Satterthwaite's degrees of freedom holds 92 %
        ((0.2, 0.0, 1.0), 2.1),
        (
            (1.0, 0.1, 0.1),
            2.1,
        ),  # calibration is all: Student's t of 2 degrees of freedom is 2.2 times as wide
    ],
)
def test_three_draws_of_64_samples_are_covered(components, widest):
    def make(generator):
        return difference_over_draws(layout(generator, 3, 64, *components))

    found, width = coverage(1500, make)
    s_draw, s_sample, s_error = components
    known = 2 * 1.96 * (s_draw**2 / 3 + s_sample**2 / 64 + s_error**2 / 192) ** 0.5
    assert found >= 0.93
    assert (
        width <= widest * known
    )  # not absurdly wide, against an interval that knows the components


def test_two_draws_are_covered():
    found, _ = coverage(
        1500, lambda generator: difference_over_draws(layout(generator, 2, 64, 0.5, 1, 1))
    )
    assert found >= 0.93


def test_samples_alone_would_not_have_covered():
    def make(generator):
        return difference_over_draws(
            layout(generator, 3, 64, 0.5, 1, 1).mean(0, keepdim=True), resamples=500
        )

    assert coverage(300, make)[0] < 0.75


def test_the_formula_on_a_layout_worked_by_hand():
    # row means 2, 4; column means 1, 3, 5; grand mean 3; all residuals 0
    found = difference_over_draws(torch.tensor([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]]))
    # MS_draw = 3 * (1 + 1) / 1 = 6, MS_sample = 2 * (4 + 0 + 4) / 2 = 8, MS_e = 0
    half = ((stats.t.ppf(0.975, 1) ** 2 * 6 + stats.t.ppf(0.975, 2) ** 2 * 8) / 6) ** 0.5
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert found.over == "draws and samples" and not found.decisive


def test_draws_that_make_no_difference_at_all():
    """As with methods that need no calibration: only the samples are noise then."""
    row = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = difference_over_draws(row.expand(3, 64))
    half = stats.t.ppf(0.975, 63) * row.std().item() / 8
    assert (found.low, found.high) == pytest.approx(
        (row.mean().item() - half, row.mean().item() + half)
    )


def test_one_draw_is_the_bootstrap_over_samples():
    row = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = difference_over_draws(row[None])
    assert found.over == "samples"
    assert found == paired_bootstrap(measurement(-row), measurement([0] * 20))


@pytest.mark.parametrize("draws", [1, 3])
def test_equal_models(draws):
    found = difference_over_draws(torch.zeros(draws, 8))
    assert (found.mean, found.low, found.high, found.decisive) == (0, 0, 0, False)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("draws", [1, 3])
def test_what_is_decisive(draws, sign):
    assert difference_over_draws(torch.full((draws, 8), 0.5 * sign)).decisive


@pytest.mark.parametrize(
    "differences, options, message",
    [
        (torch.zeros(3, 1), {}, "at least two samples"),
        (torch.zeros(1, 1), {}, "at least two samples"),
        (torch.zeros(4), {}, r"shape \(draws, samples\), got \(4,\)"),
        (torch.zeros(0, 4), {}, r"shape \(draws, samples\), got \(0, 4\)"),
        (torch.tensor([[1.0, torch.nan]]), {}, "not finite"),
        (torch.zeros(3, 4), {"confidence": 95}, "between 0 and 1, got 95"),
    ],
)
def test_what_has_no_interval(differences, options, message):
    with pytest.raises(DataError, match=message):
        difference_over_draws(differences, **options)


def test_it_is_ready_for_json():
    found = difference_over_draws(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) + 3
    ).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert (
        set(found) == {"mean", "low", "high", "over", "confidence", "decisive"}
        and found["decisive"] is True
    )
