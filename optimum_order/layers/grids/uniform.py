"""Integers times a scale: the grid of round-to-nearest and GPTQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.layers.grids.base import ALL, Grid, Rounder, Selection, check_alike, whole_groups
from optimum_order.layers.grids.rounding import AffineRounder

_WEIGHTS_AT_A_TIME = 2**17
"""Few enough that the groups being fitted stay in a processor's cache."""

_FLOAT16_DIGITS = 11
_FLOAT16_LEAST = 2.0**-24
_FLOAT16_MOST = 2.0**15


def _scales(digits: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype of the weights."""
    return scale.to(dtype)


def _range(dtype: torch.dtype, bits: int) -> tuple[float, float]:
    """Return the least and the largest scale.

    None is smaller than float32, in which codes are computed, holds in full; none is so large that
    one of the grid's values overflows.
    """
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny), info.max / 2**bits


def _float16_scales(digits: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales that both the dtype of the weights and float16 hold.

    Args:
        digits: Most binary digits of a scale: 11 less those of a zero point, so that float16 holds
            the product.
        scale: (n,) float32, positive.
        dtype: Of the weights.
    """
    mantissa, exponent = torch.frexp(scale.to(dtype).float())
    short = torch.ldexp((mantissa * 2**digits).round(), exponent - digits)
    # float16 has steps of its least number below 2^-14; longer numbers were cut above
    short = (short / _FLOAT16_LEAST).round() * _FLOAT16_LEAST
    return short.clamp(_FLOAT16_LEAST, _FLOAT16_MOST / 2 ** (_FLOAT16_DIGITS - digits)).to(dtype)


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Integers times a scale that `group_size` consecutive inputs of one output share.

    Symmetric grids use the codes -2^(b-1) ... 2^(b-1)-1; others 0 ... 2^b-1 around an integer
    zero point.

    Args:
        bits: 2 to 8.
        scale: (out, groups), finite and positive, in the dtype that the artifact stores.
        zero_point: (out, groups) int16, or None for a symmetric grid.
        inputs: Number of columns of W.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor | None
    inputs: int
    codes_are_cheap = True

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        bits: int,
        group_size: int = -1,
        symmetric: bool = True,
        clip: str = "none",
        short_scales: bool = False,
    ) -> UniformGrid:
        """Return the grid that spans each group's range, or a part of the range.

        Args:
            weight: (out, in) in the storage dtype, with +0.0 where pruned.
            bits: 2 to 8.
            group_size: Inputs that share a scale; -1 for the whole row. Must divide `in`.
            symmetric: Whether to do without a zero point.
            clip: "none" covers the extremes; "mse" tries 32 narrower ranges and takes for each
                group the one that rounds with the least squared error.
            short_scales: Whether float16 holds every scale, and every scale times its zero point.
        """
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        groups = weight.reshape(-1, size)
        parts: Sequence[Tensor] = [groups]
        if weight.device.type == "cpu":
            parts = torch.split(groups, max(1, _WEIGHTS_AT_A_TIME // size))
        rounded = _float16_scales if short_scales else _scales
        digits = _FLOAT16_DIGITS if symmetric else _FLOAT16_DIGITS - bits
        fits = [
            cls._fit(part, bits, symmetric=symmetric, clip=clip, rounded=partial(rounded, digits))
            for part in parts
        ]
        whole = UniformGrid.concat(fits)
        zeros = whole.zero_point
        return cls(
            bits=bits,
            scale=whole.scale.view(len(weight), -1),
            zero_point=None if zeros is None else zeros.view(len(weight), -1),
            inputs=inputs,
        )

    @classmethod
    def _fit(
        cls,
        weight: Tensor,
        bits: int,
        *,
        symmetric: bool,
        clip: str,
        rounded: Callable[[Tensor, torch.dtype], Tensor],
    ) -> UniformGrid:
        """Return the grid of some groups (n, size), each as if it were a row."""
        # (size, n): a group's scale meets its weights in the same lane of a vector
        groups = weight.float().T.contiguous()
        low = groups.amin(0).clamp(max=0)
        high = groups.amax(0).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        least, most = _range(weight.dtype, bits)

        def spanning(shrink: float) -> UniformGrid:
            """Return the grid that spans this part of each group's range."""
            scale = ((high - low) * (shrink / (2**bits - 1))).clamp(least, most)
            scale = rounded(scale, weight.dtype)
            # A wholly pruned group has no range; any finite positive scale keeps its zeros exact.
            scale = torch.where(high == low, torch.ones_like(scale), scale)
            if symmetric:
                return cls(bits, scale[:, None], None, len(groups))
            zero = (-low * shrink / scale.float()).round().clamp(0, 2**bits - 1).short()
            return cls(bits, scale[:, None], zero[:, None], len(groups))

        best = spanning(1.0)
        if clip == "none":
            return best
        steps = torch.empty_like(groups)
        lowest = best._squared_error(weight, groups, steps)
        for step in range(1, 33):
            candidate = spanning(1.0 - 0.02 * step)
            if step % 4 == 0 and (candidate._clipping_error(groups, steps) >= lowest).all():
                break  # no narrower range can be better
            error = candidate._squared_error(weight, groups, steps)
            better = error < lowest
            best = best._replaced(candidate, better)
            lowest = torch.where(better, error, lowest)
        return best

    def _squared_error(self, weight: Tensor, groups: Tensor, steps: Tensor) -> Tensor:
        """Return the squared rounding error of each group, (n,).

        Args:
            weight: (n, size), each group a row.
            groups: (size, n) float32, the same transposed.
            steps: (size, n) float32 to compute in.
        """
        if not self._codes_are_exact:
            return (self.nearest(weight).float() - weight.float()).square().sum(1)
        # `nearest` in place; a product of two short floats is exact in float32
        scale = self.scale[:, 0].float()
        low, high = self._codes
        torch.div(groups, scale, out=steps).round_()
        if self.zero_point is None:
            steps.clamp_(low, high)
        else:
            zero = self.zero_point[:, 0].float()
            torch.clamp(steps, low - zero, high - zero, out=steps)
        steps.mul_(scale)
        if weight.dtype != torch.float32:
            steps.copy_(steps.to(weight.dtype))
        return steps.sub_(groups).square_().sum(0)

    def _clipping_error(self, groups: Tensor, steps: Tensor) -> Tensor:
        """Return the part of each group's error that grows as its range narrows, (n,)."""
        ends = torch.tensor(self._codes, device=groups.device)[:, None]  # (2, 1)
        if self.zero_point is not None:
            ends = ends - self.zero_point[:, 0]  # (2, n)
        least, most = ends * self.scale[:, 0].float()
        return torch.clamp(groups, least, most, out=steps).sub_(groups).square_().sum(0)

    def _replaced(self, other: UniformGrid, where: Tensor) -> UniformGrid:
        """Return this grid with the rows `where` (out,) bool of another."""
        zero = self.zero_point
        if zero is not None and other.zero_point is not None:
            zero = torch.where(where[:, None], other.zero_point, zero)
        scale = torch.where(where[:, None], other.scale, self.scale)
        return dataclasses.replace(self, scale=scale, zero_point=zero)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # that of the scales
        return self.scale.dtype

    @property
    def scales(self) -> Tensor | None:
        # a code of more digits than the dtype may be another's once its value is rounded
        return self.scale if self._codes_are_exact else None

    def with_scales(self, scales: Tensor) -> Self:
        least, most = _range(self.dtype, self.bits)
        scales = scales.clamp(least, most)
        digits = _FLOAT16_DIGITS if self.symmetric else _FLOAT16_DIGITS - self.bits
        are_short = torch.equal(_float16_scales(digits, self.scale, self.dtype), self.scale)
        rounded = (_float16_scales if are_short else _scales)(digits, scales, self.dtype)
        return dataclasses.replace(self, scale=rounded)

    @property
    def symmetric(self) -> bool:
        """True if the grid has no zero point."""
        return self.zero_point is None

    @property
    def group_size(self) -> int:  # type: ignore[override]  # follows from the scales
        return -1 if self.scale.shape[1] == 1 else self.unit

    @property
    def unit(self) -> int:
        return self.inputs // self.scale.shape[1]

    @property
    def stored_bits(self) -> float:
        """With 16 bits for each scale, and as many for what a zero point subtracts, as in GGUF."""
        return self.bits + (16 if self.symmetric else 32) / self.unit

    @cached_property
    def _group(self) -> Tensor:
        """The group of each input, (in,) int64."""
        return torch.arange(self.inputs, device=self.scale.device) // self.unit

    @property
    def _codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low, low + 2**self.bits - 1

    @property
    def _codes_are_exact(self) -> bool:
        """True if the dtype holds every code."""
        low, high = self._codes
        return max(-low, high) * torch.finfo(self.dtype).eps <= 1

    def _affine(self, columns: Selection) -> tuple[Tensor, Tensor | int]:
        """Return scale and zero point of each weight in some columns, (out, k)."""
        group = self._group[columns]
        return self.scale[:, group], 0 if self.zero_point is None else self.zero_point[:, group]

    def _beside(self, values: Tensor, columns: Selection) -> tuple[Tensor, Tensor, Tensor | int]:
        """Return values (..., out, k) in a shape to which scales and zero points broadcast."""
        if isinstance(columns, slice) and columns == ALL:
            # no scale is copied for each weight
            zero = 0 if self.zero_point is None else self.zero_point[..., None]
            grouped = values.view(*values.shape[:-1], self.scale.shape[1], -1)
            return grouped, self.scale[..., None], zero
        return values, *self._affine(columns)

    def quantize(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        values, scale, zero = self._beside(weight, columns)
        low, high = self._codes
        steps = (values.float() / scale.float()).round_().add_(zero).clamp_(low, high)
        codes = steps.short().reshape(weight.shape)
        if self._codes_are_exact:
            return codes
        # The codes have more digits than the dtype (8 bit without sign in bfloat16): the stored
        # value may have been rounded past the middle between two of them.
        near = torch.stack([codes, (codes - 1).clamp_(min=low), (codes + 1).clamp_(max=high)])
        distance = (self.dequantize(near, columns).float() - weight.float()).abs()
        return near.gather(0, distance.argmin(0, keepdim=True))[0]

    def dequantize(self, codes: Tensor, columns: Selection = ALL) -> Tensor:
        steps, scale, zero = self._beside(codes, columns)
        return ((steps - zero).to(self.dtype) * scale).reshape(codes.shape)

    def nearest(self, weight: Tensor, columns: Selection = ALL) -> Tensor:
        if not self._codes_are_exact:
            return super().nearest(weight, columns)
        # the same arithmetic without codes
        values, scale, zero = self._beside(weight, columns)
        low, high = self._codes
        steps = (values.float() / scale.float()).round_()
        if isinstance(zero, int):
            steps.clamp_(low, high)
        else:
            torch.clamp(steps, low - zero.float(), high - zero.float(), out=steps)
        steps.add_(0.0)  # -0.0 has no code
        return steps.to(self.dtype).mul_(scale).reshape(weight.shape)

    def rounder(self, columns: Tensor) -> Rounder:
        if not self._codes_are_exact:
            return super().rounder(columns)
        # The same arithmetic with each column contiguous and without codes. A product of two short
        # floats is exact in float32, so it is rounded once, as in `dequantize`.
        scale, zero = self._affine(columns)
        return AffineRounder(
            scale.T.float().contiguous(),
            *self._codes,
            self.dtype,
            zero=None if isinstance(zero, int) else zero.T.float().contiguous(),
        )

    def take(self, rows: Selection = ALL, columns: Selection = ALL) -> Self:
        owners = self._group[columns]
        # a scale of a whole row fits any columns of the row
        size = len(owners) if self.group_size == -1 else self.unit
        groups = whole_groups(owners, size)
        scale = self.scale[rows][:, groups]
        zero = None if self.zero_point is None else self.zero_point[rows][:, groups]
        return dataclasses.replace(self, scale=scale, zero_point=zero, inputs=len(owners))

    @classmethod
    def concat(cls, grids: Sequence[Self]) -> Self:
        check_alike(grids, "bits", "inputs", "unit", "dtype", "symmetric")
        zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
        return dataclasses.replace(
            grids[0],
            scale=torch.cat([grid.scale for grid in grids]),
            zero_point=torch.cat(zeros) if zeros else None,
        )

    def like(self, rows: int, inputs: int) -> Self:
        if self.group_size != -1 and inputs % self.unit:
            raise ValueError(f"Groups of {self.unit} do not divide {inputs} inputs.")
        groups = 1 if self.group_size == -1 else inputs // self.unit
        scale = self.scale.new_empty(rows, groups, device="meta")
        zero = None
        if self.zero_point is not None:
            zero = self.zero_point.new_empty(rows, groups, device="meta")
        return dataclasses.replace(self, scale=scale, zero_point=zero, inputs=inputs)
