"""Wanda: remove the smallest `|W_ij| * ||X_j||_2` of each row.

Source: Sun et al. 2023, arXiv 2306.11695, equation 1 and algorithm 1.
"""

from torch import Tensor

from optimum_order.backends.allocation import AllocatedPruner
from optimum_order.backends.selection import lowest, remove
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import SquaredNorms, Statistics


class Wanda(AllocatedPruner):
    """Score `|W| * ||X||_2`, compared within each row or each N:M group."""

    name = "wanda"
    summary = "prune the smallest |W| * ||X|| in each row"
    needs = frozenset({SquaredNorms})

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        norms = statistics[SquaredNorms].sqrt()  # (in,)
        score = state.weight.float().abs() * norms  # (out, in)
        pruned = lowest(score, self.options, state.pruned, per="row")
        return remove(state, pruned, off_grid=self.options.off_grid)

    def costs(self, state: LayerState, statistics: Statistics) -> Tensor:
        norms: Tensor = statistics[SquaredNorms]  # (in,)
        return state.weight.float().square() * norms
