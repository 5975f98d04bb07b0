"""The state of one layer between stages, and the promises every stage keeps about it.

A layer is a matrix `W` of shape (out, in), whatever module it came from. Its state is three things: the weight,
which weights are `pruned`, and the `grid` of values a quantized weight may take. `pruned` is stated, never
inferred: rounding alone turns 15 % of Gaussian weights into zeros at 4 bit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_order.errors import InvariantError
from optimum_order.layers.grids.base import Grid

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


@dataclass(frozen=True)
class StageRecord:
    """What one stage did to one layer, for the manifest.

    Args:
        stage: The concrete stage, as canonical text.
        relative_error: Squared error it added over the squared size of what it found.
        measured_on: "outputs" (`tr(dW H dW^T) / tr(W H W^T)`), "inputs" (the same with H's diagonal) or "weights".
    """

    stage: str
    relative_error: float
    measured_on: str


@dataclass(frozen=True)
class LayerState:
    """One layer between stages.

    Args:
        weight: (out, in), in the dtype of the artifact.
        pruned: (out, in) bool, True where a weight was removed; None if none was.
        grid: Where the weights lie once quantised; None before.
        notes: What happened on the way that a reader of the result should know, such as a raised damping.
    """

    weight: Tensor
    pruned: Tensor | None = None
    grid: Grid | None = None
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> Tensor:
        """`pruned`, or a mask of nothing: (out, in) bool."""
        return (
            torch.zeros_like(self.weight, dtype=torch.bool) if self.pruned is None else self.pruned
        )

    @property
    def sparsity(self) -> float:
        """The fraction of weights removed, between 0 and 1."""
        return 0.0 if self.pruned is None else self.pruned.float().mean(dtype=torch.float64).item()

    @property
    def bits(self) -> int:
        """Width of one stored weight, in bits."""
        return self.weight.element_size() * 8 if self.grid is None else self.grid.bits

    def to(self, device: torch.device) -> LayerState:
        """The state with all of its tensors on a device."""
        return _moved(self, device)

    def check(self, where: str) -> None:
        """Raise InvariantError unless this state keeps every promise.

        Args:
            where: Names the layer and stage in the message.
        """

        def broken(what: str) -> InvariantError:
            return InvariantError(
                f"{where}: {what}. This is a bug in the backend, not in your input."
            )

        if not torch.isfinite(
            torch.stack(self.weight.aminmax())
        ).all():  # NaN is the least and the most of anything
            raise broken("a weight is NaN or infinite")
        if self.pruned is not None:
            if self.pruned.dtype != torch.bool or self.pruned.shape != self.weight.shape:
                raise broken("the mask is not a boolean tensor of the weight's shape")
            # the bits of +0.0, and of nothing else, are 0
            if lost := int(torch.count_nonzero(integers(self.weight).masked_fill(~self.pruned, 0))):
                raise broken(f"{lost} pruned weights are no longer +0.0")
        if self.grid is not None:
            if self.grid.dtype != self.weight.dtype:
                raise broken(f"the grid is in {self.grid.dtype}, the weight in {self.weight.dtype}")
            if not self.grid.holds(self.weight):
                raise broken("a weight is off its quantisation grid")


def integers(weight: Tensor) -> Tensor:
    """The bits of a weight, as integers in the same memory: equal only where it is the same to the sign of a zero."""
    return weight.view(_INTEGERS[weight.element_size()])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _moved(value: Any, device: torch.device) -> Any:
    """A value with its tensors, and those of the dataclasses in it, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.replace(
        value,
        **{
            field.name: _moved(getattr(value, field.name), device)
            for field in dataclasses.fields(value)
        },
    )
