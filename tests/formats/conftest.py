"""What the tests of formats share: layers after an order, in a model or alone."""

import pytest
import torch
from torch import nn

from optimum_order.engine.recipe import method
from optimum_order.formats import Contents, Layers
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.models import hf
from optimum_order.models.units import find_targets, find_units
from optimum_order.order import Order


def _applied(order, state, name="layer"):
    rows = torch.randn(8, state.weight.shape[1], generator=torch.Generator().manual_seed(0))
    for stage in Order.parse(order):
        backend = method(stage)
        state = backend.apply(state, Statistics.of(rows, backend.needs), where=name)
    return state


@pytest.fixture(scope="session")
def applied():
    """`applied("magnitude:0.5 > rtn:4", state)`: a layer after an order, its inputs noise."""
    return _applied


@pytest.fixture(scope="session")
def compressed():
    """`compressed(model, ["rtn:4"])`: a model whose layers were compressed and written back.

    The orders are dealt to the layers in turn, and experts all get the last one. `special` gives
    other orders to layers whose name contains a key, or leaves them out if the order is None.
    """

    def compressed(model, orders, targets=None, special=None):
        orders = [orders] if isinstance(orders, str) else orders
        units = find_units(model, targets)
        by_name = {target.name: target for unit in units for target in unit.targets}
        states = {}
        for index, (name, target) in enumerate(by_name.items()):
            order = orders[-1] if target.kind == "expert" else orders[index % len(orders)]
            keys = [key for key in special or {} if key in name]
            order = special[keys[0]] if keys else order
            if order is None:
                continue
            states[name] = _applied(order, LayerState(target.read()), name)
            target.put(states[name])
        return Contents(model, Layers(by_name, states))

    return compressed


@pytest.fixture(scope="session")
def target_of():
    """`target_of("conv1d")`: a target of that kind."""

    class Experts(nn.Module):
        is_transposed = False

        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(1, 1, 1))

    modules = {
        "linear": nn.Linear(1, 1),
        "conv1d": hf.Conv1D(1, 1),
        "conv2d": nn.Conv2d(1, 2, 1),
        "expert": Experts(),
    }
    targets = find_targets(nn.ModuleDict(modules))
    return {target.kind: target for target in targets}.__getitem__
