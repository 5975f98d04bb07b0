"""Comparison of two models that are measured on the same samples, pair by pair.

**Over samples.** The percentile bootstrap of the mean difference. Alone, this interval is too
narrow for few samples, so its percentiles are moved out to where they would give Student's t
interval for normal data (the "expanded percentile" interval of Hesterberg 2015, The American
Statistician 69(4), section 5.3): Phi(-sqrt(n / (n-1)) t).

**Over draws and samples together.** A compression that calibrates differs from one calibration draw
to the next, so the difference y_ij of draw i on sample j has two sources of noise that cross, and
their interaction:

    y_ij = mu + draw_i + sample_j + e_ij,      i = 1..a,  j = 1..b
    Var(mean of y) = s_draw^2 / a + s_sample^2 / b + s_e^2 / (ab)

The mean squares of the two-way layout without replication estimate s_draw^2 / a + s_e^2 / (ab) as
MS_draw / (ab), and s_sample^2 / b as (MS_sample - MS_e) / (ab), set to 0 where that is negative.
The half-width is

    h^2 = t_{a-1}^2 MS_draw / (ab) + t_{b-1}^2 max(MS_sample - MS_e, 0) / (ab)

with a quantile of Student's t for each part, as in Banerjee 1960 (Sankhya 22, 357-358), whose
interval for a sum of independent mean squares never covers less than stated. The interval is exact
where one of the two parts is zero. The usual single t, with Satterthwaite's degrees of freedom for
the whole variance, takes these from a mean square that has only a - 1 of its own: in simulations at
95 %, that interval covered as little as 92 % with 3 draws and 87 % with 2, and this one 95 % or
more.

**Right and wrong.** Where each score is 0 or 1, only samples that one model gets right and the
other wrong tell the two apart. If the models are equally good, each such flip goes either way with
probability 1/2: the exact test of McNemar 1947 (Psychometrika 12, 153-157) is the two-sided
binomial test of the smaller number.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit
from scipy.stats import binomtest
from torch import Tensor

from optimum_order.errors import DataError
from optimum_order.evaluation.base import Measurement

_AT_ONCE = 2**22
"""Random indices in memory."""


@dataclass(frozen=True)
class Difference:
    """A mean difference in M and its confidence interval; positive where the first model is better.

    Args:
        mean: Mean of the differences.
        low: Lower end of the interval.
        high: Upper end of the interval.
        over: The noise that the interval covers: other "samples", or other "draws and samples".
        confidence: The fraction of such intervals that hold the true mean.
    """

    mean: float
    low: float
    high: float
    over: str
    confidence: float

    @property
    def decisive(self) -> bool:
        """Whether the interval excludes 0, so that the sign is certain."""
        return self.low > 0 or self.high < 0

    def within(self, low: float, high: float) -> Difference:
        """Return the difference with its interval cut off where no difference can be.

        A t interval over a handful of samples reaches beyond what is possible, such as -108 points
        of accuracy. Cutting off the impossible leaves the coverage as it is.

        Args:
            low: The least that the difference can be.
            high: The most that the difference can be.
        """
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict, ready for JSON."""
        return asdict(self) | {"decisive": self.decisive}


@dataclass(frozen=True)
class Flips:
    """Samples that one model gets right and another wrong.

    Args:
        to_right: The names of samples that the first model gets right and the second wrong.
        to_wrong: The names of those the other way round.
        p: The probability of so uneven numbers, or more so, if both models are equally good: the
            exact test of McNemar.
    """

    to_right: tuple[str, ...]
    to_wrong: tuple[str, ...]
    p: float

    @classmethod
    def between(cls, first: Measurement, second: Measurement) -> Flips | None:
        """Return the flips from the second model to the first; None if scores are not 0 or 1.

        Args:
            first: One model.
            second: Another model on the same samples.

        Source:
            McNemar 1947, Psychometrika 12, 153-157.
        """
        if not {0.0, 1.0}.issuperset((*first.scores, *second.scores)):
            return None
        names = first.names or tuple(str(number) for number in range(1, len(first.scores) + 1))
        pairs = list(zip(names, first.scores, second.scores, strict=True))
        to_right = tuple(name for name, mine, other in pairs if mine > other)
        to_wrong = tuple(name for name, mine, other in pairs if mine < other)
        count = len(to_right) + len(to_wrong)
        p = float(binomtest(len(to_right), count, 0.5).pvalue) if count else 1.0
        return cls(to_right, to_wrong, p)


