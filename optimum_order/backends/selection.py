"""Which weights a pruner removes: the lowest scores of a layer, of each row, or of each N:M group.

A weight that an earlier stage removed always ranks lowest, so `sparsity` is what the layer has in the end, not
what is taken from the survivors.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import Tensor

from optimum_order.backends.base import Backend, option
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage

_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


def _is_pattern(value: str) -> bool:
    found = _PATTERN.fullmatch(value)
    return value == "none" or (found is not None and int(found[1]) < int(found[2]))


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """What every pruner can be told; `sparsity` is left at None where `pattern` implies it."""

    sparsity: float | None = option(
        None,
        "fraction of weights removed",
        check=lambda v: v is not None and 0 <= v < 1,
        allowed="a number in [0, 1)",
    )
    pattern: str = option(
        "none",
        "N:M keeps N of every M consecutive inputs",
        check=_is_pattern,
        allowed="'none' or N:M with N < M < 100, such as 2:4",
    )
    off_grid: bool = option(
        False,
        "let a quantised layer leave its grid, as papers simulate it; such a layer can only be saved dense",
    )

    @property
    def keep(self) -> tuple[int, int] | None:
        """(N, M): keep N of M; None where unstructured."""
        found = _PATTERN.fullmatch(self.pattern)
        return (int(found[1]), int(found[2])) if found else None


class Pruner(Backend):
    """A backend that removes weights."""

    kind = "prune"
    Options = PruningOptions

    @classmethod
    def validate(cls, stage: Stage, options: PruningOptions) -> PruningOptions:
        if options.keep is None:
            if options.sparsity is None:
                raise OrderError(
                    f"Stage '{stage}' must give 'sparsity' in [0, 1), such as '{cls.name}:0.5', or 'pattern', such as "
                    f"'{cls.name}(pattern=2:4)'."
                )
            return options
        implied = 1 - options.keep[0] / options.keep[1]
        if options.sparsity is not None and not math.isclose(options.sparsity, implied):
            raise OrderError(
                f"Stage '{stage}': 'sparsity' must be {implied:g} or left out, since pattern {options.pattern} keeps "
                f"{options.keep[0]} of {options.keep[1]}; got {options.sparsity:g}."
            )
        return dataclasses.replace(options, sparsity=None)

    @property
    def resolved(self):
        keep = self.options.keep
        return super().resolved | ({"sparsity": 1 - keep[0] / keep[1]} if keep else {})

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        keep = self.options.keep
        if keep and shape[1] % keep[1]:
            return f"pattern {self.options.pattern} needs a multiple of {keep[1]} inputs, it has {shape[1]}"
        return None


def remove(state: LayerState, pruned: Tensor, *, off_grid: bool) -> LayerState:
    """The state with these weights at +0.0 and all others as they were."""
    state = leave_grid(state) if off_grid else state
    return dataclasses.replace(state, weight=state.weight.masked_fill(pruned, 0.0), pruned=pruned)


def leave_grid(state: LayerState) -> LayerState:
    """The state without its grid; its notes say so, since such a layer can only be saved dense."""
    if state.grid is None:
        return state
    note = f"left its {state.grid.bits}-bit grid (off_grid): it can only be saved dense"
    return dataclasses.replace(state, grid=None, notes=(*state.notes, note))


def lowest(score: Tensor, options: PruningOptions, before: Tensor | None, *, per: str) -> Tensor:
    """The mask of the lowest scores.

    Args:
        score: (out, in), not negative.
        options: How many.
        before: (out, in) bool, what is already removed; it stays removed and counts.
        per: "layer" or "row": where scores compete when there is no pattern.

    Returns:
        (out, in) bool, exactly `floor(sparsity * n)` True among each n that compete, or more where more were
        removed before. Ties fall to the earlier index.
    """
    score = score.float() if before is None else score.float().masked_fill(before, -1.0)
    if options.keep:
        kept, of = options.keep
        shape, count = (-1, of), of - kept
    else:
        shape = (1, score.numel()) if per == "layer" else (score.shape[0], score.shape[1])
        # Guard against 0.29 * 100 = 28.999999999999996.
        count = math.floor(options.sparsity * shape[1] + 1e-9)
    mask = smallest(score.reshape(shape), count).view_as(score)
    return mask if before is None else mask | before


def smallest(score: Tensor, count: int) -> Tensor:
    """The mask of the `count` smallest entries of each row, (n, k) bool; ties fall to the earlier index."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    below, tied = score < threshold, score == threshold
    missing = count - below.sum(1, keepdim=True)
    if torch.equal(missing, tied.sum(1, keepdim=True)):
        return below.logical_or_(tied)
    return below | (tied & (tied.cumsum(1) <= missing))
