"""Gather the statistics that some methods need, over the tokens of one input."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from optimum_order.calibration.ranks import Ranks
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.models.precision import products


class Accumulation:
    """Sums over the tokens of one input that one or more layers read.

    Args:
        inputs: Width of the input.
        needs: The statistics to gather. Those that another one implies are not gathered twice.
        device: Where the sums are resident.
        dtype: What products may round the inputs to; sums are float32.
    """

    def __init__(
        self,
        inputs: int,
        needs: Collection[type[Accumulator]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.tokens = 0
        self.dtype = dtype
        implied = {statistic for need in needs for statistic in need.implies}
        self._accumulators = [need(inputs, device) for need in needs if need not in implied]

    def add(self, x: Tensor, before: Tensor | None = None) -> None:
        """Add more tokens.

        Args:
            x: (..., in).
            before: (..., in), what the same inputs were before the stage, where that is known.
        """
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += len(rows)
        with products(self.dtype, x.device):
            for accumulator in self._accumulators:
                if not accumulator.compares:
                    accumulator.update(rows)
                elif before is not None:
                    accumulator.compare(rows, before.reshape(rows.shape))

    def merge(self, other: Accumulation) -> None:
        """Add the tokens that another process, or another part of the data, has gathered."""
        self.tokens += other.tokens
        for mine, theirs in zip(self._accumulators, other._accumulators, strict=True):
            mine.merge(theirs)

    def share(self, ranks: Ranks) -> None:
        """Add the tokens that all other ranks have gathered; all then hold the same sums."""
        self.tokens = ranks.total(self.tokens)
        for sums in self._accumulators:
            ranks.merge(sums)

    def result(self) -> Statistics:
        """Return the statistics of all tokens so far."""
        return Statistics(self.tokens, {type(sums): sums.result() for sums in self._accumulators})
