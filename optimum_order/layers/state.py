"""The state of one layer between stages, and the promises that every stage keeps.

A layer is a matrix `W` of shape (out, in), whatever module holds it. Its state is the weight, the
mask `pruned` of removed weights, the `grid` of values that a quantized weight may take, that of
`inputs` which the layer rounds before it multiplies them, and the `adapter` that it adds.
`pruned` is stated, never inferred: rounding alone turns 15 % of Gaussian weights into zeros at
4 bit.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_order.errors import InvariantError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.low_rank import DTYPES, LowRank
from optimum_order.layers.tree import map_tensors

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size in bytes."""


@dataclass(frozen=True)
class StageRecord:
    """The effect of one stage on one layer, for the manifest.

    Args:
        stage: The concrete stage, as canonical text.
        relative_error: Squared error that the stage added, over the squared size of the layer
            before.
        measured_on: "outputs" (`tr(dW H dW^T) / tr(W H W^T)`), "inputs" (the same with H's
            diagonal) or "weights".
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
        grid: The grid of a quantized weight; None before.
        notes: Events that a reader of the result should know, such as a raised damping.
        inputs: The grid of the layer's inputs; None where these are read as they are.
        adapter: What the layer adds to the product with the weight; None where it adds nothing.
        original: (out, in), the weight before any stage removed or rounded a part of it. Only a
            backend that asks for it (`Backend.reads_original`) sees one; None everywhere else.
    """

    weight: Tensor
    pruned: Tensor | None = None
    grid: Grid | None = None
    notes: tuple[str, ...] = ()
    inputs: InputGrid | None = None
    adapter: LowRank | None = None
    original: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """`pruned`, or a mask of nothing: (out, in) bool."""
        if self.pruned is None:
            return torch.zeros_like(self.weight, dtype=torch.bool)
        return self.pruned

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed, between 0 and 1."""
        return 0.0 if self.pruned is None else self.pruned.float().mean(dtype=torch.float64).item()

    @property
    def has_zero(self) -> bool:
        """Whether zero is a value that a weight may have, so that weights can be pruned."""
        return self.grid is None or self.grid.has_zero

    @property
    def bits(self) -> int:
        """Width of one stored weight, in bits."""
        return self.weight.element_size() * 8 if self.grid is None else self.grid.bits

    @property
    def stored_bits(self) -> float:
        """Bits of one stored weight, with its part of the scales."""
        return self.bits if self.grid is None else self.grid.stored_bits

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale, -1 for all; None if there is no grid of such groups."""
        return None if self.grid is None else self.grid.group_size

    def __repr__(self) -> str:
        outputs, inputs = self.weight.shape
        facts = [f"{outputs} x {inputs}", str(self.weight.dtype).removeprefix("torch.")]
        if self.pruned is not None:
            facts.append(f"{self.sparsity:.1%} pruned")
        if self.grid is not None:
            groups = {None: "", -1: " in rows"}.get(self.group_size, f" in {self.group_size}s")
            facts.append(f"{self.bits}-bit {type(self.grid).__name__}{groups}")
        if self.inputs is not None:
            facts.append(f"inputs {self.inputs.words}")
        if self.adapter is not None:
            facts.append(f"adapter of rank {self.adapter.rank}")
        if self.notes:
            facts.append(f"{len(self.notes)} note{'s' if len(self.notes) > 1 else ''}")
        return f"LayerState({', '.join(facts)})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def to(self, device: torch.device) -> LayerState:
        """Return the state with all of its tensors on a device."""
        return map_tensors(lambda tensor: tensor.to(device), self)

    def check(self, where: str) -> None:
        """Check every promise that a stage keeps.

        Args:
            where: Names the layer and stage in the message.

        Raises:
            InvariantError: If a weight is not finite, a pruned weight is not +0.0, a weight is
                off its grid, or an adapter does not fit.
        """

        def broken(promise: str) -> InvariantError:
            return InvariantError(
                f"{where}: {promise}. This is a bug in the backend, not in your input."
            )

        if not is_finite(self.weight):
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
                raise broken("a weight is off its quantization grid")
        if self.adapter is not None:
            a, b = self.adapter.a, self.adapter.b
            if (len(b), a.shape[1]) != self.weight.shape or b.shape[1] != len(a):
                raise broken("the adapter does not have the shape of the weight")
            if a.dtype not in DTYPES or b.dtype != a.dtype:
                raise broken(f"the adapter is in {a.dtype} and {b.dtype}, not in 16 bits")
            if not (is_finite(a) and is_finite(b)):
                raise broken("an entry of the adapter is NaN or infinite")


def is_finite(weight: Tensor) -> bool:
    """Return whether no value is NaN or infinite, without a mask of all of them.

    Args:
        weight: Any shape, floating-point.
    """
    # NaN is the least and the most of anything
    return weight.numel() == 0 or bool(torch.isfinite(torch.stack(weight.aminmax())).all())


def integers(weight: Tensor) -> Tensor:
    """Return the bits of a weight as integers in the same memory.

    Two are equal only where the weights are, down to the sign of a zero.

    Args:
        weight: Any shape, floating-point.
    """
    return weight.view(_INTEGERS[weight.element_size()])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
