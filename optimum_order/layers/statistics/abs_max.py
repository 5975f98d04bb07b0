"""The largest size of each column of a layer's input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optimum_order.layers.statistics.base import Accumulator


class AbsMax(Accumulator):
    """The largest `|x_j|` of all tokens for each input j: (in,) float32."""

    merges: ClassVar = {"largest": "max"}

    def __init__(self, inputs: int, device: torch.device):
        super().__init__(inputs, device)
        self.largest = torch.zeros(inputs, device=device)

    def update(self, rows: Tensor) -> None:
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0).float())

    def result(self) -> Tensor:
        return self.largest

    @classmethod
    def isotropic(cls, result: Tensor) -> Tensor:
        return torch.ones_like(result)
