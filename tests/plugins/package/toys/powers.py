"""Round to powers of two, with the range of each row chosen for its largest inputs."""

from __future__ import annotations

import dataclasses

import torch

from optimum_order.backends import Backend, option
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from toys.absmax import AbsMax
from toys.powers_grid import PowersGrid


@dataclasses.dataclass(frozen=True)
class PowersOptions:
    """The width of a weight."""

    bits: int = option(4, "width of a weight", check=lambda v: 2 <= v <= 4, allowed="2, 3 or 4")


class Powers(Backend):
    """Round to zero and powers of two: the less of `sum_j (max|x_j| dw_j)^2`, of two ranges."""

    name = "powers"
    summary = "round to zero and powers of two"
    kind = "quantize"
    needs = frozenset({AbsMax})
    Options = PowersOptions

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        weight = state.weight  # (out, in)
        largest = statistics[AbsMax]  # (in,)

        def error(grid: PowersGrid) -> torch.Tensor:
            delta = grid.nearest(weight).float() - weight.float()
            return (delta * largest).square().sum(1)

        wide = PowersGrid.fit(weight, self.options.bits)
        narrow = dataclasses.replace(wide, top=wide.top - 1)
        top = torch.where(error(narrow) < error(wide), narrow.top, wide.top)
        grid = dataclasses.replace(wide, top=top)
        return dataclasses.replace(state, weight=grid.nearest(weight), grid=grid)
