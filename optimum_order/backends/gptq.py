"""GPTQ: round one column at a time and let the others make up for it (Frantar et al. 2022, arXiv 2210.17323).

The grid is fitted once, before the sweep, so a group's scale does not depend on when its columns are visited:
"static groups", which makes act-order free at inference (no g_idx).
"""

import dataclasses

from optimum_order.backends.base import option
from optimum_order.backends.obs import Factor, keep_better_rows, remarks, sweep
from optimum_order.backends.uniform import UniformOptions, UniformQuantizer
from optimum_order.layers.statistics import Gram


@dataclasses.dataclass(frozen=True)
class GPTQOptions(UniformOptions):
    act_order: bool = option(True, "visit the columns with the largest inputs first")
    damping: float = option(
        0.01,
        "added to diag(H), relative to its mean",
        check=lambda v: 0 < v <= 1,
        allowed="in (0, 1]",
    )


class GPTQ(UniformQuantizer):
    """The OBS sweep with q = nearest on the grid; a pruned weight's grid is {0}."""

    name = "gptq"
    summary = "round column by column and correct the columns to come"
    needs = frozenset({Gram})
    Options = GPTQOptions

    def compress(self, state, statistics):
        weight, pruned = state.weight, state.mask
        factor = Factor.of(statistics, self.options.damping, act_order=self.options.act_order)
        grid = self.fit(state)

        def choose(w, d, start):
            return pruned[:, factor.columns[start : start + w.shape[1]]]

        swept, _ = sweep(weight, factor.U, grid=grid, choose=choose, order=factor.columns)
        new, lost = keep_better_rows(
            swept.to(weight.dtype), grid.nearest(weight), weight, statistics[Gram]
        )
        notes = state.notes + remarks(
            self.stage, self.options.damping, factor.damping, lost, len(weight)
        )
        return dataclasses.replace(state, weight=new, grid=grid, notes=notes)
