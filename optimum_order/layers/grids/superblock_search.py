"""The search for the scales of a superblock grid, see `superblock`.

Scales are searched twice: first of each block alone, as if they were stored in full; then, once the
scale of the superblock is chosen, among the integers around them, by their error rather than by
rounding. In the end the scales of the superblock are fitted to the codes once more.

Source: a search of our own, after the idea of ggml's quantizers of K-quants: least squares, with a
weight for each input, over a few ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SUPERBLOCK = 256
"""Weights that share the scales of scales."""
_DIGITS = 11
"""Binary digits of a float16 number."""
_LEAST = 2.0**-24
_MOST = 2.0**10
"""Of a float16 scale that is a multiple of another."""
_TINY = 1e-30
"""Keeps quotients finite whose numerators are zero."""
_RANGES = tuple(0.6 + 0.05 * step for step in range(11))
"""Parts of a block's range that are tried."""
_ZERO_RANGES = (1.0, 0.93, 0.87, 0.8, 0.72)
"""The same for each code of zero that is tried."""
_ZERO_CODES = 3
"""Codes of zero that are tried on either side of the natural one."""


@dataclass(frozen=True)
class SuperblockType:
    """One of the K-quants.

    Args:
        name: Such as "q4_k".
        bits: Width of a code.
        block: Weights that share an integer scale.
        most: The largest integer scale.
        affine: Whether blocks have a least value beside the step.
        factor_bits: Bits of the integers of a block: of its scale, and of its least value.
        multiples: Where zero is on an affine grid: the multiples of d that e may be.
    """

    name: str
    bits: int
    block: int
    most: int
    affine: bool
    factor_bits: int
    multiples: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks of a superblock."""
        return SUPERBLOCK // self.block

    @property
    def stored_bits(self) -> float:
        """Bits of a weight, with its part of the scales of its block and superblock."""
        return self.bits + self.factor_bits / self.block + (32 if self.affine else 16) / SUPERBLOCK

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low = 0 if self.affine else -(2 ** (self.bits - 1))
        return low, low + 2**self.bits - 1


TYPES = {
    kind.name: kind
    for kind in (
        SuperblockType("q2_k", 2, 16, 15, True, 8, (1, 2, 3)),
        SuperblockType("q3_k", 3, 16, 31, False, 6),
        SuperblockType("q4_k", 4, 32, 63, True, 12, (8, 12)),
        SuperblockType("q5_k", 5, 32, 63, True, 12, (16, 24)),
        SuperblockType("q6_k", 6, 16, 127, False, 8),
    )
}
"""By name."""


@dataclass(frozen=True)
class Scales:
    """What a search chose, all in float32 and superblock by superblock.

    Args:
        scale: (superblocks,), d.
        factor: (blocks,), f.
        least: (superblocks,), e; None where symmetric.
        least_factor: (blocks,), m; None where symmetric.
    """

    scale: Tensor
    factor: Tensor
    least: Tensor | None = None
    least_factor: Tensor | None = None


def divisor(step: Tensor) -> Tensor:
    """Return steps to divide by, so that a block whose step is zero has the code zero."""
    return step.masked_fill(step == 0, math.inf)


class _Best:
    """The values with the least error, place by place."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.values: list[Tensor] = []

    def take(self, error: Tensor, *values: Tensor) -> None:
        """Take values where their error is less than that of all before.

        Args:
            error: (n,).
            *values: Each (n,).
        """
        if self.error is None:
            self.error = error
            self.values = list(values)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.values = [
            torch.where(better, new, old) for new, old in zip(values, self.values, strict=True)
        ]


