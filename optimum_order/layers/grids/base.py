"""What a grid is: the values each weight of one layer may take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rounder = Callable[[int, Tensor, Tensor], Any]
"""Puts the grid values nearest to a column into a tensor, see `Grid.rounder`."""


class Grid(ABC):
    """The values each weight of one layer may take. Zero is always one of them.

    Codes are what a format packs; `dequantize(quantize(W))` is the nearest point of the grid, in the dtype the
    artifact will be loaded in, so that what was measured is what loads.
    """

    bits: int
    """Width of one code."""
    dtype: torch.dtype
    """The dtype of the dequantised weight."""

    @abstractmethod
    def quantize(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The integer codes of the nearest grid values of `weight` (out, k), which holds these columns of W."""

    @abstractmethod
    def dequantize(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The values (out, k) of these codes, in `dtype`."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """How many weights share one scale: the granularity of the quantisation."""

    def nearest(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The grid value nearest to each of these columns of W, (out, k), in `dtype`."""
        return self.dequantize(self.quantize(weight, columns), columns)

    def rounder(self, columns: Tensor) -> Rounder:
        """`nearest` for a sweep, which asks for one column at a time.

        Args:
            columns: (k,) columns of W.

        Returns:
            A function of i, of current values (out,) of column `columns[i]`, and of where to put the nearest grid
            values, (out,) float32. A zero may come out as -0.0.
        """
        return lambda i, w, out: out.copy_(self.nearest(w[:, None], columns[i : i + 1])[:, 0])

    def holds(self, weight: Tensor) -> bool:
        """Whether every weight (out, in) lies on the grid, bit for bit."""
        return torch.equal(self.nearest(weight), weight.to(self.dtype))
