"""Rounding to evenly spaced values, as data: a loop calls it, and a GPU kernel reads its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AffineRounder:
    """Rounds one column at a time, as `Grid.rounder` describes.

    A weight w becomes `codes * step - offset`, rounded to the dtype, with
    `codes = clamp(round((w + offset) / divisor), low - zero, high - zero)`.

    Args:
        step: (k, out) float32, the step of each weight in the k columns.
        low: The lowest code.
        high: The highest code.
        dtype: Of the grid.
        divisor: (k, out) float32, `step` where `step` is not zero; None for `step`.
        zero: (k, out) float32, the zero points; None for 0.
        offset: (k, out) float32; None for 0.
        dead_zone: See `rounded`; None rounds half to even.
    """

    step: Tensor
    low: int
    high: int
    dtype: torch.dtype
    divisor: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None
    dead_zone: float | None = None

    @cached_property
    def _columns(self) -> list[tuple[Any, ...]]:
        """The step, divisor, offset, lowest and highest code of each column; tensors are (out,)."""
        count = len(self.step)
        steps = self.step.unbind()
        divisors = steps if self.divisor is None else self.divisor.unbind()
        offsets: Sequence[Any] = [None] * count
        lows: Sequence[Any] = [self.low] * count
        highs: Sequence[Any] = [self.high] * count
        if self.offset is not None:
            offsets = self.offset.unbind()
        if self.zero is not None:
            lows = (self.low - self.zero).unbind()
            highs = (self.high - self.zero).unbind()
        return list(zip(steps, divisors, offsets, lows, highs, strict=True))

    def __call__(self, i: int, w: Tensor, out: Tensor) -> None:
        """Round the values of one column.

        Args:
            i: Which of the k columns.
            w: (out,) float32, the values.
            out: (out,) float32, receives the rounded values.
        """
        step, divisor, offset, low, high = self._columns[i]
        # in place: a sweep on the CPU is all overhead
        if offset is None:
            torch.div(w, divisor, out=out)
        else:
            torch.add(w, offset, out=out).div_(divisor)
        codes = out.round_() if self.dead_zone is None else rounded(out, self.dead_zone)
        torch.mul(codes.clamp_(low, high), step, out=out)
        if offset is not None:
            out.sub_(offset)
        if self.dtype != torch.float32:
            out.copy_(out.to(self.dtype))


def rounded(steps: Tensor, dead_zone: float) -> Tensor:
    """Round to integers, those nearest to zero to zero.

    Args:
        steps: Values in units of the step.
        dead_zone: The least size that does not become zero, 0.5 to 1. Every other threshold lies
            half as far beyond the middle between two integers as this one.
    """
    size = steps.abs()
    codes = (size + shift_of(dead_zone)).floor_().mul_(size >= dead_zone)
    return codes.copysign_(steps).add_(0.0)


def shift_of(dead_zone: float) -> float:
    """Return the number to add to a size before `floor` takes the size to its code.

    Args:
        dead_zone: See `rounded`.
    """
    return 0.5 - (dead_zone - 0.5) / 2
