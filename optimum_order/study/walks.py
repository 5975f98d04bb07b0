"""What a study learns from the blocks of the original model, in two walks over it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Generator, Mapping

from torch import Tensor

from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine.runner import Batches, Runner
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Accumulator, Gram, Statistics

_MOST_GRAM_BYTES = 4 * 2**30


def input_statistics(runner: Runner, draw: int) -> dict[str, Statistics]:
    """Gather the Gram matrix of the input of each layer in the original model.

    Args:
        runner: The model; its weights are the original's afterwards.
        draw: Number of the calibration draw.

    Returns:
        The statistics by layer; empty without calibration, or where memory would not suffice.
    """
    widths = (state.weight.shape[1] for state in runner.original.states.values())
    batches = runner.batches(draw)
    statistics: dict[str, Statistics] = {}
    if batches and sum(4 * width**2 for width in widths) <= _MOST_GRAM_BYTES:
        with contextlib.closing(_visits(runner, batches, {Gram})) as visits:
            for visit in visits:
                statistics.update(visit.statistics)
    return statistics


def error_correlations(
    runner: Runner, states: Mapping[str, LayerState]
) -> list[list[float | None]]:
    """Correlate the output errors of blocks, each compressed alone, on the original inputs.

    The error of a block is the change of its output, a vector over tokens and hidden dimensions.
    The correlation of two errors is their cosine: zero for independent errors.

    Args:
        runner: The model; its weights are the original's afterwards.
        states: Every compressed layer by name.

    Returns:
        (blocks, blocks), None where shapes differ or an error is zero; empty without calibration.
    """
    batches = runner.batches(0)[:1]
    if not batches:
        return []
    errors: list[Tensor] = []
    with contextlib.closing(_visits(runner, batches, ())) as visits:
        for visit in visits:
            before = visit.outputs()
            for target in visit.targets:
                target.put(states[target.name])
            errors.append(visit.outputs() - before)
            for target in visit.targets:
                target.put(runner.original.states[target.name])
    return [[_cosine(one, other) for other in errors] for one in errors]


def _visits(
    runner: Runner, batches: Batches, needs: Collection[type[Accumulator]]
) -> Generator[Visit, None, None]:
    runner.reset()
    execution = dataclasses.replace(runner.execution, pause="block")
    return walk(runner.model, runner.units, batches, needs=needs, execution=execution)


def _cosine(one: Tensor, other: Tensor) -> float | None:
    if one.shape != other.shape:
        return None
    one = one.flatten().double()
    other = other.flatten().double()
    size = (one.square().sum() * other.square().sum()).sqrt().item()
    return (one @ other).item() / size if size else None
