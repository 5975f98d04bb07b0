"""float8 numbers (e4m3) times a scale of each output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Selection, check_alike
from optimum_order.layers.inputs import FLOAT8, FLOAT8_MOST

_SIGN = 0x80
"""The bit of a byte that says that a number is negative."""


@dataclass(frozen=True)
class Float8Grid(Grid):
    """A float8 number (4 bits of exponent, 3 of mantissa, no infinity) times the scale of its row.

    A code is the place of the number among all of them, -126 to 126 with 0 for zero: the byte of
    its size, with the sign of the number.

    Args:
        scale: (out, 1), finite and positive, in the dtype that the artifact stores.
        inputs: Number of columns of W.
    """

    scale: Tensor
    inputs: int
    bits = 8
    group_size = -1
    data_type = "fp8"
    codes_are_cheap = True

    @classmethod
    def fit(cls, weight: Tensor) -> Self:
        """Return the grid whose largest value in each row is the row's largest weight.

        Args:
            weight: (out, in) in the storage dtype, with +0.0 where pruned.
        """
        largest = weight.float().abs().amax(1, keepdim=True)
        info = torch.finfo(weight.dtype)
        # no scale vanishes, and no value of the grid overflows
        least = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
        scale = (largest / FLOAT8_MOST).clamp(least, info.max / 2**9).to(weight.dtype)
        # A wholly pruned row has no range; any finite positive scale keeps its zeros exact.
        scale = torch.where(largest == 0, torch.ones_like(scale), scale)
        return cls(scale, weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # that of the scales
        return self.scale.dtype

    @property
    def unit(self) -> int:
        return self.inputs

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        steps = weight.float() / self.scale.float()
        return self.codes(steps.clamp(-FLOAT8_MOST, FLOAT8_MOST).to(FLOAT8))

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        return self.numbers(codes).to(self.dtype) * self.scale

    @staticmethod
    def codes(numbers: Tensor) -> Tensor:
        """Return the codes of float8 numbers, int16; -0.0 gets that of zero."""
        bytes_ = numbers.view(torch.uint8).short()
        return torch.where(bytes_ < _SIGN, bytes_, _SIGN - bytes_)

    @staticmethod
    def numbers(codes: Tensor) -> Tensor:
        """Return the float8 numbers of codes."""
        return (codes.abs() + _SIGN * (codes < 0)).to(torch.uint8).view(FLOAT8)

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        inputs = len(self.scale.new_empty(self.inputs)[columns])
        if not inputs:
            raise ValueError("A grid needs a column or more, got none.")
        return dataclasses.replace(self, scale=self.scale[rows], inputs=inputs)

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "inputs", "dtype")
        return dataclasses.replace(grids[0], scale=torch.cat([grid.scale for grid in grids]))

    def like(self, rows: int, inputs: int) -> Self:
        scale = self.scale.new_empty(rows, 1, device="meta")
        return dataclasses.replace(self, scale=scale, inputs=inputs)