class Search:
    """The search for the scales of some rows.

    Tensors are (block, n): a block meets its neighbors in the same lane of a vector.

    Args:
        weight: (out, in).
        kind: The K-quant.
        counts: (in,) float32, positive: what each squared error counts.
    """

    def __init__(self, weight: Tensor, kind: SuperblockType, counts: Tensor):
        self._kind = kind
        # float16 holds it, its multiples, and all values that it makes
        most = torch.finfo(weight.dtype).max / (kind.most * 2**kind.bits)
        self._limit = 2.0 ** math.floor(math.log2(min(_MOST, most)))
        self._w = weight.float().view(-1, kind.block).T.contiguous()
        self._h = counts.expand_as(weight).reshape(-1, kind.block).T.contiguous()
        self._low = self._w.amin(0).clamp(max=0)
        self._high = self._w.amax(0).clamp(min=0)

    def scales(self, *, zero: bool) -> Scales:
        """Return the scales.

        Args:
            zero: Whether zero has to be on the grid of an affine type.
        """
        if not self._kind.affine:
            return self._symmetric()
        return self._with_zero() if zero else self._free()

    def _short(self, scale: Tensor, digits: int = _DIGITS) -> Tensor:
        """Return the positive float16 numbers nearest to scales, in float32.

        Args:
            scale: (n,) float32.
            digits: Most binary digits of a number.
        """
        mantissa, exponent = torch.frexp(scale.clamp(_LEAST, self._limit))
        numbers = torch.ldexp((mantissa * 2**digits).round(), exponent - digits)
        # float16 has steps of its least number below 2^-14
        return (numbers / _LEAST).round() * _LEAST

    def _codes(self, step: Tensor, lowest: Tensor | float = 0.0) -> Tensor:
        """Return the nearest codes, (block, n) float32."""
        return (self._w + lowest).div_(divisor(step)).round_().clamp_(*self._kind.codes)

    def _error(self, codes: Tensor, step: Tensor, lowest: Tensor | float = 0.0) -> Tensor:
        """Return the weighted squared error of each block, (n,)."""
        return (codes * step).sub_(lowest).sub_(self._w).square_().mul_(self._h).sum(0)

    def _sum(self, blocks: Tensor) -> Tensor:
        """Return the sums over the blocks of each superblock."""
        return blocks.view(-1, self._kind.blocks).sum(1)

    def _largest(self, blocks: Tensor) -> Tensor:
        """Return the largest number among the blocks of each superblock."""
        return blocks.view(-1, self._kind.blocks).amax(1)

    def _spread(self, superblocks: Tensor) -> Tensor:
        """Return for each block what its superblock has."""
        return superblocks.repeat_interleave(self._kind.blocks)

    # Symmetric types

    def _symmetric(self) -> Scales:
        step = self._symmetric_step()
        most = self._kind.most
        d = self._short(self._largest(step.abs()) / most)
        middle = (step / self._spread(d)).round()
        best = _Best()
        for shift in (-1, 0, 1):
            f = (middle + shift).clamp(-most, most)
            f = torch.where(f == 0, 1.0, f)
            best.take(self._error(self._codes(self._spread(d) * f), self._spread(d) * f), f)
        f = best.values[0]
        values = self._codes(self._spread(d) * f) * f
        above = self._sum((self._h * self._w * values).sum(0))
        fitted = _quotient(above, self._sum((self._h * values * values).sum(0)))
        fitted = torch.where(fitted > 0, self._short(fitted), d)

        final = _Best()
        for scale in (d, fitted):
            step = self._spread(scale) * f
            final.take(self._sum(self._error(self._codes(step), step)), scale)
        return Scales(final.values[0], f)

    def _symmetric_step(self) -> Tensor:
        """Return the step of each block with the least error, (n,) of either sign."""
        peak = self._w.gather(0, self._w.abs().argmax(0, keepdim=True))[0]
        peak = torch.where(peak == 0, _TINY, peak)
        best = _Best()
        for part in _RANGES:
            for sign in (-1.0, 1.0):  # the largest weight at either end
                step = peak * (sign * part / 2 ** (self._kind.bits - 1))
                codes = self._codes(step)
                fitted = _quotient(
                    (self._h * self._w * codes).sum(0), (self._h * codes * codes).sum(0)
                )
                best.take(self._error(codes, fitted), fitted)
        return best.values[0]

    # Affine types, zero anywhere

    def _free(self) -> Scales:
        step, lowest = self._free_block()
        most = self._kind.most
        d = self._short(self._largest(step) / most)
        e = self._short(self._largest(lowest) / most)
        middle = (step / self._spread(d)).round()
        best = _Best()
        for shift in (-1, 0, 1):
            f = (middle + shift).clamp(1, most)
            spread = self._spread(d) * f
            # the least value that suits this step and the codes that go with it
            codes = self._codes(spread, lowest)
            suited = (self._h * (codes * spread - self._w)).sum(0) / self._h.sum(0)
            down = (suited / self._spread(e)).floor()
            for m in (down, down + 1):
                m = m.clamp(0, most)
                shifted = self._spread(e) * m
                best.take(self._error(self._codes(spread, shifted), spread, shifted), f, m)
        f, m = best.values
        fitted = self._fitted(d, f, e, m)

        final = _Best()
        for scale, least in ((d, e), fitted):
            spread = self._spread(scale) * f
            shifted = self._spread(least) * m
            error = self._error(self._codes(spread, shifted), spread, shifted)
            final.take(self._sum(error), scale, least)
        return Scales(final.values[0], f, final.values[1], m)

    def _free_block(self) -> tuple[Tensor, Tensor]:
        """Return step and least value of each block with the least error, both (n,)."""
        most = self._kind.codes[1]
        total = self._h.sum(0)
        mean = (self._h * self._w).sum(0) / total
        best = _Best()
        for part in _RANGES:
            for middle in (0.0, 0.5, 1.0):  # where the range that is left out lies
                width = (self._high - self._low) * part
                bottom = self._low + (self._high - self._low) * (1 - part) * middle
                codes = self._codes((width / most).clamp(min=_TINY), -bottom)
                center = (self._h * codes).sum(0) / total
                apart = codes - center
                step = _quotient(
                    (self._h * self._w * apart).sum(0), (self._h * apart * apart).sum(0)
                )
                lowest = step * center - mean
                # a least value cannot be above zero: then the step alone is fitted
                alone = _quotient(
                    (self._h * self._w * codes).sum(0), (self._h * codes * codes).sum(0)
                )
                step = torch.where(lowest < 0, alone, step).clamp(min=_TINY)
                lowest = lowest.clamp(min=0)
                best.take(self._error(self._codes(step, lowest), step, lowest), step, lowest)
        step, lowest = best.values
        return step, lowest

    def _fitted(self, d: Tensor, f: Tensor, e: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return d and e fitted to the codes by least squares, as float16 holds them."""
        values = self._codes(self._spread(d) * f, self._spread(e) * m) * f
        weighted = self._h * values
        a = self._sum((weighted * values).sum(0))
        b = self._sum((weighted * m).sum(0))
        c = self._sum((self._h * m * m).sum(0))
        x = self._sum((weighted * self._w).sum(0))
        y = self._sum((self._h * self._w * m).sum(0))
        # minimize |d v - e m - w|^2
        determinant = a * c - b * b
        sound = determinant > 1e-6 * a * c
        scale = _quotient(x * c - b * y, determinant)
        least = _quotient(x * b - a * y, determinant)
        sound &= (scale > 0) & (least > 0)
        return torch.where(sound, self._short(scale), d), torch.where(sound, self._short(least), e)

    # Affine types with zero on the grid

    def _with_zero(self) -> Scales:
        codes, steps = self._steps_by_zero()
        errors = torch.stack(
            [
                self._error(self._zero_codes(step, z), step)
                for z, step in zip(codes, steps, strict=True)
            ]
        )
        step = torch.stack(steps).gather(0, errors.argmin(0, keepdim=True))[0]
        best = _Best()
        for multiple in self._kind.multiples:
            d = self._short(self._largest(step) / self._kind.most, _DIGITS - multiple.bit_length())
            f, zero = self._factors(d, multiple, codes, steps)
            spread = self._spread(d) * f
            error = self._sum(self._error(self._zero_codes(spread, zero), spread))
            m = f * zero / multiple
            # of a superblock and its blocks at once
            best.take(
                self._spread(error),
                self._spread(d),
                f,
                m,
                torch.full_like(m, multiple),
            )
        d, f, m, multiples = (values.view(-1, self._kind.blocks) for values in best.values)
        scale = d[:, 0].contiguous()
        return Scales(scale, f.flatten(), scale * multiples[:, 0], m.flatten())

    def _zero_codes(self, step: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes less the code of zero, (block, n) float32."""
        low, high = self._kind.codes
        steps = (self._w / step).round_()
        return torch.clamp(steps, low - zero, high - zero, out=steps)

    def _steps_by_zero(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return codes that zero may have in each block, and for each the best step."""
        most = self._kind.codes[1]
        natural = (-self._low / (self._high - self._low).clamp(min=_TINY) * most).round()
        zeros = [(natural + shift).clamp(0, most) for shift in range(-_ZERO_CODES, _ZERO_CODES + 1)]
        steps = []
        for zero in zeros:
            down = torch.where(zero > 0, -self._low / zero.clamp(min=1), 0.0)
            up = torch.where(zero < most, self._high / (most - zero).clamp(min=1), 0.0)
            spanning = torch.maximum(down, up).clamp(min=_TINY)
            best = _Best()
            for part in _ZERO_RANGES:
                codes = self._zero_codes(spanning * part, zero)
                below = (self._h * codes * codes).sum(0)
                step = _quotient((self._h * self._w * codes).sum(0), below)
                step = torch.where(step > 0, step, spanning)
                best.take(self._error(codes, step), step)
            steps.append(best.values[0])
        return zeros, steps

    def _factors(
        self, d: Tensor, multiple: int, zeros: list[Tensor], steps: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return f and the code of zero of each block, where e is a multiple of d."""
        most = self._kind.most
        best = _Best()
        for zero, step in zip(zeros, steps, strict=True):
            # f times the code of zero has to be a multiple, and the quotient at most `most`
            stride = multiple // torch.gcd(zero.int(), torch.full_like(zero, multiple).int())
            stride = torch.where(zero > 0, stride, 1).float()
            limit = torch.where(zero > 0, most * multiple / zero.clamp(min=1), float(most))
            limit = (limit.clamp(max=most) / stride).floor() * stride
            places = step / self._spread(d) / stride
            for place in (places.floor(), places.ceil()):
                f = torch.minimum(place.clamp(min=1) * stride, limit)
                spread = self._spread(d) * f.clamp(min=1)
                error = self._error(self._zero_codes(spread, zero), spread)
                best.take(error.masked_fill(f < 1, math.inf), f, zero)
        f, zero = best.values
        return f, zero


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return quotients, and zero where both are zero."""
    return above / torch.where(below == 0, 1.0, below)
