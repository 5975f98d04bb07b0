"""The Gram matrix of a layer's input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optimum_order.layers.statistics.base import Accumulator
from optimum_order.layers.statistics.squared_norms import SquaredNorms

_BLOCK = 512
"""Columns of a block of `X^T X`: blocks below the diagonal are copied, not multiplied."""


class Gram(Accumulator):
    """`H = X^T X` over all tokens: (in, in) float32."""

    implies: ClassVar = {SquaredNorms: lambda gram: gram.diagonal().contiguous()}
    merges: ClassVar = {"sums": "sum"}

    def __init__(self, inputs: int, device: torch.device):
        super().__init__(inputs, device)
        self.sums = torch.zeros(inputs, inputs, device=device)
        """Complete on and above the diagonal blocks only."""

    def update(self, rows: Tensor) -> None:
        rows = rows.float()
        for first in range(0, self.inputs, _BLOCK):
            block = slice(first, first + _BLOCK)
            self.sums[block, first:].addmm_(rows[:, block].T, rows[:, first:])

    @torch.inference_mode()
    def result(self) -> Tensor:
        for last in range(_BLOCK, self.inputs, _BLOCK):
            self.sums[last:, last - _BLOCK : last] = self.sums[last - _BLOCK : last, last:].T
        return self.sums

    @classmethod
    def isotropic(cls, result: Tensor) -> Tensor:
        return torch.eye(len(result), device=result.device)
