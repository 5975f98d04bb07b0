"""Squared norms of the columns of a layer's input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optimum_order.layers.statistics.base import Accumulator

_ROWS_AT_A_TIME = 256
"""Few enough that the products stay in a processor's cache."""


class SquaredNorms(Accumulator):
    """The sum over tokens of `x_j ** 2` for each input j: (in,) float32."""

    merges: ClassVar = {"sums": "sum"}

    def __init__(self, inputs: int, device: torch.device):
        super().__init__(inputs, device)
        self.sums = torch.zeros(inputs, device=device)

    def update(self, rows: Tensor) -> None:
        for part in torch.split(rows, _ROWS_AT_A_TIME):
            part = part.float()
            self.sums += torch.linalg.vecdot(part, part, dim=0)

    def result(self) -> Tensor:
        return self.sums

    @classmethod
    def isotropic(cls, result: Tensor) -> Tensor:
        return torch.ones_like(result)
