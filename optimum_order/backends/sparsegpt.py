"""SparseGPT: prune by optimal brain surgery and correct the survivors.

The mask is chosen for every 128 columns by `w^2 / U_jj^2` (N:M: for every group of M as the sweep
reaches the group). On a quantized layer each corrected weight is rounded to the grid in its turn,
so that the result can still be shipped quantized; `off_grid=true` leaves the grid instead.

Source: Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1.
"""

import dataclasses

from torch import Tensor

from optimum_order.backends.allocation import AllocatedPruner, AllocationOptions
from optimum_order.backends.obs import (
    BLOCK,
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


@dataclasses.dataclass(frozen=True)
class SparseGPTOptions(SweepOptions, AllocationOptions):
    """The options of pruning, and of the sweep."""


class SparseGPT(Sweeper, AllocatedPruner):
    """Score `w^2 / U_jj^2` in every 128 columns; survivors take over the work of the removed."""

    name = "sparsegpt"
    summary = "prune by optimal brain surgery and correct the survivors"
    needs = frozenset({Gram})
    Options = SparseGPTOptions
    options: SparseGPTOptions

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        options = self.options
        weight = state.weight  # (out, in)
        before = state.mask  # (out, in)
        state = leave_grid(state) if options.off_grid else state
        factor = Factor.of(statistics, options.damping)

        def choose(w: Tensor, d: Tensor, start: int) -> Tensor:
            """Remove the lowest scores: w is (out, k), d = U_jj is (k,)."""
            removed = before[:, start : start + w.shape[1]]
            return lowest((w / d).square(), options, removed, per="layer")

        aim = self.aim(weight, statistics, factor)
        swept, pruned = sweep(
            aim,
            factor.U,
            grid=state.grid,
            choose=choose,
            order=factor.columns,
            span=options.keep[1] if options.keep else BLOCK,
        )
        masked = weight.masked_fill(pruned, 0.0)
        new, lost = keep_better_rows(swept.to(weight.dtype), masked, aim, statistics[Gram])
        notes = remarks(self.stage, options.damping, factor.damping, lost, len(weight))
        return dataclasses.replace(state, weight=new, pruned=pruned, notes=state.notes + notes)

    def costs(self, state: LayerState, statistics: Statistics) -> Tensor:
        factor = Factor.of(statistics, self.options.damping)
        return state.weight.float().square() * factor.importance
