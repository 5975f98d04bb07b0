"""Accumulators of what is known about the inputs of a layer: column norms and `X^T X`."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_order.calibration.precision import products
from optimum_order.layers.statistics import Statistics

_ROWS_AT_A_TIME = 256
"""Few enough that what is made of them stays in a processor's cache."""
_BLOCK = 512
"""`X^T X` is symmetric: blocks of so many columns below its diagonal are not multiplied but copied."""


class Accumulator:
    """Sums over the tokens of one input that one or more layers read.

    Args:
        inputs: Width of the input.
        gram: Whether to keep `X^T X` and not only its diagonal.
        device: Where the sums live.
        dtype: What the inputs may be rounded to before they are multiplied; sums are float32.
    """

    def __init__(
        self, inputs: int, *, gram: bool, device: torch.device, dtype: torch.dtype = torch.float32
    ):
        self.tokens = 0
        self.dtype = dtype
        self.sums = torch.zeros(
            (inputs, inputs) if gram else (inputs,), dtype=torch.float32, device=device
        )

    def add(self, x: Tensor) -> None:
        """Take in more tokens, (..., in)."""
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += len(rows)
        if self.sums.ndim == 2:
            rows = rows.float()
            with products(self.dtype):
                for first in range(0, len(self.sums), _BLOCK):
                    block = slice(first, first + _BLOCK)
                    self.sums[block, first:].addmm_(rows[:, block].T, rows[:, first:])
            return
        for part in rows.split(_ROWS_AT_A_TIME):
            part = part.float()
            self.sums += torch.linalg.vecdot(part, part, dim=0)

    @torch.inference_mode()  # in which the sums were taken; outside they could not be completed in place
    def result(self) -> Statistics:
        """What is known so far."""
        if self.sums.ndim == 2:
            for last in range(_BLOCK, len(self.sums), _BLOCK):
                self.sums[last:, last - _BLOCK : last] = self.sums[last - _BLOCK : last, last:].T
            return Statistics(self.tokens, self.sums.diagonal().contiguous(), self.sums)
        return Statistics(self.tokens, self.sums)
