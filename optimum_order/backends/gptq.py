"""GPTQ: round one column at a time and let the columns to come correct for the error.

The grid is fitted once, before the sweep, so a group's scale does not depend on when its columns
are visited: "static groups", with which act-order is free at inference (no g_idx).

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
"""

import dataclasses

from torch import Tensor

from optimum_order.backends.base import option
from optimum_order.backends.obs import (
    Factor,
    Sweeper,
    SweepOptions,
    keep_better_rows,
    remarks,
    sweep,
)
from optimum_order.backends.uniform import UniformOptions, UniformQuantizer
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics


@dataclasses.dataclass(frozen=True)
class GPTQOptions(SweepOptions, UniformOptions):
    """The options of rounding, and of the sweep."""

    act_order: bool = option(True, "visit the columns with the largest inputs first")


class GPTQ(Sweeper, UniformQuantizer):
    """The OBS sweep with q = nearest on the grid; a pruned weight's grid is {0}."""

    name = "gptq"
    summary = "round column by column and correct the columns to come"
    needs = frozenset({Gram})
    Options = GPTQOptions
    options: GPTQOptions

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        options = self.options
        weight = state.weight  # (out, in)
        pruned = state.mask  # (out, in)
        factor = Factor.of(statistics, options.damping, act_order=options.act_order)
        grid = self.fit(state, factor.importance)

        def choose(w: Tensor, d: Tensor, start: int) -> Tensor:
            """Remove what is removed already: w is (out, k)."""
            return pruned[:, factor.columns[start : start + w.shape[1]]]

        aim = self.aim(weight, statistics, factor)
        swept, _ = sweep(aim, factor.U, grid=grid, choose=choose, order=factor.columns)
        rounded = grid.nearest(weight)
        new, lost = keep_better_rows(swept.to(weight.dtype), rounded, aim, statistics[Gram])
        notes = self.remarks_on(grid)
        notes += remarks(self.stage, options.damping, factor.damping, lost, len(weight))
        return dataclasses.replace(state, weight=new, grid=grid, notes=state.notes + notes)
