"""What an order is worth: gap, compression-equivalent ratio, order advantage, and where the advantage comes from.

With phi the pretrained model, f a method, and M a performance, higher is better (Kim et al. 2026, arXiv 2603.18426):

    G(f1, f2)   = M(f1(phi)) - M(f2(phi))                > 0 where f2 is the stronger perturbation
    C*_f        = 1 - b/16                               at the width b at which quantising alone reaches M(f(phi))
    x           = C*_P - C*_Q                            how much stronger the pruning is than the quantising
    A(f1 -> f2) = M((f2 . f1)(phi)) - M((f1 . f2)(phi))  > 0 where f1 first is better

The advantage of a layer is that of its output error E(W') = tr(D H D^T), with D = W' - W and H = X^T X.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from optimum_order.errors import DataError
from optimum_order.evaluation import Measurement
from optimum_order.evaluation.comparison import (
    Difference,
    bootstrap_means,
    difference_over_draws,
    paired_bootstrap,
    paired_differences,
    percentiles,
)
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics

Bound = Literal["exact", "at least", "at most", "unknown"]
_FULL_WIDTH = 16  # bits of a weight before compression, as the ratio counts them


def performance_gap(
    m1: Measurement, m2: Measurement, *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """G(f1, f2) = M(f1(phi)) - M(f2(phi)); positive where f2 is the stronger perturbation.

    Args:
        m1: Of f1(phi).
        m2: Of f2(phi), on the same samples.
        confidence: Of the paired bootstrap interval.
        seed: Of the bootstrap.

    Raises:
        DataError: If the two cannot be compared.
    """
    return paired_bootstrap(m1, m2, confidence=confidence, seed=seed)


def order_advantage(
    forward: Measurement | Sequence[Measurement],
    reverse: Measurement | Sequence[Measurement],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """A(f1 -> f2) = M((f2 . f1)(phi)) - M((f1 . f2)(phi)); positive where f1 first is better.

    Args:
        forward: Of f1 then f2; or one for each calibration draw.
        reverse: Of f2 then f1, with the same calibration, on the same samples; as many as `forward`.
        confidence: Of the interval, which is over samples for one draw and over draws and samples for more.
        seed: Of the bootstrap.

    Raises:
        DataError: If there are not as many of one as of the other, or they were not measured on the same samples.
    """
    forward, reverse = ([m] if isinstance(m, Measurement) else list(m) for m in (forward, reverse))
    if len(forward) != len(reverse) or not forward:
        raise DataError(
            f"Both orders need a measurement for each calibration draw, got {len(forward)} and {len(reverse)}."
        )
    if len({(measurement.name, measurement.digest) for measurement in forward}) > 1:
        raise DataError(
            "Every calibration draw must be measured by one metric on the same samples."
        )
    pairs = zip(forward, reverse, strict=True)
    differences = torch.stack([paired_differences(after, before) for after, before in pairs])
    return difference_over_draws(differences, confidence=confidence, seed=seed)


@dataclass(frozen=True)
class Ratio:
    """A compression ratio, or a difference of two, as far as it was measured.

    Args:
        value: The ratio, or the bound.
        bound: "exact", or that it is "at least" or "at most" `value`; "unknown" where the bounds of two ratios leave
            their difference open.
    """

    value: float
    bound: Bound = "exact"

    def __sub__(self, other: Ratio) -> Ratio:
        opposite: dict[Bound, Bound] = {"at least": "at most", "at most": "at least"}
        bounds = {self.bound, opposite.get(other.bound, other.bound)} - {"exact"}
        bound: Bound = "exact" if not bounds else bounds.pop() if len(bounds) == 1 else "unknown"
        return Ratio(self.value - other.value, bound)


def compression_equivalent_ratio(performance: float, curve: Mapping[float, float]) -> Ratio:
    """C*_f: the ratio 1 - b/16 at which quantising alone reaches this performance.

    Between two measured widths b is interpolated linearly in M. Where a wider one did worse than a narrower (noise),
    the best of all widths up to it counts in its place, so that C* is the largest ratio at which this performance is
    reached. Beyond the measured widths the ratio of the outermost is a bound; nothing is extrapolated.

    Args:
        performance: M(f(phi)).
        curve: M of the reference quantiser alone, by its bits in (0, 16].

    Raises:
        DataError: If the curve is empty, or something is not a finite number.
    """
    widths = sorted(curve)
    if not widths or not all(0 < bits <= _FULL_WIDTH for bits in widths):
        raise DataError(
            f"The curve of a quantiser needs widths in bits above 0 and up to 16, got {widths}."
        )
    if not math.isfinite(performance) or not all(map(math.isfinite, curve.values())):
        raise DataError(
            f"A compression-equivalent ratio needs finite performances, got {performance} and a curve of "
            f"{dict(sorted(curve.items()))}. Leave out widths at which the model breaks."
        )
    best = list(itertools.accumulate((curve[bits] for bits in widths), max))
    at = bisect.bisect_left(best, performance)  # the narrowest width that reaches it
    if at == len(widths):
        return Ratio(_ratio(widths[-1]), "at most")
    if best[at] == performance:
        return Ratio(_ratio(widths[at]))
    if at == 0:
        return Ratio(_ratio(widths[0]), "at least")
    part = (performance - best[at - 1]) / (best[at] - best[at - 1])
    return Ratio(_ratio(widths[at - 1] + part * (widths[at] - widths[at - 1])))


def _ratio(bits: float) -> float:
    return 1 - bits / _FULL_WIDTH


def compression_equivalent_interval(
    performances: Tensor,
    curve: Mapping[float, Tensor],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Ratio, Ratio]:
    """The bootstrap interval of C*_f over samples; the method and the whole curve are resampled together.

    Args:
        performances: `Measurement.performances` of f(phi), (samples,).
        curve: The same of the reference quantiser, by its bits.
        resamples: Bootstrap samples.
        confidence: Between 0 and 1.
        seed: Of the resampling.

    Returns:
        Its ends. One that lies beyond the measured widths is the bound that is known.

    Raises:
        DataError: If they are not of the same number of samples, or there are fewer than two.
    """
    widths, count = list(curve), len(performances)
    if count < 2 or any(curve[bits].shape != performances.shape for bits in widths):
        raise DataError(
            f"The method and the curve must be measured on the same samples, two or more; got {count} and "
            f"{[len(curve[bits]) for bits in widths]}."
        )
    means = bootstrap_means(
        torch.stack([performances, *(curve[bits] for bits in widths)]),
        resamples=resamples,
        seed=seed,
    )
    found = [
        compression_equivalent_ratio(performance, dict(zip(widths, values, strict=True)))
        for performance, *values in means.T.tolist()
    ]
    # below the least exact ratio, and above the largest, come the bounds of the same value
    found.sort(key=lambda ratio: (ratio.value, ("at most", "exact", "at least").index(ratio.bound)))
    low, high = percentiles(count, confidence)
    last = len(found) - 1
    return found[math.floor(low * last)], found[math.ceil(high * last)]


def intensity(pruning: float, quantization: float, curve: Mapping[float, float]) -> Ratio:
    """X = C*_P - C*_Q: how much stronger pruning is than quantising, in units of one reference quantiser.

    Where Q is that quantiser at a measured width, C*_Q is its own ratio C_Q = 1 - b/16 and this is the paper's
    C*_P - C_Q.

    Args:
        pruning: M(P(phi)).
        quantization: M(Q(phi)).
        curve: M of the reference quantiser alone, by its bits.

    Returns:
        The difference, a bound where one of the two is, "unknown" where both are and point opposite ways.

    Raises:
        DataError: As `compression_equivalent_ratio`.
    """
    return compression_equivalent_ratio(pruning, curve) - compression_equivalent_ratio(
        quantization, curve
    )


@dataclass(frozen=True)
class Split:
    """The advantage of one order of a layer over another, and where it comes from.

    In units of the layer's output: squared error over tr(W H W^T). Positive where the first order has less error.

    Args:
        whole: E of the second less E of the first.
        owner: The part from weights that one order prunes and the other does not.
        interference: The part from all others.
    """

    whole: float
    owner: float
    interference: float


@torch.no_grad()
def split_advantage(
    original: Tensor, first: LayerState, second: LayerState, statistics: Statistics
) -> Split:
    """Split a layer's order advantage into owner changes and interference.

    With D = W' - W and a symmetric H,

        E(W2) - E(W1) = tr(D2 H D2^T) - tr(D1 H D1^T) = sum_ij (D2 - D1)_ij ((D2 + D1) H)_ij

    which gives every weight a share, 0 where both orders leave it the same. A share counts the errors of the other
    weights of its row too, since outputs add up over a row. A weight's owner is the pruner if it is `pruned`, else
    the quantiser.

    Args:
        original: W (out, in).
        first: The layer after one order.
        second: The layer after the other.
        statistics: Of its inputs, in the original model. Without a Gram matrix H is diagonal; the inputs of a layer
            that no token reached are taken as white noise.

    Returns:
        The split, `owner + interference == whole` up to the rounding of float64. `whole` is computed from the two
        errors alone. A layer whose outputs are all zero is in absolute units.
    """
    known = statistics if statistics.tokens else statistics.isotropic()
    H = known[Gram] if Gram in known else known[SquaredNorms].diag()
    H = H.double()
    H = (H + H.T) / 2  # rounding may leave a Gram matrix unsymmetric, and the shares rely on it
    W = original.double()
    D1, D2 = first.weight.double() - W, second.weight.double() - W
    D1H, D2H = D1 @ H, D2 @ H
    size = ((W @ H) * W).sum().item() or 1.0
    whole = ((D2H * D2).sum() - (D1H * D1).sum()).item()
    shares = (D2 - D1) * (D2H + D1H)
    changed = first.mask != second.mask
    return Split(
        whole / size, shares[changed].sum().item() / size, shares[~changed].sum().item() / size
    )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation and its interval.

    Args:
        rho: Between -1 and 1; None where it is not defined.
        low: Lower end of the interval; None where there is none.
        high: Upper end.
        reason: Why something is None, or "".
    """

    rho: float | None
    low: float | None
    high: float | None
    reason: str = ""


