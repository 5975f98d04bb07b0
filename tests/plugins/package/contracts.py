"""The promises of optimum-order's kinds of plug-ins, for these."""

from toys.absmax import AbsMax
from toys.powers import Powers
from toys.powers_grid import PowersGrid

from optimum_order.testing import AccumulatorContract, BackendContract, GridContract


class TestAbsMax(AccumulatorContract):
    accumulator = AbsMax
    tolerance = 0.0


class TestPowersGrid(GridContract):
    def grids(self, weight):
        for bits in (2, 3, 4):
            yield PowersGrid.fit(weight, bits)


class TestPowers(BackendContract):
    backend = Powers
    stages = ("powers", "powers:2", "powers:3")
