"""Optimal brain surgery, a column at a time, all rows at once: the sweep of SparseGPT and GPTQ.

With `H = X^T X` and `U` the upper Cholesky factor of `H^-1`, fixing column j of W to a value q
makes the error `e = (w_j - q) / U_jj`; the best correction of the columns not yet fixed is
`-e U_j,>j`. Pruning is the case q = 0, quantization the case q = nearest on the grid, and a pruned
weight in quantization is one whose grid is {0}: it may drift while earlier columns are fixed, and
its own turn passes that drift on.

Source: Frantar et al. 2022, arXiv 2210.17323, equations 2-3 in Cholesky form; Frantar & Alistarh
2023, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from optimum_order.backends import kernels
from optimum_order.backends.base import option
from optimum_order.errors import InvariantError
from optimum_order.layers.grids.base import Rounder
from optimum_order.layers.grids.rounding import AffineRounder
from optimum_order.layers.statistics import Accumulator, Drift, Gram, Statistics
from optimum_order.order import Stage

BLOCK = 128
"""Columns whose corrections are applied together to the rest, and that share a SparseGPT mask."""
STRIP = 16
"""Columns within a block whose corrections are applied one by one."""


@dataclass(frozen=True)
class SweepOptions:
    """What every sweep has."""

    damping: float = option(
        0.01,
        "added to diag(H), relative to its mean",
        check=lambda v: 0 < v <= 1,
        allowed="in (0, 1]",
    )
    drift: float = option(
        0.5,
        "the part of what earlier layers changed in the inputs that the layer makes up for, where "
        "the walk pauses at layers",
        check=lambda v: 0 <= v <= 1,
        allowed="in [0, 1]",
    )


class Sweeper:
    """A backend that sweeps."""

    options: SweepOptions

    @property
    def uses(self) -> frozenset[type[Accumulator]]:
        return frozenset({Drift}) if self.options.drift else frozenset()

    def aim(self, weight: Tensor, statistics: Statistics, factor: Factor) -> Tensor:
        """Return the weight whose outputs are nearest to those before the stage, (out, in) float32.

        Of what the samples show of the change, the part is noise that the number of inputs is of
        the number of tokens, and as much less is made up for.

        Args:
            weight: (out, in).
            statistics: Of the layer's inputs.
            factor: Of these inputs.

        Source: Li et al. 2025, arXiv 2504.02692; Zhang et al. 2025, arXiv 2505.11695, equation 4.
        """
        weight = weight.float()
        if not self.options.drift or Drift not in statistics or not statistics.tokens:
            return weight
        part = self.options.drift * max(0.0, 1.0 - weight.shape[1] / statistics.tokens)
        lost = (weight @ statistics[Drift])[:, factor.columns]  # (out, in), in order of the sweep
        change = torch.empty_like(weight)
        change[:, factor.columns] = lost @ factor.U.T @ factor.U
        return weight + part * change


class Rounding(Protocol):
    """What a sweep rounds to: a grid, or a grid with rules of its own."""

    def rounder(self, columns: Tensor) -> Rounder:
        """Return what rounds one column, see `Grid.rounder`."""


def inverse_factor(
    gram: Tensor, damping: float, order: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return `U`, upper triangular, with `U^T U = (H + damping * mean(diag H) * I)^-1`.

    Args:
        gram: (in, in) float32.
        damping: Relative to the mean of the diagonal; multiplied by 10 while the factorization
            fails.
        order: (in,) in which the rows and columns of H are taken; by default, as they are.

    Returns:
        U (in, in) float32, and the damping that was needed.

    Raises:
        InvariantError: If no damping gives a factor, because H holds NaN or infinity.
    """
    size = len(gram)
    diagonal = gram.diagonal()
    mean = (diagonal if order is None else diagonal[order]).mean().item() or 1.0
    while True:
        # From the last column to the first, H = R R^T with R upper triangular, so that U = R^-1:
        # the inverse of H, which would have to be factored again, is never formed.
        damped = gram.flip(0, 1) if order is None else gram[order.flip(0)][:, order.flip(0)]
        damped.div_(mean)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these matrices may be the largest tensor in memory
        if not failed:
            lower = lower.flip(0, 1).mul_(mean**0.5)
            upper = _inverse_of_upper(lower)
            if torch.isfinite(upper).all():
                return upper, damping
        if damping > 1e6:
            raise InvariantError(
                f"a Gram matrix of size {size} has no Cholesky factor even with damping {damping:g}"
            )
        damping *= 10


