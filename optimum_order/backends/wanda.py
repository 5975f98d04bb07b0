"""Wanda: remove the smallest `|W_ij| * ||X_j||_2` of each row (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from optimum_order.backends.selection import Pruner, lowest, remove
from optimum_order.layers.statistics import SquaredNorms


class Wanda(Pruner):
    """Score `|W| * ||X||_2`, compared within each row or each N:M group."""

    name = "wanda"
    summary = "prune the smallest |W| * ||X|| in each row"
    needs = frozenset({SquaredNorms})

    def compress(self, state, statistics):
        score = state.weight.float().abs() * statistics[SquaredNorms].sqrt()
        return remove(
            state,
            lowest(score, self.options, state.pruned, per="row"),
            off_grid=self.options.off_grid,
        )