def spearman(
    x: Sequence[float],
    y: Sequence[float],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Correlation:
    """Spearman's rho of two lists of figures, with a percentile bootstrap interval over pairs.

    Args:
        x: One figure of each pair.
        y: The other.
        resamples: Bootstrap samples; those in which one of the two is constant have no rho and are left out.
        confidence: Between 0 and 1.
        seed: Of the resampling.

    Raises:
        DataError: If they are not of one length, or a figure is not finite.
    """
    pairs = np.array([x, y], dtype=float) if len(x) == len(y) else np.empty(0)
    if pairs.ndim != 2 or not np.isfinite(pairs).all():
        raise DataError(
            f"A rank correlation needs pairs of finite numbers, got {len(x)} and {len(y)} of them."
        )
    if pairs.shape[1] < 3:
        return Correlation(None, None, None, f"there are only {pairs.shape[1]} pairs")
    if (pairs == pairs[:, :1]).all(1).any():
        return Correlation(None, None, None, "one of the two is the same in every pair")
    rho = float(stats.spearmanr(*pairs).statistic)
    index = np.random.default_rng(seed).integers(0, pairs.shape[1], (resamples, pairs.shape[1]))
    ranks = stats.rankdata(pairs[:, index], axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1).prod(0))
    defined = norm > 0
    found = ranks.prod(0).sum(-1)[defined] / norm[defined]
    if len(found) < resamples / 2:
        return Correlation(rho, None, None, "most bootstrap samples hold one figure only")
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Correlation(rho, float(low), float(high))
