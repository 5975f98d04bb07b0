"""The grids of llama.cpp's K-quants: steps that are small integers times a scale of 256 weights.

Every 256 consecutive inputs of an output are a superblock. Its float16 scale d, times an integer f
of each block of 16 or 32 weights in it, is the step of that block. Symmetric types have the values
d f q. Affine types have d f q - e m, with a second float16 number e of the superblock and a second
integer m of each block.

Zero is on a symmetric grid. It is on an affine one only where some d f q is exactly e m, so the
grid is fitted in one of two ways. Where weights are pruned, e is a small multiple k of d, of few
enough digits that float16 holds both, and f is chosen so that k divides f q for the code q of zero.
Elsewhere e and m are free, which rounds with less error, and zero may lie between two values.

`superblock_search` chooses the scales. Source of the layout: the project ggml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Rounder, Selection, check_alike, whole_groups
from optimum_order.layers.grids.rounding import AffineRounder
from optimum_order.layers.grids.superblock_search import (
    SUPERBLOCK,
    TYPES,
    Search,
    SuperblockType,
    divisor,
)

_WEIGHTS_AT_A_TIME = 2**17
"""Few enough that the blocks being fitted stay in a processor's cache."""
_LEAST_COUNT = 1e-3
"""What the error of an input counts that no token used, where the mean input counts 1."""