def _inverse_of_upper(R: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, in a third of the operations of a solve."""
    size = len(R)
    if size <= 256:
        identity = torch.eye(size, dtype=R.dtype, device=R.device)
        solution: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
        return solution
    half = size // 2
    inverse = torch.zeros_like(R)
    inverse[:half, :half] = _inverse_of_upper(R[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(R[half:, half:])
    torch.mm(
        inverse[:half, :half] @ R[:half, half:],
        inverse[half:, half:].neg(),
        out=inverse[:half, half:],
    )
    return inverse


@dataclass(frozen=True)
class Factor:
    """The factor of a layer's inputs that a sweep needs.

    Args:
        U: (in, in) float32, of the Gram matrix in the order of the sweep.
        columns: (in,) the columns of W in the order of the sweep.
        damping: The damping that was needed.
    """

    U: Tensor
    columns: Tensor
    damping: float

    @property
    def importance(self) -> Tensor:
        """What the squared error of each column costs once later columns made up for it, (in,).

        The error of a sweep is the sum of e_j^2 / U_jj^2.
        """
        importance = torch.empty(len(self.columns), device=self.U.device)
        importance[self.columns] = self.U.diagonal().square().reciprocal()
        return importance

    @classmethod
    def of(cls, statistics: Statistics, damping: float, *, act_order: bool = False) -> Factor:
        """Return the factor for a layer, computed once for all layers that read the same input.

        Args:
            statistics: Of the layer's inputs, with their Gram matrix.
            damping: As in `inverse_factor`.
            act_order: Whether the columns with the largest inputs are visited first.

        Raises:
            InvariantError: As in `inverse_factor`.
        """

        def compute() -> Factor:
            gram = statistics[Gram]
            columns = torch.arange(len(gram), device=gram.device)
            if act_order:
                columns = torch.argsort(gram.diagonal(), descending=True, stable=True)
            U, needed = inverse_factor(gram, damping, columns if act_order else None)
            return cls(U, columns, needed)

        return cast(Factor, statistics.derived((cls, damping, act_order), compute))


def sweep(
    weight: Tensor,
    U: Tensor,
    *,
    grid: Rounding | None,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    order: Tensor,
    span: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Fix every column in turn, and correct the columns that are still free.

    Args:
        weight: (out, in).
        U: (in, in) from `inverse_factor` of the Gram matrix in the order of the sweep.
        grid: The grid that surviving weights are rounded to; None leaves them as corrected.
        choose: Called as `choose(w, d, start)` when the sweep reaches a span of k columns, with
            their current values w (out, k), `d` = diag(U) (k,) and the place of the first in the
            sweep; returns the weights to remove, (out, k) bool.
        order: (in,) the columns of W in the order of the sweep.
        span: Columns that `choose` is asked about at a time, at most BLOCK.

    Returns:
        The new weight (out, in) in float32 and the removed weights (out, in) bool, in the order of
        the columns of W.
    """
    # (in, out): each column of W is contiguous here; indexing copies
    rows = weight.float().T[order]
    removed = torch.zeros_like(rows, dtype=torch.bool)
    inputs = len(rows)
    width = BLOCK // span * span  # no span straddles two blocks
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        block = rows[start:end]  # (k, out)
        chosen = removed[start:end]  # (k, out)
        errors = torch.empty_like(block)
        diagonal = U.diagonal()[start:end]
        # (k, in - start): the effect of a column's error on the columns after it
        follow = U[start:end, start:] / diagonal[:, None]
        rounder = None if grid is None else grid.rounder(order[start:end])
        fix = _fix_columns_on(rows.device, rounder)
        for first in range(0, end - start, span):
            stop = min(first + span, end - start)
            now = slice(first, stop)
            chosen[now] = choose(block[now].T, diagonal[now], start + first).T
            fix(block, errors, chosen, follow, rounder, first, stop)
        rows[end:].addmm_(follow[:, end - start :].T, errors, alpha=-1)
    back = torch.argsort(order)
    return rows[back].T.contiguous(), removed[back].T.contiguous()


def fix_columns(
    block: Tensor,
    errors: Tensor,
    removed: Tensor,
    follow: Tensor,
    rounder: Rounder | None,
    first: int,
    stop: int,
) -> None:
    """Fix some columns of a block one by one, and correct the columns of the block after them.

    Args:
        block: (k, out) float32, the columns of the block; receives the fixed values.
        errors: (k, out) float32, receives what each fixed column lost.
        removed: (k, out) bool, the weights that become zero.
        follow: (k, at least k) float32, the effect of a column's error on the columns after it.
        rounder: Of the k columns; None leaves survivors as they are.
        first: The first column to fix.
        stop: The column after the last one to fix.
    """
    span = block[first:stop]
    fixed = torch.empty_like(span)
    masks = removed[first:stop]
    some = bool(masks.any())
    shares = masks.float()  # of a weight that is removed: 0 or 1
    columns = zip(
        span.unbind(),
        fixed.unbind(),
        errors[first:stop].unbind(),
        shares.unbind(),
        masks.unbind(),
        strict=True,
    )
    strip = begin = first
    for i, (w, q, error, share, mask) in enumerate(columns, first):  # all (out,)
        if i == strip:  # the next columns whose corrections are applied one by one
            begin = i
            strip = min(i + STRIP, stop)
        if rounder is None:
            torch.mul(w, share, out=error)
        else:
            rounder(i, w, q)
            if some:
                q.masked_fill_(mask, 0.0)
            torch.sub(w, q, out=error)
        if i + 1 < strip:
            block[i + 1 : strip].addr_(follow[i, i + 1 : strip], error, alpha=-1)
        elif strip < len(block):
            later = follow[begin:strip, strip : len(block)]
            block[strip:].addmm_(later.T, errors[begin:strip], alpha=-1)
    if rounder is None:
        span.sub_(errors[first:stop])  # exact: an error is all of a weight or nothing
    else:
        torch.add(fixed, 0.0, out=span)  # no -0.0


def _fix_columns_on(device: torch.device, rounder: Rounder | None) -> Callable[..., None]:
    """Return `fix_columns`, or the kernel that does the same faster, if the device has one."""
    if (rounder is None or isinstance(rounder, AffineRounder)) and kernels.available(device):
        from optimum_order.backends.kernels import sweep as kernel  # imports Triton

        return kernel.fix_columns
    return fix_columns


def keep_better_rows(
    swept: Tensor, plain: Tensor, original: Tensor, gram: Tensor
) -> tuple[Tensor, int]:
    """Return row by row the candidate with the smaller output error.

    The sweep is greedy and can lose on a row.

    Args:
        swept: (out, in), the candidate of the sweep.
        plain: (out, in), the candidate without corrections.
        original: (out, in), the weight before.
        gram: (in, in), of the layer's inputs.

    Returns:
        The weight (out, in), and the number of rows taken from `plain`.
    """
    swept_error = swept.float() - original.float()
    plain_error = plain.float() - original.float()
    # a H a^T - b H b^T = (a - b) H (a + b)^T for each row, with one product in place of two
    apart = swept_error - plain_error
    worse = torch.einsum("oi,oi->o", apart @ gram, swept_error + plain_error)
    fine = worse <= 0  # not `~(worse > 0)`: a correction that overflowed is not taken either
    return torch.where(fine[:, None], swept, plain), int((~fine).sum())


def remarks(stage: Stage, asked: float, damping: float, lost: int, rows: int) -> tuple[str, ...]:
    """Return the notes on a layer that was swept.

    Args:
        stage: The canonical stage.
        asked: The damping in the stage.
        damping: The damping that was needed.
        lost: Number of rows left uncorrected.
        rows: Number of rows.
    """
    notes = []
    if damping != asked:
        notes.append(f"{stage}: damping raised from {asked:g} to {damping:g}")
    if lost:
        notes.append(f"{stage}: {lost} of {rows} rows left uncorrected, which was better")
    return tuple(notes)
