"""Integers times a scale of their row and a power of two of their column."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Selection, check_alike, whole_groups
from optimum_order.layers.grids.rounding import AffineRounder
from optimum_order.layers.grids.uniform import UniformGrid

_LARGEST_EXPONENT = 126
"""Of either sign: 2 to that power and its inverse are normal numbers in float32."""


@dataclass(frozen=True)
class DualScaleGrid(Grid):
    """Integers times a scale of each output and a power of two of each input.

    W[i, j] is code[i, j] * scale[i] * 2^exponent[j] with codes -2^(b-1) ... 2^(b-1)-1. The first
    product is rounded to the dtype; the power of two then changes no digit, so
    W[i, j] * 2^-exponent[j] lies exactly on `folded()`, a uniform grid of whole rows.

    Args:
        bits: 2 to 8.
        scale: (out, 1), in the dtype that the artifact stores, within `scale_range`.
        exponent: (in,) int8, of the power of two of each column of W, -126 to 126.
    """

    bits: int
    scale: Tensor
    exponent: Tensor
    codes_are_cheap = True

    def check(self) -> None:
        """Check what a grid promises, which a constructor that gets tensors of no values cannot.

        Raises:
            ValueError: If the fields do not fit together, or a value would lose digits.
        """
        if not 2 <= self.bits <= 8:
            raise ValueError(f"A grid has 2 to 8 bits, got {self.bits}.")
        if self.scale.ndim != 2 or self.scale.shape[1] != 1 or not len(self.scale):
            raise ValueError(f"Scales must be (out, 1), got {tuple(self.scale.shape)}.")
        if self.exponent.ndim != 1 or self.exponent.dtype != torch.int8 or not len(self.exponent):
            raise ValueError(
                f"Exponents must be (in,) int8, got {tuple(self.exponent.shape)} "
                f"{self.exponent.dtype}."
            )
        least, most = self.scale_range(self.dtype, self.bits, self.exponent)
        low, high = (float(end) for end in self.scale.aminmax())
        if not (least <= low and high <= most):  # NaN is not
            raise ValueError(
                f"With these exponents, the scales of {self.bits} bits in {self.dtype} must lie in "
                f"{least:.4g} ... {most:.4g}, got {low:.4g} ... {high:.4g}."
            )

    @staticmethod
    def scale_range(dtype: torch.dtype, bits: int, exponent: Tensor) -> tuple[float, float]:
        """Return the least and the largest scale with which no value loses a digit.

        Between them every value but zero is a normal number of the dtype, with its power of two and
        without.

        Args:
            dtype: Of the scales.
            bits: Width of a code.
            exponent: (in,) int8.

        Raises:
            ValueError: If there is no such scale.
        """
        lowest, highest = (int(end) for end in exponent.aminmax())
        if lowest < -_LARGEST_EXPONENT or highest > _LARGEST_EXPONENT:
            raise ValueError(
                f"Exponents must be -{_LARGEST_EXPONENT} to {_LARGEST_EXPONENT}, got {lowest} ... "
                f"{highest}."
            )
        info = torch.finfo(dtype)
        least = info.tiny * 2.0 ** max(0, -lowest)
        most = info.max / 2.0 ** (bits - 1 + max(0, highest))
        if least > most:
            raise ValueError(
                f"No scale of {dtype} fits exponents of {lowest} ... {highest} and {bits} bits."
            )
        return least, most

    def folded(self) -> UniformGrid:
        """Return the grid of W[i, j] * 2^-exponent[j], on which the codes are the same."""
        return UniformGrid(self.bits, self.scale, None, len(self.exponent))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # that of the scales
        return self.scale.dtype

    @property
    def scales(self) -> Tensor | None:
        return self.scale

    def with_scales(self, scales: Tensor) -> Self:
        least, most = self.scale_range(self.dtype, self.bits, self.exponent)
        return dataclasses.replace(self, scale=scales.clamp(least, most).to(self.dtype))

    @property
    def unit(self) -> int:
        return len(self.exponent)

    @cached_property
    def _rows(self) -> UniformGrid:
        """The same as `folded()`, made once."""
        return self.folded()

    def _without_powers(self, weight: Tensor, columns: Selection) -> Tensor:
        """Return a weight (out, k) times 2^-exponent, in float32."""
        return weight.float() * _power(-self.exponent[columns])

    def _with_powers(self, values: Tensor, columns: Selection) -> Tensor:
        """Return values (..., out, k) of the folded grid times 2^exponent."""
        return (values.float() * _power(self.exponent[columns])).to(self.dtype)

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        return self._rows.quantize(self._without_powers(weight, columns), columns)

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        return self._with_powers(self._rows.dequantize(codes, columns), columns)

    def nearest(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        values = self._rows.nearest(self._without_powers(weight, columns), columns)
        return self._with_powers(values, columns)

    def rounder(self, columns: Tensor) -> AffineRounder:
        # All that is multiplied by a power of two here is a normal number and stays one, so the
        # step of a column may be computed first.
        steps = self.scale[:, 0].float() * _power(self.exponent[columns])[:, None]  # (k, out)
        low = -(2 ** (self.bits - 1))
        return AffineRounder(steps, low, -low - 1, self.dtype)

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        exponent = self.exponent[columns]
        whole_groups(torch.zeros_like(exponent, dtype=torch.int64), len(exponent), "row")
        return dataclasses.replace(self, scale=self.scale[rows], exponent=exponent)

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "bits", "unit", "dtype")
        first = grids[0]
        for grid in grids[1:]:
            if not torch.equal(grid.exponent, first.exponent):
                raise ValueError("Grids can be stacked if their columns have the same exponents.")
        return dataclasses.replace(first, scale=torch.cat([grid.scale for grid in grids]))

    def like(self, rows: int, inputs: int) -> Self:
        return dataclasses.replace(
            self,
            scale=self.scale.new_empty(rows, 1, device="meta"),
            exponent=self.exponent.new_empty(inputs, device="meta"),
        )


def _power(exponent: Tensor) -> Tensor:
    """Return 2^exponent, exactly, in float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int())
