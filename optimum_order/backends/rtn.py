"""Round to nearest: every weight goes to the nearest value of its group's grid. Needs no data."""

import dataclasses

from optimum_order.backends.uniform import UniformQuantizer
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics


class RTN(UniformQuantizer):
    """Round each weight by itself; zero is on every grid, so pruned weights stay zero."""

    name = "rtn"
    summary = "round every weight to the nearest value of a uniform grid"

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        grid = self.fit(state)
        notes = state.notes + self.remarks_on(grid)
        return dataclasses.replace(state, weight=grid.nearest(state.weight), grid=grid, notes=notes)