@dataclass(frozen=True)
class Comparison:
    """Two models, measured by one metric on the same samples.

    Args:
        difference: M of the first model less M of the second, with its interval over samples.
        flips: Where scores are 0 or 1, the samples that tell the models apart.
    """

    difference: Difference
    flips: Flips | None

    @classmethod
    def of(cls, first: Measurement, second: Measurement) -> Comparison:
        """Compare two measurements.

        Args:
            first: The model in question.
            second: What it is compared with.

        Raises:
            DataError: If they are of different metrics or samples, or of a single sample.
        """
        if (first.name, first.digest) != (second.name, second.digest):
            raise DataError(
                f"Two models are compared by one metric on the same samples, got {first.name} on "
                f"{first.source} and {second.name} on {second.source}, whose digests are "
                f"{first.digest[:8]} and {second.digest[:8]}: the models read in different ways, "
                "such as with other tokenizers."
            )
        differences = first.performances - second.performances
        difference = difference_over_draws(differences[None])
        return cls(difference, Flips.between(first, second))

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        flips = None if self.flips is None else asdict(self.flips)
        return {"difference": self.difference.as_dict(), "flips": flips}


def difference_over_draws(
    differences: Tensor, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Return the mean difference over calibration draws and samples together, with its interval.

    One draw says nothing about others: the interval is then the bootstrap's over samples, and says
    so in `over`.

    Args:
        differences: (draws, samples), M of one model less M of the other, on the same samples.
        resamples: Bootstrap samples, used for a single draw only.
        confidence: The confidence of the interval, between 0 and 1.
        seed: The seed of the resampling.

    Raises:
        DataError: If there are fewer than two samples, or a difference is not finite.

    Source:
        Hesterberg 2015, section 5.3, for one draw; Banerjee 1960, applied to the mean squares of a
        two-way layout, for several: see the top of this file.
    """
    if differences.ndim != 2 or 0 in differences.shape:
        raise DataError(
            f"Differences must be of shape (draws, samples), got {tuple(differences.shape)}."
        )
    if len(differences) == 1:
        return _over_samples(differences[0], resamples, confidence, seed)
    y = _checked(differences, confidence)
    draws, samples = y.shape
    mean = y.mean()
    draw_means = y.mean(1, keepdim=True)
    sample_means = y.mean(0, keepdim=True)
    errors = y - draw_means - sample_means + mean
    ms_draw = samples * (draw_means - mean).square().sum() / (draws - 1)
    ms_sample = draws * (sample_means - mean).square().sum() / (samples - 1)
    ms_error = errors.square().sum() / ((draws - 1) * (samples - 1))
    t_draw, t_sample = (stdtrit(n - 1, (1 + confidence) / 2) for n in (draws, samples))
    squared = (t_draw**2 * ms_draw + t_sample**2 * (ms_sample - ms_error).clamp(min=0)) / y.numel()
    half = squared.sqrt().item()
    center = mean.item()
    return Difference(center, center - half, center + half, "draws and samples", confidence)


def _over_samples(differences: Tensor, resamples: int, confidence: float, seed: int) -> Difference:
    y = _checked(differences, confidence)
    means = bootstrap_means(y, resamples=resamples, seed=seed)
    low, high = np.quantile(means, percentiles(len(y), confidence))
    return Difference(y.mean().item(), float(low), float(high), "samples", confidence)


def _checked(differences: Tensor, confidence: float) -> Tensor:
    if not 0 < confidence < 1:
        raise DataError(f"The confidence must be between 0 and 1, got {confidence}.")
    if differences.shape[-1] < 2:
        raise DataError("An interval needs at least two samples, got one. Measure on more samples.")
    if not differences.isfinite().all():
        raise DataError(
            "A difference between two models is not finite, because a score is not. Leave that "
            "model out."
        )
    return differences.double()


def bootstrap_means(values: Tensor, *, resamples: int, seed: int) -> np.ndarray[Any, Any]:
    """Return the means of bootstrap samples, (resamples,) float64.

    Args:
        values: (samples,).
        resamples: Bootstrap samples.
        seed: The seed of the resampling.
    """
    array = values.double().numpy()
    count = len(array)
    generator = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // count)
    parts = []
    for start in range(0, resamples, step):
        index = generator.integers(0, count, (min(step, resamples - start), count))
        parts.append(array[index].mean(-1))
    return np.concatenate(parts)


def percentiles(count: int, confidence: float) -> tuple[float, float]:
    """Return the two fractions of the bootstrap distribution that bound the interval of a mean.

    Args:
        count: The number of samples.
        confidence: The confidence of the interval, between 0 and 1.
    """
    t = stdtrit(count - 1, (1 + confidence) / 2)
    low = float(ndtr(-math.sqrt(count / (count - 1)) * t))
    return low, 1 - low
