"""ALPS: choose the mask and the survivors of a whole layer together, by ADMM.

Minimize `||X W^T - X W0^T||^2` over the weights W with so many zeros. ADMM keeps two copies of the
layer, one that fits the outputs and one that has the zeros, and draws them together with a penalty
that rises until the mask stands still. Conjugate gradients then fit the survivors on that mask.

On a quantized layer the survivors are fitted by the sweep of `sparsegpt`, which rounds each to the
grid in its turn.

Source: Meng et al. 2024, arXiv 2406.07831 (ALPS), with its step rule for the penalty.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from optimum_order.backends.allocation import AllocatedPruner, AllocationOptions
from optimum_order.backends.base import option
from optimum_order.backends.obs import (
    Factor,
    Sweeper,
    SweepOptions,
    keep_better_rows,
    remarks,
    sweep,
)
from optimum_order.backends.selection import leave_grid, lowest
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics

_PENALTY = 0.1
"""The first penalty, where the largest eigenvalue of the inputs is about their number."""
_EVERY = 3
"""Rounds after which the penalty rises."""
_RISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By what the penalty rises where more than this part of the survivors has changed."""


@dataclasses.dataclass(frozen=True)
class ALPSOptions(SweepOptions, AllocationOptions):
    """The options of pruning, of the sweep, and how long to look for a mask."""

    rounds: int = option(
        300,
        "the most rounds of ADMM",
        check=lambda v: v > 0,
        allowed="a positive integer",
    )
    steps: int = option(
        10,
        "steps of conjugate gradients on the mask",
        check=lambda v: v > 0,
        allowed="a positive integer",
    )


class ALPS(Sweeper, AllocatedPruner):
    """Search for the mask by ADMM, and fit what survives by conjugate gradients."""

    name = "alps"
    summary = "prune by ADMM on the outputs of a layer, then fit the survivors"
    needs = frozenset({Gram})
    Options = ALPSOptions
    options: ALPSOptions

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        options = self.options
        weight = state.weight  # (out, in)
        state = leave_grid(state) if options.off_grid else state
        factor = Factor.of(statistics, options.damping)
        aim = self.aim(weight, statistics, factor)
        gram = statistics[Gram].clone()
        gram.diagonal().add_(options.damping * gram.diagonal().mean().clamp(min=1e-30))
        solution, pruned = self._masked(aim, gram, state.pruned)
        if state.grid is None:
            fitted = _fitted(solution, pruned, aim, gram, options.steps)
        else:
            fitted, _ = sweep(
                aim,
                factor.U,
                grid=state.grid,
                choose=lambda w, d, start: pruned[:, start : start + w.shape[1]],
                order=factor.columns,
            )
        masked = weight.masked_fill(pruned, 0.0)
        new, lost = keep_better_rows(fitted.to(weight.dtype), masked, aim, statistics[Gram])
        notes = remarks(self.stage, options.damping, factor.damping, lost, len(weight))
        return dataclasses.replace(state, weight=new, pruned=pruned, notes=state.notes + notes)

    def costs(self, state: LayerState, statistics: Statistics) -> Tensor:
        factor = Factor.of(statistics, self.options.damping)
        return state.weight.float().square() * factor.importance

    def _masked(self, aim: Tensor, gram: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weight on the mask that ADMM ends with, and that mask.

        Args:
            aim: (out, in), the weight whose outputs are wanted.
            gram: (in, in), of the inputs, damped.
            before: (out, in) bool, the weights that are removed already, or None.
        """
        sizes = gram.diagonal().sqrt()  # (in,): with inputs of one size one penalty fits all
        normal = gram / sizes / sizes[:, None]
        values, vectors = torch.linalg.eigh(normal)
        values = values.clamp(min=0)
        wanted = aim * sizes
        target = wanted @ normal
        penalty = _PENALTY
        split = wanted  # the copy with the zeros
        dual = torch.zeros_like(wanted)
        pruned = torch.zeros_like(wanted, dtype=torch.bool)
        last = pruned
        for number in range(1, self.options.rounds + 1):
            right = (target - dual + penalty * split) @ vectors
            fitting = (right / (values + penalty)) @ vectors.T
            candidate = fitting + dual / penalty
            pruned = lowest(candidate.square(), self.options, before, per="layer")
            split = candidate.masked_fill(pruned, 0.0)
            dual += penalty * (fitting - split)
            if number % _EVERY:
                continue
            changed = (pruned != last).sum().item() / max(1, (~pruned).sum().item())
            if not changed:
                break
            penalty *= next(rise for part, rise in _RISES if changed > part)
            last = pruned
        return split / sizes, pruned


def _fitted(start: Tensor, pruned: Tensor, aim: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Return the survivors whose outputs are nearest to those of `aim`, by conjugate gradients.

    Args:
        start: (out, in), +0.0 where pruned.
        pruned: (out, in) bool.
        aim: (out, in).
        gram: (in, in), of the inputs.
        steps: How many.

    Returns:
        (out, in). Each row is a problem of its own.
    """
    solution = start.masked_fill(pruned, 0.0)
    diagonal = gram.diagonal()
    residual = ((aim - solution) @ gram).masked_fill(pruned, 0.0)
    scaled = residual / diagonal
    direction = scaled
    size = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        ahead = (direction @ gram).masked_fill(pruned, 0.0)
        step = size / (direction * ahead).sum(1, keepdim=True).clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * ahead
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + size / before.clamp(min=1e-30) * direction
    return solution
