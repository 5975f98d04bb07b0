"""Zero and the signed powers of two below a largest one of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Selection, check_alike, whole_groups


@dataclasses.dataclass(frozen=True)
class PowersGrid(Grid):
    """The values 0 and ±2^(top - i) with i = 0 ... n - 1 and n = 2^(bits - 1) - 1.

    Code 0 is zero, code ±(i + 1) is ±2^(top - i).

    Args:
        bits: 2 to 4.
        top: (out,) int32, the exponent of the largest value of each row.
        inputs: Number of columns of W.
        dtype: Of the dequantized weight.
    """

    bits: int
    top: Tensor
    inputs: int
    dtype: torch.dtype

    @classmethod
    def fit(cls, weight: Tensor, bits: int) -> Self:
        """Return the grid whose largest value in a row is the power nearest to its largest weight.

        Args:
            weight: (out, in).
            bits: Width of a code.
        """
        info = torch.finfo(weight.dtype)
        most = int(torch.frexp(torch.tensor(info.max, dtype=torch.float64)).exponent) - 1
        least = int(torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent) - 1
        top = _nearest_exponent(weight.float().abs().amax(1))
        # every value is a normal number of the dtype
        top = top.clamp(least + 2 ** (bits - 1), most)
        return cls(bits, top, weight.shape[1], weight.dtype)

    @property
    def unit(self) -> int:
        return self.inputs

    @property
    def _count(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        size = weight.float().abs()
        top = self.top[:, None]  # (out, 1)
        steps = (top - _nearest_exponent(size)).clamp(0, self._count - 1)
        codes = (steps + 1) * weight.float().sign()
        return codes.masked_fill(size < _power(top - self._count), 0).short()

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        size = _power(self.top[:, None] + 1 - codes.abs())
        return torch.where(codes == 0, 0.0, size * codes.sign()).to(self.dtype)

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        owners = torch.zeros(self.inputs, dtype=torch.int64)[columns]
        whole_groups(owners, len(owners))
        return dataclasses.replace(self, top=self.top[rows], inputs=len(owners))

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "bits", "inputs", "dtype")
        return dataclasses.replace(grids[0], top=torch.cat([grid.top for grid in grids]))

    def like(self, rows: int, inputs: int) -> Self:
        top = self.top.new_empty(rows, device="meta")
        return dataclasses.replace(self, top=top, inputs=inputs)


def _power(exponent: Tensor) -> Tensor:
    """Return 2^exponent, exact in float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _nearest_exponent(size: Tensor) -> Tensor:
    """Return the e for which 2^e is nearest: size lies between 0.75 * 2^e and 1.5 * 2^e."""
    mantissa, exponent = torch.frexp(size)  # size = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent - (mantissa < 0.75).int()
