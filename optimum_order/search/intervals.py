"""Intervals of the differences that a planner sees: over a handful of samples, layers and draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scipy.special import ndtri, stdtr, stdtrit
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

WIDENING = {"M": 1.15, "M by a finer metric": 1.85}
"""By how much intervals of what a plan expects are wider than their own noise says: where M ranks,
and where a finer metric does, for M is then a threshold that noise in a few samples seldom crosses.
A sketch is not the model: of the plans whose truth was measured in full, 95 % hold the truth with
these factors (benchmarks/plans.json, from benchmarks/planner.py --only intervals)."""

_SUREST = 8.0
"""In standard deviations; two witnesses that contradict each other without a doubt add up to 0."""


def widened(difference: Difference, ranked_by: str = "M") -> Difference:
    """Return a difference with an interval that holds the truth as often as the interval says.

    Args:
        difference: What a plan expects.
        ranked_by: A key of `WIDENING`.
    """
    low, high = (
        difference.mean + WIDENING[ranked_by] * (end - difference.mean)
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


def extrapolate(measured: Difference, ratio: Difference, loss: float) -> Difference:
    """Return a gap in M with all that a sketch leaves open.

    What an order costs in M is taken to grow in proportion to its output error, so that another
    logarithm of the ratio of two orders' errors moves the gap by the loss times the change. The
    interval covers samples, what layers and draws leave open of the ratio, and `BIAS`.

    Args:
        measured: The gap with noise in the layers that were not looked at, over samples.
        ratio: The logarithm of the ratio of the two orders' output errors, over layers and draws.
        loss: M of the original less M of the two orders, their mean.
    """
    unknown = math.hypot(ratio.high - ratio.mean, BIAS)
    half = math.hypot(measured.high - measured.mean, max(0.0, loss) * unknown)
    low, high = measured.mean - half, measured.mean + half
    return Difference(measured.mean, low, high, OVER_ALL, CONFIDENCE)


def sureness(differences: Tensor, bias: float = 0.0) -> float:
    """Return how surely the mean of differences is above 0, in standard deviations of a normal.

    That is -1.64 or 1.64 where a t interval of 90 % touches 0.

    Args:
        differences: (samples,).
        bias: How far the mean may be off, however many there are, as half an interval of 95 %.
    """
    mean = differences.mean().item()
    count = len(differences)
    if count < 2 or mean == 0:
        return 0.0
    spread = math.hypot((differences.std() / count**0.5).item(), bias / float(ndtri(0.975)))
    tail = float(stdtr(count - 1, -abs(mean) / spread)) if spread else 0.0
    return math.copysign(min(_SUREST, -float(ndtri(tail))), mean)


def together(*witnesses: float) -> float:
    """Return how sure independent witnesses are together.

    Args:
        witnesses: From `sureness`.

    Source:
        Stouffer et al. 1949, The American Soldier I, 45: sum of z over the root of their number.
    """
    return sum(witnesses) / math.sqrt(len(witnesses))
