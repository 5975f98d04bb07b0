"""Round to nearest: every weight goes to the nearest value of its group's grid. Needs no data."""

import dataclasses

from optimum_order.backends.uniform import UniformQuantizer


class RTN(UniformQuantizer):
    """Each weight independently; zero is on every grid, so what is pruned stays so."""

    name = "rtn"
    summary = "round every weight to the nearest value of a uniform grid"

    def compress(self, state, statistics):
        grid = self.fit(state)
        return dataclasses.replace(state, weight=grid.nearest(state.weight), grid=grid)
