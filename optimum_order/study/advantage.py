"""What an order is worth: equivalent ratios, the split of an advantage, rank correlation.

With phi the pretrained model, f a method, and M a performance, higher is better (Kim et al. 2026,
arXiv 2603.18426):

    G(f1, f2)   = M(f1(phi)) - M(f2(phi))                > 0 where f2 is the stronger perturbation
    C*_f        = 1 - b/16                               at the width b at which quantizing alone
                                                         reaches M(f(phi))
    x           = C*_P - C*_Q                            how much stronger the pruning is
    A(f1 -> f2) = M((f2 . f1)(phi)) - M((f1 . f2)(phi))  > 0 where f1 first is better

G and A are differences of means over draws and samples: `analysis` takes them, with intervals. The
advantage in a layer is that of its output error E(W') = tr(D H D^T), D = W' - W and H = X^T X.
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
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics

Bound = Literal["exact", "at least", "at most", "unknown"]
_FULL_WIDTH = 16
"""Bits of a weight before compression, as the ratio counts them."""


@dataclass(frozen=True)
class Ratio:
    """A compression ratio, or a difference of two, as far as it was measured.

    Args:
        value: The ratio, or a bound of it.
        bound: "exact", or that the ratio is "at least" or "at most" `value`; "unknown" where the
            bounds of two ratios leave their difference open.
    """

    value: float
    bound: Bound = "exact"

    def __sub__(self, other: Ratio) -> Ratio:
        opposite: dict[Bound, Bound] = {"at least": "at most", "at most": "at least"}
        bounds = {self.bound, opposite.get(other.bound, other.bound)} - {"exact"}
        bound: Bound = "exact" if not bounds else bounds.pop() if len(bounds) == 1 else "unknown"
        return Ratio(self.value - other.value, bound)


def compression_equivalent_ratio(performance: float, curve: Mapping[float, float]) -> Ratio:
    """Return C*_f, the ratio 1 - b/16 at which quantizing alone reaches a performance.

    Between two measured widths, b is interpolated linearly in M. Where a wider width did worse
    than a narrower one (noise), the best of all widths up to the wider one stands for it, so that
    C* is the largest ratio at which the performance is reached. Beyond the measured widths, the
    ratio of the outermost width is a bound; nothing is extrapolated.

    Args:
        performance: M(f(phi)).
        curve: M of the reference quantizer alone, by its bits in (0, 16].

    Raises:
        DataError: If the curve is empty, or a number is not finite.

    Source:
        Kim et al. 2026, arXiv 2603.18426.
    """
    widths = sorted(curve)
    if not widths or not all(0 < bits <= _FULL_WIDTH for bits in widths):
        raise DataError(
            "The curve of a quantizer needs widths in bits above 0 and up to 16, got "
            f"{widths}. Give the performance of the quantizer at one such width or more."
        )
    if not math.isfinite(performance) or not all(map(math.isfinite, curve.values())):
        raise DataError(
            f"A compression-equivalent ratio needs finite performances, got {performance} and a "
            f"curve of {dict(sorted(curve.items()))}. Leave out widths at which the model breaks."
        )
    best = list(itertools.accumulate((curve[bits] for bits in widths), max))
    index = bisect.bisect_left(best, performance)  # the narrowest width that reaches it
    if index == len(widths):
        return Ratio(_ratio(widths[-1]), "at most")
    if best[index] == performance:
        return Ratio(_ratio(widths[index]))
    if index == 0:
        return Ratio(_ratio(widths[0]), "at least")
    part = (performance - best[index - 1]) / (best[index] - best[index - 1])
    return Ratio(_ratio(widths[index - 1] + part * (widths[index] - widths[index - 1])))


def _ratio(bits: float) -> float:
    return 1 - bits / _FULL_WIDTH


@dataclass(frozen=True)
class Split:
    """The advantage of one order of a layer over another, and its two sources.

    Squared output error over tr(W H W^T), the size of the layer's output. Positive where the first
    order has less error.

    Args:
        whole: E of the second order less E of the first.
        owner: The part from weights that one order prunes and the other does not.
        interference: The part from all other weights.
    """

    whole: float
    owner: float
    interference: float


@torch.no_grad()
def split_advantage(
    original: Tensor, first: LayerState, second: LayerState, statistics: Statistics
) -> Split:
    """Split the order advantage of a layer into owner changes and interference.

    With D = W' - W and a symmetric H,

        E(W2) - E(W1) = tr(D2 H D2^T) - tr(D1 H D1^T) = sum_ij (D2 - D1)_ij ((D2 + D1) H)_ij

    which gives each weight a share, 0 where both orders leave the weight the same. A share counts
    the errors of the other weights of its row too, since outputs add up over a row. The owner of a
    weight is the pruner if the weight is `pruned`, else the quantizer.

    Args:
        original: W, (out, in).
        first: The layer after one order.
        second: The layer after the other order.
        statistics: The inputs of the layer in the original model. Without a Gram matrix, H is
            diagonal; the inputs of a layer that no token reached are taken as white noise.

    Returns:
        The split, `owner + interference == whole` up to the rounding of float64. `whole` is
        computed from the two errors alone. A layer whose outputs are all zero is in absolute
        units.

    Source:
        Kim et al. 2026, arXiv 2603.18426, theorem 1: disjoint selectivity.
    """
    if not statistics.tokens:
        statistics = statistics.isotropic()
    H = statistics[Gram] if Gram in statistics else statistics[SquaredNorms].diag()
    H = H.double()
    H = (H + H.T) / 2  # rounding may leave a Gram matrix unsymmetric, and the shares rely on it
    W = original.double()
    D1 = first.weight.double() - W
    D2 = second.weight.double() - W
    D1H = D1 @ H
    D2H = D2 @ H
    size = ((W @ H) * W).sum().item() or 1.0
    whole = ((D2H * D2).sum() - (D1H * D1).sum()).item()
    shares = (D2 - D1) * (D2H + D1H)
    changed = first.mask != second.mask
    owner = shares[changed].sum().item()
    interference = shares[~changed].sum().item()
    return Split(whole / size, owner / size, interference / size)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation and its interval.

    Args:
        rho: Between -1 and 1; None where undefined.
        low: Lower end of the interval; None where there is no interval.
        high: Upper end of the interval.
        reason: Why a value is None, or "".
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
    """Return Spearman's rho of pairs of numbers, with a percentile bootstrap interval over pairs.

    Args:
        x: One number of each pair.
        y: The other number of each pair.
        resamples: Bootstrap samples; a sample in which x or y is constant has no rho and is left
            out.
        confidence: The confidence of the interval, between 0 and 1.
        seed: The seed of the resampling.

    Raises:
        DataError: If the lengths differ, or a number is not finite.
    """
    pairs = np.array([x, y], dtype=float) if len(x) == len(y) else np.empty(0)
    if pairs.ndim != 2 or not np.isfinite(pairs).all():
        raise DataError(
            f"A rank correlation needs pairs of finite numbers, got {len(x)} and {len(y)} of "
            "them. Leave out pairs without both."
        )
    count = pairs.shape[1]
    if count < 3:
        return Correlation(None, None, None, f"there are only {count} pairs")
    if (pairs == pairs[:, :1]).all(1).any():
        return Correlation(None, None, None, "one of the two is the same in every pair")
    rho = float(stats.spearmanr(*pairs).statistic)
    index = np.random.default_rng(seed).integers(0, count, (resamples, count))
    ranks = stats.rankdata(pairs[:, index], axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1).prod(0))
    defined = norm > 0
    rhos = ranks.prod(0).sum(-1)[defined] / norm[defined]
    if len(rhos) < resamples / 2:
        return Correlation(rho, None, None, "most bootstrap samples hold one figure only")
    low, high = np.quantile(rhos, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Correlation(rho, float(low), float(high))
