"""Let a recovery change layers, and hold it to their masks and grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_order.backends.base import Recovery
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.state import LayerState

if TYPE_CHECKING:
    from optimum_order.engine.run import Subject


def recover(
    method: Recovery, subject: Subject, states: Mapping[str, LayerState]
) -> Iterator[tuple[str, LayerState, LayerState]]:
    """Carry a recovery out.

    Args:
        method: The recovery.
        subject: The model, not changed here, and its calibration inputs.
        states: Every layer by name.

    Yields:
        The name of each layer that changed, its state before, and its state after.

    Raises:
        InvariantError: If a layer left its mask, or its codes did not stay what they were.
        ModelError: If the original model cannot be had.
    """
    if subject.original is None:
        raise ModelError(
            f"Stage '{method.stage}' learns from the original model, and none is given."
        )
    changed = method.recover(subject.model, states, subject.batches, subject.original())
    for name, after in changed.items():
        before = states[name]
        where = f"{name}, stage '{method.stage}'"
        if not torch.equal(before.mask, after.mask):
            raise InvariantError(f"{where}: the recovery changed the mask.")
        if (before.grid is None) != (after.grid is None):
            raise InvariantError(f"{where}: the recovery dropped or made a grid.")
        if before.grid is not None and after.grid is not None:
            codes = before.grid.quantize(before.weight)
            if not _same(before.grid, after.grid) and (
                type(before.grid) is not type(after.grid)
                or not torch.equal(codes, after.grid.quantize(after.weight))
            ):
                raise InvariantError(
                    f"{where}: the recovery changed the layer's codes, and its grid too."
                )
        after.check(where)
        yield name, before, after


def _same(one: Grid, other: Grid) -> bool:
    """Return whether two grids have the same values."""
    if type(one) is not type(other):
        return False
    # not what a grid remembers of its own work
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        mine, others = getattr(one, field.name), getattr(other, field.name)
        tensors = isinstance(mine, Tensor) and isinstance(others, Tensor)
        if not (torch.equal(mine, others) if tensors else mine == others):
            return False
    return True
