"""Magnitude pruning: remove the smallest `|W|` (Han et al. 2015, arXiv 1506.02626). Needs no data."""

import dataclasses

from optimum_order.backends.base import option
from optimum_order.backends.selection import Pruner, PruningOptions, lowest, remove


@dataclasses.dataclass(frozen=True)
class MagnitudeOptions(PruningOptions):
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

    def compress(self, state, statistics):
        pruned = lowest(state.weight.abs(), self.options, state.pruned, per=self.options.per)
        return remove(state, pruned, off_grid=self.options.off_grid)
