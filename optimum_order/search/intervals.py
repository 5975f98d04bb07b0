"""Intervals of the differences that a planner sees: over a handful of samples, layers and draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scipy.special import stdtrit
from torch import Tensor

from optimum_order.evaluation import Metric
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.comparison import Difference, difference_over_draws

CONFIDENCE = 0.95
OVER_ALL = "draws, layers and samples"

BIAS = 0.1
"""How much the logarithm of the ratio of two orders' output errors may be off, when it stands for
M, whatever the number of layers. Chosen after two cases of tiny-llama in which it pointed the wrong
way by 0.05 and 0.07 (benchmarks/planner.py)."""

WIDENING = {"samples": 1.93, OVER_ALL: 2.62}
"""By how much intervals of what a plan expects are wider than their own noise says, by what they
cover. A sketch is not the model: of the plans whose truth was measured in full, 95 % hold the truth
with these factors (benchmarks/plans.json, from benchmarks/planner.py --only intervals)."""


def widened(difference: Difference) -> Difference:
    """Return a difference with an interval that holds the truth as often as the interval says."""
    factor = WIDENING[difference.over]
    low, high = (
        difference.mean + factor * (end - difference.mean)
        for end in (difference.low, difference.high)
    )
    return dataclasses.replace(difference, low=low, high=high)


def conformal(ratios: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Return the factor that widens intervals until they hold the truth.

    Args:
        ratios: Of intervals whose truth came out: how far it lay from the middle, in half-widths.
        confidence: The fraction that shall hold the truth of one more.

    Source:
        Vovk et al. 2005, Algorithmic Learning in a Random World: the (n + 1) confidence-th of n.
    """
    rank = math.ceil((len(ratios) + 1) * confidence)
    return sorted(ratios)[min(rank, len(ratios)) - 1]


def student(differences: Tensor, confidence: float = CONFIDENCE) -> Difference:
    """Return the mean and its t interval, which unlike a bootstrap is right for a handful.

    Args:
        differences: (samples,).
        confidence: Between 0 and 1.
    """
    mean = differences.mean().item()
    count = len(differences)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    half = quantile * (differences.std() / count**0.5).item()
    return Difference(mean, mean - half, mean + half, "samples", confidence)


def interval(metric: Metric, gaps: Tensor, over: str = "draws and samples") -> Difference:
    """Return the mean of gaps in M and its interval.

    Where no answer changed, of so few, the share of those that do may still be as large as the
    "rule of three" says.

    Args:
        metric: M.
        gaps: (draws, samples).
        over: What the interval covers, with more than one draw.
    """
    draws, samples = gaps.shape
    if isinstance(metric, Accuracy) and not gaps.any():
        most = 1 - (1 - CONFIDENCE) ** (1 / samples)
        return Difference(0.0, -most, most, over if draws > 1 else "samples", CONFIDENCE)
    if draws == 1:
        return student(gaps[0])
    return dataclasses.replace(difference_over_draws(gaps, confidence=CONFIDENCE), over=over)


def possible(metric: Metric, gap: Difference) -> Difference:
    """Return a gap in M without the part of its interval that lies beyond what M can be.

    Args:
        metric: M.
        gap: M of one order less M of another.
    """
    low, high = metric.bounds
    return gap.within(low - high, high - low)


def jackknife(metric: Metric, whole: Tensor, reduced: Tensor) -> Difference:
    """Return a gap between two models with its interval over draws, layers and samples.

    With D the gap and D_r the gap without the layers of draw r, R D - (R - 1) D_r are as good as R
    independent estimates of D, which vary with draws, layers and samples.

    Args:
        metric: M.
        whole: D, (samples,).
        reduced: D_r, (draws, samples), of two draws or more.

    Source:
        Tukey 1958, Annals of Mathematical Statistics 29, 614: pseudo-values.
    """
    count = len(reduced)
    spread = interval(metric, count * whole - (count - 1) * reduced, OVER_ALL)
    center = interval(metric, whole[None]).mean
    shift = center - spread.mean
    return dataclasses.replace(
        spread, mean=center, low=spread.low + shift, high=spread.high + shift
    )


def extrapolate(measured: Difference, ratio: Difference) -> Difference:
    """Return a gap in M where only some layers were compressed and noise stands for the others.

    M is taken to differ in proportion to the logarithm of the ratio of output errors. The interval
    covers samples, what layers and draws leave open of the ratio, and `BIAS`.

    Args:
        measured: The gap with noise in the other layers, over samples.
        ratio: The logarithm of the ratio of the two orders' output errors, over layers and draws;
            its mean is positive.
    """
    unknown = math.hypot(ratio.high - ratio.mean, BIAS)
    over_layers = abs(measured.mean) * unknown / ratio.mean
    half = math.hypot(measured.high - measured.mean, over_layers)
    return Difference(
        measured.mean, measured.mean - half, measured.mean + half, OVER_ALL, CONFIDENCE
    )
