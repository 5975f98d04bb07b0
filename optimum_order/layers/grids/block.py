"""The grids of blocks that somebody else has made, as llama.cpp's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

Each block of 32 inputs of an output has a float16 scale d, and in affine types a float16 least m.
The values are d q + m. Unlike on the grids that this package fits, d may be negative or zero, and m
is any number: zero is on an affine grid only where some d q is exactly -m. Nothing is fitted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Selection, check_alike, whole_groups
from optimum_order.layers.grids.superblock_search import divisor

BLOCK = 32
"""Inputs that share a scale."""


@dataclass(frozen=True)
class ForeignBlockGrid(Grid):
    """Codes times a scale, plus a least where the type is affine; see the module.

    Values are computed in float32, as llama.cpp does, and rounded to the dtype once.

    Args:
        bits: Width of a code; signed where there is no least.
        scale: (out, blocks) float16, finite, of either sign.
        least: (out, blocks) float16, finite; None where the type is symmetric.
        dtype: Of the dequantized weight.
    """

    bits: int
    scale: Tensor
    least: Tensor | None
    dtype: torch.dtype
    group_size = BLOCK
    codes_are_cheap = True

    @property
    def symmetric(self) -> bool:
        """Whether there is no least."""
        return self.least is None

    @property
    def unit(self) -> int:
        return BLOCK

    @property
    def inputs(self) -> int:
        """Number of columns of W."""
        return self.scale.shape[1] * BLOCK

    @property
    def _codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low, low + 2**self.bits - 1

    @cached_property
    def has_zero(self) -> bool:  # type: ignore[override]  # depends on the values
        if self.least is None:
            return True
        if self.least.is_meta:
            return False
        zeros = self.quantize(self.scale.new_zeros(len(self.scale), self.inputs))
        return not self.dequantize(zeros).any()

    def _affine(self, columns: Selection) -> tuple[Tensor, Tensor | float]:
        """Return scale and least of each weight in some columns, (out, k) float32."""
        block = (torch.arange(self.inputs, device=self.scale.device) // BLOCK)[columns]
        least = 0.0 if self.least is None else self.least[:, block].float()
        return self.scale[:, block].float(), least

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        scale, least = self._affine(columns)
        steps = (weight.float() - least).div_(divisor(scale)).round_()
        return steps.clamp_(*self._codes).short()

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        scale, least = self._affine(columns)
        values = (codes * scale).add_(least).to(self.dtype)
        return values.add_(0.0)  # a negative scale makes -0.0

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        owners = torch.arange(self.inputs, device=self.scale.device) // BLOCK
        blocks = whole_groups(owners[columns], BLOCK, "block")
        least = None if self.least is None else self.least[rows][:, blocks]
        return dataclasses.replace(self, scale=self.scale[rows][:, blocks], least=least)

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "bits", "inputs", "dtype", "symmetric")
        leasts = [grid.least for grid in grids if grid.least is not None]
        return dataclasses.replace(
            grids[0],
            scale=torch.cat([grid.scale for grid in grids]),
            least=torch.cat(leasts) if leasts else None,
        )

    def like(self, rows: int, inputs: int) -> Self:
        if inputs % BLOCK:
            raise ValueError(f"Blocks of {BLOCK} do not divide {inputs} inputs.")
        scale = self.scale.new_empty(rows, inputs // BLOCK, device="meta")
        least = None if self.least is None else torch.empty_like(scale)
        return dataclasses.replace(self, scale=scale, least=least)
