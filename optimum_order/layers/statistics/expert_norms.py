"""How much each expert of a mixture adds to the tokens that are routed to it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optimum_order.layers.statistics.base import Accumulator


class ExpertNorms(Accumulator):
    """The mean norm of an expert's weighted output over its tokens: (experts,) float32.

    Its rows are (tokens, experts), 0 where a token is not routed to an expert. The mean of an
    expert that no token reached is 0.

    Source: Lasby et al. 2025 (REAP), arXiv 2510.13999, equation 9.
    """

    merges: ClassVar = {"sums": "sum", "counts": "sum"}

    def __init__(self, inputs: int, device: torch.device):
        super().__init__(inputs, device)
        self.sums = torch.zeros(inputs, device=device)
        self.counts = torch.zeros(inputs, device=device)

    def update(self, rows: Tensor) -> None:
        self.sums += rows.float().sum(0)
        self.counts += (rows > 0).sum(0)

    def result(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1)

    @classmethod
    def isotropic(cls, result: Tensor) -> Tensor:
        return torch.ones_like(result)
