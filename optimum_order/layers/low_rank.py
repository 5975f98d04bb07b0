"""A product of two thin matrices beside the weight of a layer: the layer computes W x + B (A x).

The arithmetic is that of PEFT's LoRA layers: in float32, whatever dtype A and B are stored in, then
rounded to the dtype of the layer's output. So a model computes in memory what PEFT computes with
the folder.

Source: https://github.com/huggingface/peft, `tuners/lora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

DTYPES = (torch.float16, torch.bfloat16)
"""What A and B are stored in."""


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer.

    Args:
        a: (rank, in), float16 or bfloat16.
        b: (out, rank), in the dtype of `a`.
    """

    a: Tensor
    b: Tensor

    @classmethod
    def rounded(cls, a: Tensor, b: Tensor, dtype: torch.dtype) -> Self:
        """Return matrices as they are stored.

        Args:
            a: (rank, in).
            b: (out, rank).
            dtype: Of the layer: two bytes stay, all else becomes float16.
        """
        stored = dtype if dtype in DTYPES else torch.float16
        return cls(a.to(stored).contiguous(), b.to(stored).contiguous())

    @classmethod
    def balanced(cls, a: Tensor, b: Tensor, dtype: torch.dtype) -> Self:
        """Return a product as it is stored, row i of A as large as column i of B.

        Then neither is too small or too large for 16 bits.

        Args:
            a: (rank, in).
            b: (out, rank).
            dtype: As in `rounded`.
        """
        sizes = (b.norm(dim=0), a.norm(dim=1))
        factor = (sizes[0] / sizes[1]).sqrt()  # (rank,)
        factor = torch.where((sizes[0] > 0) & (sizes[1] > 0), factor, 1.0)
        return cls.rounded(a * factor[:, None], b / factor, dtype)

    @property
    def rank(self) -> int:
        """Columns of B."""
        return len(self.a)

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes

    def product(self) -> Tensor:
        """Return B A, (out, in) float32."""
        return self.b.float() @ self.a.float()

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output of the layer.

        Args:
            x: (..., in), the input.
            y: (..., out), what the weight makes of the input.
        """
        a, b = (part.to(x.device, torch.float32) for part in (self.a, self.b))
        return (y + functional.linear(functional.linear(x.float(), a), b)).to(y.dtype)

    def like(self, rows: int, inputs: int) -> LowRank:
        """Return an adapter of the same rank for a layer of another shape, without values.

        Args:
            rows: Outputs of the layer.
            inputs: Inputs of the layer.
        """
        a = torch.empty(self.rank, inputs, dtype=self.a.dtype, device="meta")
        b = torch.empty(rows, self.rank, dtype=self.b.dtype, device="meta")
        return LowRank(a, b)
