"""Channels that a layer reads: which of them matter least, and a refit of those that remain.

With W (out, in) the layer that reads the channels and H = X^T X of its inputs, the output error of
a removal of the channels R, the others refitted, is tr(W_R (H^-1)_RR^-1 W_R^T); for one channel
that is ||W_j||^2 / (H^-1)_jj. The refit itself is least squares, W' = W H[:,K] (H[K,K])^-1.

Source: Hassibi & Stork 1993 (optimal brain surgery), for columns in place of weights; Kurtic et al.
2023, arXiv 2302.04089, equations 2-4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_order.backends.base import Cut, option
from optimum_order.backends.obs import inverse_factor, keep_better_rows, sweep
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Stage

_ROUNDS = 16
"""Rounds of removal; the scores of the rest are taken anew after each."""


@dataclass(frozen=True)
class ChannelOptions:
    """What removes channels."""

    ratio: float = option(
        dataclasses.MISSING,
        "fraction removed",
        check=lambda v: 0 < v < 1,
        allowed="a number in (0, 1)",
    )
    refit: bool = option(True, "refit what remains by least squares, on its mask and grid")
    damping: float = option(
        0.01,
        "added to diag(H), relative to its mean",
        check=lambda v: 0 < v <= 1,
        allowed="in (0, 1]",
    )


def remaining_groups(
    weight: Tensor, gram: Tensor, *, size: int, count: int, options: ChannelOptions
) -> Tensor:
    """Return the groups of channels that remain after the least important were removed.

    Without a refit a removal costs what the group adds to the output, tr(W_R H_RR W_R^T).

    Args:
        weight: (out, in).
        gram: (in, in) float32, of the layer's inputs.
        size: Channels in a group: consecutive columns of the weight.
        count: Groups that remain.
        options: Of the stage.

    Returns:
        (count,) int64, in ascending order.
    """
    U, _ = inverse_factor(gram, options.damping)  # refuses inputs that are NaN
    if not options.refit:
        added = _added(weight.float(), gram, size)
        return added.topk(count).indices.sort().values
    current = weight.float().clone()
    inverse = U.T @ U  # (in, in)
    groups = len(gram) // size
    alive = torch.ones(groups, dtype=torch.bool, device=gram.device)
    left = groups - count
    for turn in range(_ROUNDS, 0, -1):
        number = -(-left // turn)
        if number == 0:
            continue
        scores = _scores(current, inverse, size, alive)
        chosen = scores.topk(number, largest=False).indices
        alive[chosen] = False
        left -= number
        columns = (chosen[:, None] * size + torch.arange(size, device=gram.device)).flatten()
        block = inverse[columns][:, columns]
        follow = torch.linalg.solve(block, inverse[columns])  # (removed, in)
        current -= current[:, columns] @ follow
        inverse -= inverse[:, columns] @ follow
    return alive.nonzero().flatten()


def _grouped(weight: Tensor, square: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the columns of each group (groups, size, out), and its block (groups, size, size).

    Args:
        weight: (out, in).
        square: (in, in).
        size: Channels in a group.
    """
    groups = len(square) // size
    blocks = square.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return weight.view(len(weight), groups, size).permute(1, 2, 0), blocks


def _added(weight: Tensor, gram: Tensor, size: int) -> Tensor:
    """Return the squared size of what each group adds to the output, (groups,)."""
    columns, blocks = _grouped(weight, gram, size)
    return (columns * (blocks @ columns)).sum((1, 2))


def _scores(weight: Tensor, inverse: Tensor, size: int, alive: Tensor) -> Tensor:
    """Return the output error that the removal of each group would add, (groups,).

    Args:
        weight: (out, in).
        inverse: (in, in), of the Gram matrix without the groups that are gone.
        size: Channels in a group.
        alive: (groups,) bool, the groups that are not gone; the error of the others is infinite.
    """
    if size == 1:
        errors = weight.square().sum(0) / inverse.diagonal().clamp(min=1e-30)
        return errors.masked_fill(~alive, torch.inf)
    scores = torch.full(alive.shape, torch.inf, device=weight.device)
    columns, blocks = _grouped(weight, inverse, size)
    columns, blocks = columns[alive], blocks[alive]  # what is gone has blocks of rounding errors
    ridge = 1e-6 * blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    blocks = blocks + ridge.clamp(min=1e-30) * torch.eye(size, device=blocks.device)
    scores[alive] = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return scores


def cut_columns(
    layer: str,
    state: LayerState,
    statistics: Statistics,
    columns: Tensor,
    *,
    stage: Stage,
    options: ChannelOptions,
) -> Cut:
    """Return the cut of a layer's columns, what remains refitted if the options say so.

    Args:
        layer: Its name.
        state: The layer before.
        statistics: Of its inputs, with their Gram matrix.
        columns: (k,) int64, the columns that remain.
        stage: What cuts, for the notes.
        options: Of the stage.
    """
    if not options.refit or not statistics.tokens:
        return Cut(layer, 1, columns)
    grid = None if breaks(state.grid, columns) else state.grid
    gram = statistics[Gram]
    notes: tuple[str, ...] = ()
    if grid is None and state.pruned is None:
        weight = _least_squares(state.weight, gram, columns, options.damping)
    else:
        weight, lost = _swept(state, grid, gram, columns, options.damping)
        where = "mask" if grid is None else "grid" if state.pruned is None else "mask and grid"
        notes = (f"{stage}: refitted column by column, on its {where}",)
        if lost:
            notes += (f"{stage}: {lost} of {len(weight)} rows not refitted, which was better",)
    return Cut(layer, 1, columns, weight, notes)


def breaks(grid: Grid | None, columns: Tensor) -> bool:
    """Return whether some columns alone cannot lie on a grid.

    Args:
        grid: The grid of all columns, or None.
        columns: (k,) int64.
    """
    if grid is None:
        return False
    try:
        grid.take(columns=columns.cpu())
    except ValueError:
        return True
    return False


def _least_squares(weight: Tensor, gram: Tensor, columns: Tensor, damping: float) -> Tensor:
    """Return W[:,K] + W[:,R] H[R,K] (H[K,K] + damping)^-1, (out, k)."""
    removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    removed[columns] = False
    full = weight.float()
    mean = gram.diagonal().mean().item() or 1.0
    lost = full[:, removed] @ gram[removed][:, columns]  # (out, k)
    square = gram[columns][:, columns]
    while True:
        damped = square.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed or damping > 1e6:
            break
        damping *= 10
    moved = torch.cholesky_solve(lost.T, lower).T
    refitted: Tensor = (full[:, columns] + moved).to(weight.dtype)
    return refitted


def _swept(
    state: LayerState, grid: Grid | None, gram: Tensor, columns: Tensor, damping: float
) -> tuple[Tensor, int]:
    """Return what remains, its mask and grid kept, (out, k), and the rows that are not refitted.

    The removed columns come first in the sweep, and hand what they did to the columns after them.
    """
    removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    removed[columns] = False
    order = torch.cat([removed.nonzero().flatten(), columns])
    gone = removed | state.mask  # (out, in)

    def choose(w: Tensor, d: Tensor, start: int) -> Tensor:
        return gone[:, order[start : start + w.shape[1]]]

    U, _ = inverse_factor(gram, damping, order)
    swept, _ = sweep(state.weight, U, grid=grid, choose=choose, order=order)
    plain = state.weight.masked_fill(gone, 0.0)
    new, lost = keep_better_rows(swept.to(plain.dtype), plain, state.weight, gram)
    return new[:, columns], lost
