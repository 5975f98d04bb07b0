"""Layers' states kept small while nobody looks at them: between stages in memory, and of a unit on disk.

A mask is kept as bits. A weight in memory stays as it is; on disk it is left out where all that was done to it so far
is to remove parts of it, since the model has the rest, and where it lies on a uniform grid its codes take its place.
Whatever is left out comes back bit for bit, or is not left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimum_order.layers.grids.base import Grid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState, integers


@dataclass(frozen=True)
class Packed:
    """A `LayerState`, small.

    Args:
        shape: (out, in).
        weight: (out, in), the values or the integer codes of the grid; None where it is the model's own weight with
            +0.0 where it was pruned.
        pruned: (ceil(out * in / 8),) uint8, the mask row by row with the first weight in a byte's highest bit; None
            if nothing was pruned.
        grid: As in the state.
        notes: As in the state.
    """

    shape: tuple[int, int]
    weight: Tensor | None
    pruned: Tensor | None
    grid: Grid | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, state: LayerState) -> Packed:
        """The state with its mask as bits; the weight is the same tensor."""
        rows, inputs = state.weight.shape
        return cls((rows, inputs), state.weight, bits(state.pruned), state.grid, state.notes)

    def reduced(self, *, only_masked: bool) -> Packed:
        """The state with as little of the weight as gives it back.

        Args:
            only_masked: Whether the weight is the model's own but for what was pruned, see `is_masked`.
        """
        weight = None if only_masked else self.weight
        # Codes of other grids take longer to find than the values to write, nf4's ten times as long.
        if weight is not None and isinstance(self.grid, UniformGrid):
            codes = _small(self.grid.quantize(weight))
            if codes is not None and torch.equal(
                integers(self.grid.dequantize(codes.short())), integers(weight)
            ):
                weight = codes
        return dataclasses.replace(self, weight=weight)

    def state(self, own: Tensor | None = None) -> LayerState:
        """The state again.

        Args:
            own: The model's own weight (out, in), pruned or not; needed where `weight` is None.
        """
        weight, pruned = self.weight, mask(self.pruned, self.shape)
        if weight is None:
            assert own is not None
            weight = own if pruned is None else own.masked_fill(pruned.to(own.device), 0.0)
        elif not weight.is_floating_point():
            assert self.grid is not None
            weight = self.grid.dequantize(weight.short())
        return LayerState(
            weight, None if pruned is None else pruned.to(weight.device), self.grid, self.notes
        )


class States(MutableMapping[str, LayerState]):
    """The states of layers by name, their masks as bits."""

    def __init__(self, states: Mapping[str, LayerState]):
        self._held = {name: Packed.of(state) for name, state in states.items()}

    def __getitem__(self, name: str) -> LayerState:
        return self._held[name].state()

    def __setitem__(self, name: str, state: LayerState) -> None:
        self._held[name] = Packed.of(state)

    def __delitem__(self, name: str) -> None:
        raise TypeError("every layer has a state")

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def is_masked(before: LayerState, after: LayerState) -> bool:
    """Whether a stage has done no more to a weight than to remove parts of it: all others have the bits they had."""
    if after.grid is not None:
        return False
    if after.pruned is None:
        return torch.equal(integers(before.weight), integers(after.weight))
    changed = integers(before.weight) != integers(after.weight)
    return torch.equal(changed.logical_or_(after.pruned), after.pruned)


def bits(mask: Tensor | None) -> Tensor | None:
    """A mask of any shape as bits, (ceil(n / 8),) uint8 on the CPU."""
    return (
        None if mask is None else torch.from_numpy(np.packbits(mask.numpy(force=True).reshape(-1)))
    )


def mask(bits: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask of this shape again, on the CPU."""
    if bits is None:
        return None
    found = np.unpackbits(bits.numpy(force=True), count=math.prod(shape))
    return torch.from_numpy(found).view(torch.bool).view(shape)


def _small(codes: Tensor) -> Tensor | None:
    """Codes in one byte each, if they fit."""
    least, most = (int(end) for end in codes.aminmax())
    for dtype in (torch.int8, torch.uint8):
        if torch.iinfo(dtype).min <= least and most <= torch.iinfo(dtype).max:
            return codes.to(dtype)
    return None
