"""What orders do to some layers, each by itself: the error of their outputs, and their bytes.

The layers lie all over the depth and the kinds of layers, and read inputs of the original model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from optimum_order.backends import Allocator, Measured
from optimum_order.calibration.glance import glance
from optimum_order.engine.recipe import method
from optimum_order.engine.runner import Batches, Runner
from optimum_order.formats import Codec
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.models.units import Target
from optimum_order.order import Order, Stage
from optimum_order.search.sketch import one_layer, spread


@dataclass(frozen=True)
class Look:
    """What an order does to some layers.

    Args:
        error: Mean relative squared error of their outputs.
        bits: Bits of a weight in a format, all side information counted; None where nobody asked.
        layers: How many layers.
    """

    error: float
    bits: float | None
    layers: int


@dataclass(frozen=True)
class _Seen:
    """One layer after some stages: its error, its bytes where they were asked for, its widths."""

    error: float
    bytes: int | None
    width: int
    stored_bits: float
    weights: int


def look(
    runner: Runner,
    batches: Batches,
    asked: Mapping[Order, Codec | None],
    count: int,
    done: Callable[[], object] = lambda: None,
) -> dict[Order, Look]:
    """Return what orders do to some layers. A layer's state is kept no longer than it is looked at.

    Args:
        runner: The model, as it was.
        batches: A few calibration samples.
        asked: The orders, each with the format whose bytes are wanted. A stage prunes or quantizes
            one layer by itself, or an order is one stage that chooses such stages for each layer.
        count: How many layers.
        done: Called after each layer.
    """
    runner.reset()
    targets = {target.name: target for unit in runner.units for target in unit.targets}
    names = [list(targets)[place] for place in spread(len(targets))[:count]]
    concrete: dict[Order, Codec | None] = {}
    for order, codec in asked.items():
        for choice in _choices(order):
            concrete[choice] = codec or concrete.get(choice)
    seen: dict[str, dict[Order, _Seen]] = {}
    for name in names:
        statistics = glance(runner.model, [targets[name]], batches, runner.dtype)[name]
        state = runner.original.states[name]
        seen[name] = _compressed(state, statistics, targets[name], concrete)
        done()
    return {order: _summary(order, seen) for order in asked}


def _choices(order: Order) -> list[Order]:
    """Return what a layer may get: the order, or one of the stages that its only stage chooses."""
    chosen = method(order[0])
    if chosen.kind != "allocate":
        return [order]
    return [Order([stage]) for stage in cast(Allocator, chosen).candidates()]


def _compressed(
    state: LayerState,
    statistics: Statistics,
    target: Target,
    orders: Mapping[Order, Codec | None],
) -> dict[Order, _Seen]:
    """Return a layer after each order, every shared beginning computed once."""
    states: dict[tuple[Stage, ...], LayerState] = {(): state}
    seen = {}
    for order, codec in orders.items():
        for length, stage in enumerate(order, 1):
            prefix = order.stages[:length]
            if prefix not in states:
                before = states[prefix[:-1]]
                states[prefix] = one_layer(stage).apply(before, statistics, where=target.name)
        after = states[order.stages]
        size = None
        if codec is not None:
            encoded = codec.encode(after) if codec.encodes(after) else {"weight": after.weight}
            size = sum(tensor.nbytes for tensor in encoded.values())
        error = relative_error(state.weight, after.weight, statistics)[0]
        seen[order] = _Seen(error, size, after.bits, after.stored_bits, after.weight.numel())
    return seen


def _summary(order: Order, seen: Mapping[str, Mapping[Order, _Seen]]) -> Look:
    """Return what an order does to all layers that were looked at."""
    layers = {name: rows[order] for name, rows in seen.items() if order in rows}
    if not layers:
        layers = _allocated(cast(Allocator, method(order[0])), seen)
    sizes = [layer.bytes for layer in layers.values()]
    weights = sum(layer.weights for layer in layers.values())
    counted = [size for size in sizes if size is not None]
    bits = 8 * sum(counted) / weights if len(counted) == len(sizes) else None
    return Look(_mean(layer.error for layer in layers.values()), bits, len(layers))


def _allocated(allocator: Allocator, seen: Mapping[str, Mapping[Order, _Seen]]) -> dict[str, _Seen]:
    """Return the layers as an allocator would have them, by the errors of their own outputs."""
    table = []
    for name, rows in seen.items():
        for stage in allocator.candidates():
            row = rows[Order([stage])]
            table.append(
                Measured((name,), row.weights, stage, row.width, row.stored_bits, row.error)
            )
    chosen = {name: stage for part in allocator.allocate(table) for name, stage in part.items()}
    return {name: seen[name][Order([stage])] for name, stage in chosen.items()}


def _mean(values: Iterable[float]) -> float:
    listed: Sequence[float] = list(values)
    return sum(listed) / len(listed)
