"""SparseGPT: prune by optimal brain surgery (Frantar & Alistarh 2023, arXiv 2301.00774).

The mask is chosen for every 128 columns by `w^2 / U_jj^2` (N:M: for every group of M as the sweep reaches it)
and the survivors are corrected. On a quantised layer each corrected weight is snapped to the grid in its turn,
so that the result can still be shipped quantised; `off_grid=true` leaves the grid instead.
"""

import dataclasses

from optimum_order.backends.base import option
from optimum_order.backends.obs import BLOCK, Factor, keep_better_rows, remarks, sweep
from optimum_order.backends.selection import Pruner, PruningOptions, leave_grid, lowest
from optimum_order.layers.statistics import Gram


@dataclasses.dataclass(frozen=True)
class SparseGPTOptions(PruningOptions):
    damping: float = option(
        0.01,
        "added to diag(H), relative to its mean",
        check=lambda v: 0 < v <= 1,
        allowed="in (0, 1]",
    )


class SparseGPT(Pruner):
    """Score `w^2 / U_jj^2` within every 128 columns; survivors take over the work of what is removed."""

    name = "sparsegpt"
    summary = "prune by optimal brain surgery and correct the survivors"
    needs = frozenset({Gram})
    Options = SparseGPTOptions

    def compress(self, state, statistics):
        options, weight = self.options, state.weight
        state = leave_grid(state) if options.off_grid else state
        grid = state.grid
        before = state.mask
        factor = Factor.of(statistics, options.damping)

        def choose(w, d, start):
            return lowest(
                (w / d).square(), options, before[:, start : start + w.shape[1]], per="layer"
            )

        span = options.keep[1] if options.keep else BLOCK
        swept, pruned = sweep(
            weight, factor.U, grid=grid, choose=choose, span=span, order=factor.columns
        )
        plain = weight.masked_fill(pruned, 0.0)
        new, lost = keep_better_rows(swept.to(weight.dtype), plain, weight, statistics[Gram])
        notes = state.notes + remarks(
            self.stage, options.damping, factor.damping, lost, len(weight)
        )
        return dataclasses.replace(state, weight=new, pruned=pruned, grid=grid, notes=notes)
