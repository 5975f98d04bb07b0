"""Magnitude pruning: remove the smallest `|W|`. Needs no data.

Source: Han et al. 2015, arXiv 1506.02626, section 3.
"""

import dataclasses

from optimum_order.backends.base import option
from optimum_order.backends.selection import Pruner, PruningOptions, lowest, remove
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class MagnitudeOptions(PruningOptions):
    """The options of pruning, and the scope in which weights compete."""

    per: str = option(
        "layer",
        "where weights compete",
        check=lambda v: v in ("layer", "row"),
        allowed="layer or row",
    )


class Magnitude(Pruner):
    """Score `|W|`, compared within the layer, each row, or each N:M group."""

    name = "magnitude"
    summary = "prune the smallest |W|"
    Options = MagnitudeOptions
    options: MagnitudeOptions

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        score = state.weight.abs()  # (out, in)
        pruned = lowest(score, self.options, state.pruned, per=self.options.per)
        return remove(state, pruned, off_grid=self.options.off_grid)
