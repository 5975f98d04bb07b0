"""Grids: the values that each weight of one layer may take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

Selection = slice | Tensor
"""Rows or columns of W: a slice, or (k,) int64 indices in any order."""
ALL = slice(None)

Rounder = Callable[[int, Tensor, Tensor], Any]
"""Rounds one column, see `Grid.rounder`."""


class Grid(ABC):
    """The values that each weight of one layer may take. Zero is one of them, see `has_zero`.

    A subclass is one file: a frozen dataclass whose tensors are fields. Codes are what a format
    packs. `dequantize(quantize(W))` is the nearest point of the grid in the dtype in which the
    artifact is loaded, so that the weight that was measured is the weight that loads.
    `optimum_order.testing.GridContract` tests a subclass.
    """

    bits: int
    """Width of one code."""
    dtype: torch.dtype
    """Dtype of the dequantized weight."""
    group_size: int | None = None
    """Inputs of one output that share a scale, -1 for all; None if scales are shared otherwise."""
    has_zero: bool = True
    """Whether zero is on the grid. A layer where it is not cannot be pruned."""
    codes_are_cheap: ClassVar[bool] = False
    """True if `quantize` takes less time than to write the values to a disk."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Weights per scale."""

    @property
    def stored_bits(self) -> float:
        """Bits of a weight in a file, with its part of the scales; here those of its code alone."""
        return self.bits

    @abstractmethod
    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        """Return the codes of the nearest grid values.

        Args:
            weight: (out, k), values in the selected columns of W.
            columns: The k columns.

        Returns:
            (out, k) int16.
        """

    @abstractmethod
    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        """Return the values of codes.

        Args:
            codes: (out, k) int16.
            columns: The k columns of W that the codes belong to.

        Returns:
            (out, k) in `dtype`.
        """

    @abstractmethod
    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        """Return the grid of a part of W.

        `grid.take(r, c).dequantize(codes[r][:, c])` equals `grid.dequantize(codes)[r][:, c]`.

        Args:
            rows: Outputs to take.
            columns: Inputs to take.

        Raises:
            ValueError: If the selection separates weights that share a scale.
        """

    @classmethod
    @abstractmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        """Return the grid of weights stacked along their outputs, the inverse of `take(rows)`.

        Args:
            grids: At least one; the first covers the first rows.

        Raises:
            ValueError: If one grid cannot stand for all, because bits, dtype or layout differ.
        """

    @abstractmethod
    def like(self, rows: int, inputs: int) -> Self:
        """Return a grid of the same kind for another shape, its scales on the meta device.

        An estimate of bytes asks for it: shapes and dtypes are right, values are absent.

        Args:
            rows: Outputs of the other layer.
            inputs: Inputs of the other layer.

        Raises:
            ValueError: If the layout does not fit the shape.
        """

    @property
    def scales(self) -> Tensor | None:
        """Scales that may be others while codes stay, (out, groups), each of as many inputs.

        None if there are none. `with_scales` makes use of them.
        """
        return None

    def with_scales(self, scales: Tensor) -> Self:
        """Return the grid with other scales, rounded and clamped to what the grid can store.

        Codes stay: what they are is what `quantize` gives for their new values.

        Args:
            scales: (out, groups) float32, positive.

        Raises:
            NotImplementedError: If `scales` is None.
        """
        raise NotImplementedError(f"The scales of a {type(self).__name__} are not free.")

    def nearest(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        """Return the grid values nearest to a weight.

        Args:
            weight: (out, k), values in the selected columns of W.
            columns: The k columns.

        Returns:
            (out, k) in `dtype`.
        """
        return self.dequantize(self.quantize(weight, columns), columns)

    def rounder(self, columns: Tensor) -> Rounder:
        """Return `nearest` for a sweep, which rounds one column at a time.

        Args:
            columns: (k,) columns of W.

        Returns:
            A function of i, of the values (out,) of column `columns[i]`, and of the tensor (out,)
            float32 that receives the nearest grid values. A zero may come out as -0.0.
        """
        return lambda i, w, out: out.copy_(self.nearest(w[:, None], columns[i : i + 1])[:, 0])

    def holds(self, weight: Tensor) -> bool:
        """Return whether every weight (out, in) lies on the grid, bit for bit."""
        return torch.equal(self.nearest(weight), weight.to(self.dtype))


def whole_groups(owners: Tensor, size: int, name: str = "group") -> Tensor:
    """Return the scale of every `size` consecutive weights of a selection.

    Args:
        owners: (n,) int64, the scale that each selected weight had.
        size: Weights per scale.
        name: What weights that share a scale are called.

    Returns:
        (n / size,) int64.

    Raises:
        ValueError: If weights that share a scale do not stay together, or none is selected.
    """
    if not len(owners):
        raise ValueError("A grid of no weights does not exist: select at least one row and column.")
    rest = len(owners) % size
    groups = owners[: len(owners) - rest].view(-1, size)
    mixed = (groups != groups[:, :1]).any(1)
    if rest or mixed.any():
        broken = int(groups[mixed][0, 0] if mixed.any() else owners[-1])
        raise ValueError(
            f"The selection breaks {name} {broken}: the {size} weights of a {name} share a scale "
            f"and must be taken together."
        )
    return groups[:, 0]


def check_alike(grids: Sequence[Grid], *attributes: str) -> None:
    """Check that grids are of one class and agree, so that they can be stacked.

    Args:
        grids: The grids.
        attributes: Names of the attributes that must be equal.

    Raises:
        ValueError: If they are not, or there is no grid.
    """
    if not grids:
        raise ValueError("Stacking takes at least one grid, got none.")
    first = grids[0]
    for grid in grids[1:]:
        if type(grid) is not type(first):
            raise ValueError(
                f"A {type(first).__name__} and a {type(grid).__name__} cannot be stacked."
            )
        for name in attributes:
            values = getattr(first, name), getattr(grid, name)
            if values[0] != values[1]:
                raise ValueError(
                    f"Grids can be stacked if they have the same {name}, got {values[0]} and "
                    f"{values[1]}."
                )
