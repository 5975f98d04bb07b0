"""How far the inputs of a layer have moved since the stage began."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optimum_order.layers.statistics.base import Accumulator


class Drift(Accumulator):
    """`D = (X_before - X)^T X` over all tokens: (in, in) float32.

    `X_before` are the inputs in the model as it was before the stage. `(H + D)^T H^-1` maps `W` to
    the weight whose outputs from `X` are nearest to those that `W` had from `X_before`.

    Source: Li et al. 2025, arXiv 2504.02692 (GPTAQ); Zhang et al. 2025, arXiv 2505.11695 (Qronos).
    """

    compares: ClassVar = True
    merges: ClassVar = {"sums": "sum"}

    def __init__(self, inputs: int, device: torch.device):
        super().__init__(inputs, device)
        self.sums = torch.zeros(inputs, inputs, device=device)

    def update(self, rows: Tensor) -> None:
        """Add tokens that are what they were before: they change nothing."""

    def compare(self, rows: Tensor, before: Tensor) -> None:
        rows = rows.float()
        self.sums.addmm_((before.float() - rows).T, rows)

    def result(self) -> Tensor:
        return self.sums

    @classmethod
    def isotropic(cls, result: Tensor) -> Tensor:
        return torch.zeros_like(result)
