"""Layer states in a small form: between stages in memory, and of a block on disk.

A mask is stored as bits. In memory a weight stays as it is. On disk a weight is left out if stages
did no more than remove parts of it, since the model has the rest; and where the grid's codes are
cheap, they take its place. Whatever is left out comes back bit for bit, or is not left out.
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
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.state import LayerState, integers


@dataclass(frozen=True)
class Packed:
    """A small `LayerState`.

    Args:
        shape: (out, in).
        weight: (out, in), the values or the integer codes of the grid; None for the model's own
            weight with +0.0 where it was pruned.
        pruned: (ceil(out * in / 8),) uint8, the mask row by row with the first weight in a byte's
            highest bit; None if nothing was pruned.
        grid: As in the state.
        notes: As in the state.
        inputs: As in the state.
        adapter: As in the state.
    """

    shape: tuple[int, int]
    weight: Tensor | None
    pruned: Tensor | None
    grid: Grid | None
    notes: tuple[str, ...]
    inputs: InputGrid | None = None
    adapter: LowRank | None = None

    @classmethod
    def of(cls, state: LayerState) -> Packed:
        """Return the state with its mask as bits; the weight is the same tensor."""
        rows, inputs = state.weight.shape
        return cls(
            (rows, inputs),
            state.weight,
            bits(state.pruned),
            state.grid,
            state.notes,
            state.inputs,
            state.adapter,
        )

    def reduced(self, *, only_masked: bool) -> Packed:
        """Return the state with as little of the weight as gives the weight back.

        Args:
            only_masked: Whether the weight is the model's own but for pruning, see `is_masked`.
        """
        if only_masked:
            return dataclasses.replace(self, weight=None)
        # nf4's codes take ten times longer than writing the values
        if self.weight is None or self.grid is None or not self.grid.codes_are_cheap:
            return self
        codes = _in_bytes(self.grid.quantize(self.weight))
        if codes is None:
            return self
        again = self.grid.dequantize(codes.short())
        same = torch.equal(integers(again), integers(self.weight))
        return dataclasses.replace(self, weight=codes) if same else self

    def state(self, own: Tensor | None = None) -> LayerState:
        """Return the state.

        Args:
            own: The model's own weight (out, in), pruned or not; needed if `weight` is None.
        """
        weight = self.weight
        pruned = mask(self.pruned, self.shape)
        if weight is None:
            assert own is not None
            weight = own if pruned is None else own.masked_fill(pruned.to(own.device), 0.0)
        elif not weight.is_floating_point():
            assert self.grid is not None
            weight = self.grid.dequantize(weight.short())
        if pruned is not None:
            pruned = pruned.to(weight.device)
        return LayerState(weight, pruned, self.grid, self.notes, self.inputs, self.adapter)


class States(MutableMapping[str, LayerState]):
    """The states of layers by name, their masks as bits.

    Args:
        states: The states; their weights are shared.
    """

    def __init__(self, states: Mapping[str, LayerState]):
        self._packed = {name: Packed.of(state) for name, state in states.items()}

    def __getitem__(self, name: str) -> LayerState:
        return self._packed[name].state()

    def __setitem__(self, name: str, state: LayerState) -> None:
        self._packed[name] = Packed.of(state)

    def __delitem__(self, name: str) -> None:
        raise TypeError("every layer has a state")

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def is_masked(before: LayerState, after: LayerState) -> bool:
    """Return whether a stage did no more to a weight than remove parts of it.

    All other weights then have the bits they had.

    Args:
        before: The layer before the stage.
        after: The layer after the stage.
    """
    if after.grid is not None:
        return False
    if after.pruned is None:
        return torch.equal(integers(before.weight), integers(after.weight))
    changed = integers(before.weight) != integers(after.weight)
    return torch.equal(changed.logical_or_(after.pruned), after.pruned)


def bits(mask: Tensor | None) -> Tensor | None:
    """Return a mask of any shape as bits, (ceil(n / 8),) uint8 on the CPU."""
    if mask is None:
        return None
    return torch.from_numpy(np.packbits(mask.numpy(force=True).reshape(-1)))


def mask(bits: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the mask that `bits` made small, on the CPU.

    Args:
        bits: (ceil(n / 8),) uint8, or None.
        shape: Of the mask, with n entries.
    """
    if bits is None:
        return None
    unpacked = np.unpackbits(bits.numpy(force=True), count=math.prod(shape))
    return torch.from_numpy(unpacked).view(torch.bool).view(shape)


def _in_bytes(codes: Tensor) -> Tensor | None:
    """Return codes in one byte each, or None if a byte is too small."""
    least, most = (int(end) for end in codes.aminmax())
    for dtype in (torch.int8, torch.uint8):
        if torch.iinfo(dtype).min <= least and most <= torch.iinfo(dtype).max:
            return codes.to(dtype)
    return None