@dataclass(frozen=True)
class SuperblockGrid(Grid):
    """Integers times d f, less e m where the type is affine; see the module.

    Values are computed in float32, where all products are exact, and rounded to the dtype once.

    Args:
        kind: A name in `TYPES`.
        scale: (out, superblocks) float16, finite: d. A fit makes it positive; what somebody else
            has made may be negative or zero.
        factor: (out, blocks) int8: f, of either sign where the type is symmetric.
        least: (out, superblocks) float16, finite: e; None where symmetric.
        least_factor: (out, blocks) int8: m; None where symmetric.
        zero: Whether zero is on the grid in every block.
        dtype: Of the dequantized weight.
    """

    kind: str
    scale: Tensor
    factor: Tensor
    least: Tensor | None
    least_factor: Tensor | None
    zero: bool
    dtype: torch.dtype
    codes_are_cheap = True

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        kind: str,
        *,
        importance: Tensor | None = None,
        zero: bool = True,
    ) -> SuperblockGrid:
        """Return the grid that rounds with the least squared error that a search finds.

        Args:
            weight: (out, in), with +0.0 where pruned.
            kind: A name in `TYPES`.
            importance: (in,) float32, not negative: what the squared error of each input counts;
                by default all count the same.
            zero: Whether zero has to be on the grid.
        """
        inputs = weight.shape[1]
        search_type = TYPES[kind]
        counts = torch.ones(inputs, device=weight.device)
        if importance is not None and importance.any():
            counts = importance.float() / importance.float().mean() + _LEAST_COUNT
        parts = []
        for part in torch.split(weight, max(1, _WEIGHTS_AT_A_TIME // inputs)):
            scales = Search(part, search_type, counts).scales(zero=zero)
            least, least_factor = scales.least, scales.least_factor
            parts.append(
                cls(
                    kind=kind,
                    scale=scales.scale.view(len(part), -1).half(),
                    factor=scales.factor.view(len(part), -1).to(torch.int8),
                    least=None if least is None else least.view(len(part), -1).half(),
                    least_factor=None
                    if least_factor is None
                    else least_factor.view(len(part), -1).to(torch.int8),
                    zero=zero or not search_type.affine,
                    dtype=weight.dtype,
                )
            )
        return cls.concat(parts)

    @property
    def type(self) -> SuperblockType:
        """The K-quant."""
        return TYPES[self.kind]

    @property
    def data_type(self) -> str:
        """The name of the type, as engines know it."""
        return self.kind

    @property
    def bits(self) -> int:  # type: ignore[override]  # follows from the type
        return self.type.bits

    @property
    def stored_bits(self) -> float:
        return self.type.stored_bits

    @property
    def has_zero(self) -> bool:  # type: ignore[override]  # depends on the fit
        return self.zero

    @property
    def unit(self) -> int:
        return self.type.block

    @property
    def inputs(self) -> int:
        """Number of columns of W."""
        return self.factor.shape[1] * self.type.block

    @cached_property
    def _block(self) -> Tensor:
        """The block of each input, (in,) int64."""
        return torch.arange(self.inputs, device=self.factor.device) // self.type.block

    @cached_property
    def step(self) -> Tensor:
        """The step of each block, (out, blocks) float32, exact."""
        return self.scale.float().repeat_interleave(self.type.blocks, dim=1) * self.factor

    @cached_property
    def lowest(self) -> Tensor | None:
        """What is subtracted in each block, (out, blocks) float32, exact; None where symmetric."""
        if self.least is None or self.least_factor is None:
            return None
        return self.least.float().repeat_interleave(self.type.blocks, dim=1) * self.least_factor

    def with_zero_looked_for(self) -> Self:
        """Return the grid with `zero` as its values say."""
        lowest = self.lowest
        if lowest is None:
            return dataclasses.replace(self, zero=True)
        code = (lowest / divisor(self.step)).round().clamp(*self.type.codes)
        return dataclasses.replace(self, zero=torch.equal(code * self.step, lowest))

    def _beside(self, values: Tensor, columns: Selection) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return values (out, k) in a shape to which step and least broadcast, and those."""
        lowest = self.lowest
        if isinstance(columns, slice) and columns == ALL:
            grouped = values.view(len(values), self.factor.shape[1], -1)
            return grouped, self.step[..., None], 0.0 if lowest is None else lowest[..., None]
        block = self._block[columns]
        return values, self.step[:, block], 0.0 if lowest is None else lowest[:, block]

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        values, step, lowest = self._beside(weight.float(), columns)
        codes = (values + lowest).div_(divisor(step)).round_().clamp_(*self.type.codes)
        return codes.short().reshape(weight.shape)

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        steps, step, lowest = self._beside(codes, columns)
        values = (steps * step).sub_(lowest).to(self.dtype)
        return values.add_(0.0).reshape(codes.shape)  # a negative step makes -0.0

    def rounder(self, columns: Tensor) -> Rounder:
        # the same arithmetic with each column contiguous and without codes
        block = self._block[columns]
        step = self.step.T[block].contiguous()  # (k, out)
        return AffineRounder(
            step,
            *self.type.codes,
            self.dtype,
            divisor=divisor(step),
            offset=None if self.lowest is None else self.lowest.T[block].contiguous(),
        )

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        blocks = whole_groups(self._block[columns], self.type.block, "block")
        superblocks = whole_groups(blocks // self.type.blocks, self.type.blocks, "superblock")

        def part(tensor: Tensor | None, places: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[rows][:, places]

        return dataclasses.replace(
            self,
            scale=self.scale[rows][:, superblocks],
            factor=self.factor[rows][:, blocks],
            least=part(self.least, superblocks),
            least_factor=part(self.least_factor, blocks),
        )

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "kind", "inputs", "dtype")
        leasts = [grid.least for grid in grids if grid.least is not None]
        factors = [grid.least_factor for grid in grids if grid.least_factor is not None]
        return dataclasses.replace(
            grids[0],
            scale=torch.cat([grid.scale for grid in grids]),
            factor=torch.cat([grid.factor for grid in grids]),
            least=torch.cat(leasts) if leasts else None,
            least_factor=torch.cat(factors) if factors else None,
            zero=all(grid.zero for grid in grids),
        )

    def like(self, rows: int, inputs: int) -> Self:
        if inputs % SUPERBLOCK:
            raise ValueError(f"Superblocks of {SUPERBLOCK} do not divide {inputs} inputs.")

        def empty(tensor: Tensor | None, count: int) -> Tensor | None:
            return None if tensor is None else tensor.new_empty(rows, count, device="meta")

        superblocks = inputs // SUPERBLOCK
        blocks = inputs // self.type.block
        return dataclasses.replace(
            self,
            scale=self.scale.new_empty(rows, superblocks, device="meta"),
            factor=self.factor.new_empty(rows, blocks, device="meta"),
            least=empty(self.least, superblocks),
            least_factor=empty(self.least_factor, blocks),
        )
