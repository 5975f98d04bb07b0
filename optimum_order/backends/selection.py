"""The choice of weights that a pruner removes: the lowest scores of a layer, a row or an N:M group.

A weight that an earlier stage removed always ranks lowest, so `sparsity` is the sparsity that the
layer has in the end, not the part that is taken from the survivors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from optimum_order.backends.base import Backend, option
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage

_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


def _n_of_m(pattern: str) -> tuple[int, int] | None:
    """Return (N, M) of "N:M", or None for other text."""
    match = _PATTERN.fullmatch(pattern)
    if match is None or int(match[1]) >= int(match[2]):
        return None
    return int(match[1]), int(match[2])


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """The options of every pruner; `sparsity` is None where `pattern` implies it."""

    sparsity: float | None = option(
        None,
        "fraction of weights removed",
        check=lambda v: v is not None and 0 <= v < 1,
        allowed="a number in [0, 1)",
    )
    pattern: str = option(
        "none",
        "N:M keeps N of every M consecutive inputs",
        check=lambda v: v == "none" or _n_of_m(v) is not None,
        allowed="'none' or N:M with N < M < 100, such as 2:4",
    )
    off_grid: bool = option(
        False,
        "let a quantized layer leave its grid, as papers simulate it; such a layer can only be "
        "saved dense",
    )

    @property
    def keep(self) -> tuple[int, int] | None:
        """(N, M): keep N of M; None where unstructured."""
        return _n_of_m(self.pattern)


class Pruner(Backend):
    """A backend that removes weights."""

    kind = "prune"
    Options = PruningOptions
    options: PruningOptions

    @classmethod
    def validate(cls, stage: Stage, options: PruningOptions) -> PruningOptions:
        if options.keep is None:
            if options.sparsity is None:
                raise OrderError(
                    f"Stage '{stage}' must give 'sparsity' in [0, 1), such as '{cls.name}:0.5', "
                    f"or 'pattern', such as '{cls.name}(pattern=2:4)'."
                )
            return options
        remain, of = options.keep
        implied = 1 - remain / of
        if options.sparsity is not None and not math.isclose(options.sparsity, implied):
            raise OrderError(
                f"Stage '{stage}': 'sparsity' must be {implied:g} or left out, since pattern "
                f"{options.pattern} keeps {remain} of {of}; got {options.sparsity:g}."
            )
        return dataclasses.replace(options, sparsity=None)

    @property
    def resolved(self) -> dict[str, Any]:
        values = super().resolved
        if self.options.keep is not None:
            remain, of = self.options.keep
            values["sparsity"] = 1 - remain / of
        return values

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        keep = self.options.keep
        if keep is None or shape[1] % keep[1] == 0:
            return None
        return (
            f"pattern {self.options.pattern} needs a multiple of {keep[1]} inputs, "
            f"it has {shape[1]}"
        )


def remove(state: LayerState, pruned: Tensor, *, off_grid: bool) -> LayerState:
    """Return the state with some weights at +0.0 and all others as they were.

    Args:
        state: The layer before.
        pruned: (out, in) bool, all weights that are removed by now.
        off_grid: Whether a quantized layer leaves its grid.
    """
    state = leave_grid(state) if off_grid else state
    return dataclasses.replace(state, weight=state.weight.masked_fill(pruned, 0.0), pruned=pruned)


def leave_grid(state: LayerState) -> LayerState:
    """Return the state without its grid, and a note that such a layer can only be saved dense."""
    if state.grid is None:
        return state
    note = f"left its {state.grid.bits}-bit grid (off_grid): it can only be saved dense"
    return dataclasses.replace(state, grid=None, notes=(*state.notes, note))


def lowest(score: Tensor, options: PruningOptions, before: Tensor | None, *, per: str) -> Tensor:
    """Return the mask of the lowest scores.

    Args:
        score: (out, in), not negative.
        options: How many.
        before: (out, in) bool, the weights that are removed already; they stay so and count.
        per: "layer" or "row": where scores compete when there is no pattern.

    Returns:
        (out, in) bool, exactly `floor(sparsity * n)` True among each n that compete, or more where
        more were removed before. Ties fall to the earlier index.
    """
    score = score.float() if before is None else score.float().masked_fill(before, -1.0)
    if options.keep is not None:
        remain, of = options.keep
        groups = score.reshape(-1, of)
        count = of - remain
    else:
        assert options.sparsity is not None  # see `Pruner.validate`
        groups = score.reshape(1, -1) if per == "layer" else score
        # the addend guards against 0.29 * 100 = 28.999999999999996
        count = math.floor(options.sparsity * groups.shape[1] + 1e-9)
    mask = smallest(groups, count).view_as(score)
    return mask if before is None else mask | before


def smallest(score: Tensor, count: int) -> Tensor:
    """Return the mask of the smallest entries of each row; ties fall to the earlier index.

    Args:
        score: (n, k).
        count: Entries of each row to mark.

    Returns:
        (n, k) bool.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    below = score < threshold
    tied = score == threshold
    missing = count - below.sum(1, keepdim=True)
    if torch.equal(missing, tied.sum(1, keepdim=True)):
        return below.logical_or_(tied)
    return below | (tied & (tied.cumsum(1) <= missing))
