"""The one sweep behind SparseGPT and GPTQ: optimal brain surgery, a column at a time, all rows at once.

With `H = X^T X` and `U` the upper Cholesky factor of `H^-1`, fixing column j of W to a value q makes the error
`e = (w_j - q) / U_jj`; the best correction of the columns not yet fixed is `-e U_j,>j` (Frantar et al. 2022,
arXiv 2210.17323, eqs. 2-3 in Cholesky form; Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1). Pruning is
the case q = 0, quantisation the case q = nearest on the grid, and a pruned weight in quantisation is one whose
grid is {0}: it may drift while earlier columns are fixed, and its own turn passes that drift on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_order.errors import InvariantError
from optimum_order.layer import Grid
from optimum_order.order import Stage

BLOCK = 128
"""Columns whose corrections are applied together to the rest; also where SparseGPT chooses its mask."""


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """`U`, upper triangular, with `U^T U = (H + damping * mean(diag H) * I)^-1`.

    Args:
        gram: (in, in) float32.
        damping: Relative to the mean of the diagonal; multiplied by 10 while the factorisation fails.

    Returns:
        U (in, in) float32, and the damping that was needed.
    """
    size = len(gram)
    mean = gram.diagonal().mean().item() or 1.0
    while True:
        damped = gram / mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper / mean**0.5, damping
        if damping > 1e6:
            raise InvariantError(f"a Gram matrix of size {size} has no Cholesky factor even with damping {damping:g}")
        damping *= 10


def sweep(
    weight: Tensor,
    U: Tensor,
    *,
    grid: Grid | None,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    order: Tensor,
    span: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Fix every column in turn, correcting those that are still free.

    Args:
        weight: (out, in).
        U: (in, in) from `inverse_factor` of the Gram matrix in the order of the sweep.
        grid: What surviving weights are rounded to; None leaves them as they have become.
        choose: Called as `choose(w, d, start)` when the sweep reaches a span of columns, with their current
            values w (out, k), `d` = diag(U) (k,) and the first one's place in the sweep; returns what to remove,
            (out, k) bool.
        order: (in,) the columns of W in the order of the sweep.
        span: How many columns `choose` is asked about at a time, at most BLOCK.

    Returns:
        The new weight (out, in) in float32 and what was removed (out, in) bool, in the columns' own order.
    """
    rows = weight.float().T[order]  # (in, out): each column of W is contiguous here; indexing copies
    removed = torch.zeros_like(rows, dtype=torch.bool)
    inputs = len(rows)
    width = BLOCK // span * span  # no span straddles two blocks
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        block, errors = rows[start:end], torch.empty_like(rows[start:end])
        factor = U[start:end, start:end]
        diagonal = factor.diagonal().tolist()
        nearest = None if grid is None else grid.rounder(order[start:end])
        for i in range(end - start):
            if i % span == 0:
                stop = min(i + span, end - start)
                removed[start + i : start + stop] = choose(block[i:stop].T, factor.diagonal()[i:stop], start + i).T
            w = block[i]
            q = w if nearest is None else nearest(i, w)
            q = q.masked_fill(removed[start + i], 0.0)
            errors[i] = (w - q) / diagonal[i]
            block[i] = q
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        rows[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    back = torch.argsort(order)
    return rows[back].T.contiguous(), removed[back].T.contiguous()


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """`diag(delta H delta^T)`: the squared output error of each row, (out,)."""
    delta = delta.float()
    return torch.einsum("oi,oi->o", delta @ gram, delta)


def keep_better_rows(swept: Tensor, plain: Tensor, original: Tensor, gram: Tensor) -> tuple[Tensor, int]:
    """Row by row, the candidate with the smaller output error: the sweep is greedy and can lose on a row.

    Returns:
        The weight (out, in) and how many rows were taken from `plain`.
    """
    # Asked this way round, a correction that overflowed and has no error to compare is not kept either.
    fine = row_errors(swept.float() - original.float(), gram) <= row_errors(plain.float() - original.float(), gram)
    return torch.where(fine[:, None], swept, plain), int((~fine).sum())


def remarks(stage: Stage, asked: float, damping: float, lost: int, rows: int) -> tuple[str, ...]:
    """What a reader of the manifest should know about a layer that was swept."""
    raised = [f"{stage}: damping raised from {asked:g} to {damping:g}"] if damping != asked else []
    plain = [f"{stage}: {lost} of {rows} rows left uncorrected, which was better"] if lost else []
    return (*raised, *plain)
