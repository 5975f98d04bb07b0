"""The rate of a layer: the bits that an entropy coder spends on its codes, as the step changes.

A coder knows how large the codes of each row and of each column are, and keeps one table of
probabilities for each size. So the rate is the entropy of the codes given the size class, from a
sample of the weights.

Source: Gersho & Gray 1992, Vector Quantization and Signal Compression, chapter 9 (entropy-coded
scalar quantization); Sullivan 1996 (dead zones).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_order.layers.grids.rounding import rounded

SAMPLE = 2**15
"""Weights of a layer that its rate is estimated from."""
_CLASSES_PER_OCTAVE = 2
_SIDE_BITS = 20
"""Bits of a row or column beside its codes: its scale or exponent, and its class."""


@dataclass(frozen=True)
class Sketch:
    """A sample of the weights of a layer, in units of the steps of their rows and columns.

    Args:
        values: (n,) float32, each weight over the step of its row and of its column; NaN where it
            was pruned.
        size: (n,) float32, log2 of the root mean square of such weights, as the row and the column
            of each have it.
        row: (n,) int32, the row of each.
        column: (n,) int32, the column of each.
        shape: (out, in) of the layer.
    """

    values: Tensor
    size: Tensor
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, log_columns: Tensor, pruned: Tensor | None = None) -> Sketch:
        """Draw a sample; the steps of all rows are 1.

        Args:
            weight: (out, in).
            pruned: (out, in) bool, or None.
            log_columns: (in,) log2 of the step of each column.
        """
        rows, inputs = weight.shape
        scaled = weight.float() * torch.exp2(-log_columns.float())
        squares = scaled.square()
        of_rows = squares.mean(1)
        of_rows = of_rows.clamp(min=float(of_rows.mean()) * 1e-6 + 1e-30)
        of_columns = (squares / of_rows[:, None]).mean(0).clamp(min=1e-6)
        size = of_rows.log2()[:, None] / 2 + of_columns.log2() / 2
        drawn = torch.arange(weight.numel())
        if weight.numel() > SAMPLE:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(weight.numel(), (SAMPLE,), generator=generator)
        drawn = drawn.to(weight.device)
        row = (drawn // inputs).int()
        column = (drawn % inputs).int()
        if pruned is not None:
            scaled = scaled.masked_fill(pruned, torch.nan)
        return cls(scaled.flatten()[drawn], size.flatten()[drawn], row, column, (rows, inputs))

    def with_steps(self, log_rows: Tensor, log_columns: Tensor) -> Sketch:
        """Return the sketch of the same layer with longer steps.

        Args:
            log_rows: (out,) log2 of the step of each row, over the step that the row has here.
            log_columns: (in,) log2 of the step of each column, likewise.
        """
        steps = log_rows[self.row.long()] + log_columns.float()[self.column.long()]
        values = self.values * torch.exp2(-steps)
        return dataclasses.replace(self, values=values, size=self.size - steps)

    @property
    def weights(self) -> int:
        """The number of weights of the layer."""
        return self.shape[0] * self.shape[1]

    @property
    def side(self) -> float:
        """Bits for each weight that do not depend on the step."""
        return _SIDE_BITS * sum(self.shape) / self.weights

    def codes(self, log_step: float, dead_zone: float) -> Tensor:
        """Return the codes of the sample with a step, (n,) float32; NaN where it was pruned.

        Args:
            log_step: log2 of the step.
            dead_zone: See `rounded`.
        """
        return rounded(self.values * 2.0**-log_step, dead_zone)

    def rate(self, log_step: float, dead_zone: float) -> float:
        """Return the bits for each weight with a step, everything counted.

        Args:
            log_step: log2 of the step.
            dead_zone: See `rounded`.
        """
        # a coder gives pruned weights a code of their own
        codes = self.codes(log_step, dead_zone).clamp(-127, 127).nan_to_num(nan=-128.0)
        classes = ((self.size - self.size.min()) * _CLASSES_PER_OCTAVE).round().long()
        keys = classes * 256 + codes.long() + 128
        counts = torch.bincount(keys, minlength=256 * (int(classes.max()) + 1))
        return entropy(counts.view(-1, 256)) / len(codes) + self.side


def entropy(counts: Tensor) -> float:
    """Return the bits of an ideal coder with one table for each row of counts.

    Args:
        counts: (tables, symbols) integers.
    """
    counts = counts.double()
    totals = counts.sum(1, keepdim=True)
    bits: Tensor = counts * (totals.clamp(min=1).log2() - counts.clamp(min=1).log2())
    return float(bits.sum())


def bisected(falling: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Return where a falling function has a value; an end where it has none.

    Args:
        falling: The function.
        value: Its value.
        low: Where the function is larger.
        high: Where the function is smaller.
    """
    for _ in range(24):
        middle = (low + high) / 2
        if falling(middle) > value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Curve:
    """The rate of a layer for every step, interpolated between steps a quarter of an octave apart.

    Args:
        sketch: Of the layer.
        dead_zone: See `rounded`.
    """

    def __init__(self, sketch: Sketch, dead_zone: float):
        self.sketch = sketch
        self.dead_zone = dead_zone
        self._middle = float(sketch.size.median())
        self._rates: dict[int, float] = {}
        """Rates that were asked for, by the number of quarters from the middle."""

    def _rate(self, quarter: int) -> float:
        if quarter not in self._rates:
            step = self._middle + quarter / 4
            self._rates[quarter] = self.sketch.rate(step, self.dead_zone)
        return self._rates[quarter]

    def rate(self, log_step: float) -> float:
        """Return the bits for each weight with a step.

        Args:
            log_step: log2 of the step.
        """
        at = (log_step - self._middle) * 4
        quarter = math.floor(at)
        below = self._rate(quarter)
        return below + (at - quarter) * (self._rate(quarter + 1) - below)

    def log_step(self, rate: float) -> float:
        """Return log2 of the step with which the layer has a rate.

        Args:
            rate: In bits for each weight.
        """
        return bisected(self.rate, rate, self._middle - 9, self._middle + 6)
