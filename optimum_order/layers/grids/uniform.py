"""Integers times a scale: the grid of round-to-nearest and GPTQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optimum_order.layers.grids.base import Grid, Rounder

_WEIGHTS_AT_A_TIME = 2**17


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Integers times a scale shared by `group_size` consecutive inputs of one output.

    Symmetric grids use the codes -2^(b-1) ... 2^(b-1)-1; others 0 ... 2^b-1 around an integer zero point.

    Args:
        bits: 2 to 8.
        scale: (out, groups), finite and positive, in the dtype the artifact stores.
        zero_point: (out, groups) int16, or None when symmetric.
        inputs: The number of columns of W.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor | None
    inputs: int

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        bits: int,
        group_size: int = -1,
        symmetric: bool = True,
        clip: str = "none",
    ) -> UniformGrid:
        """The grid that spans each group's range, or (`clip="mse"`) the part of it that rounds with least error.

        Args:
            weight: (out, in) in the storage dtype, with +0.0 where pruned.
            bits: 2 to 8.
            group_size: Inputs that share a scale; -1 for the whole row. Must divide `in`.
            symmetric: Without a zero point.
            clip: "none" covers the extremes; "mse" tries 32 narrower ranges and keeps the best for each group.
        """
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        groups = weight.reshape(-1, size)
        # Groups have nothing to do with each other; few at a time stay in the processor's cache.
        parts = (
            groups.split(max(1, _WEIGHTS_AT_A_TIME // size))
            if weight.device.type == "cpu"
            else [groups]
        )
        found = [cls._fit(part, bits, symmetric=symmetric, clip=clip) for part in parts]
        scale = torch.cat([grid.scale for grid in found]).view(len(weight), -1)
        zero = None if symmetric else torch.cat([grid.zero_point for grid in found]).view_as(scale)
        return cls(bits=bits, scale=scale, zero_point=zero, inputs=inputs)

    @classmethod
    def _fit(cls, weight: Tensor, bits: int, *, symmetric: bool, clip: str) -> UniformGrid:
        """The grid of some groups, each a row of (n, size)."""
        groups = (
            weight.float().T.contiguous()
        )  # (size, n): a group's scale meets it in the same lane of a vector
        low, high = groups.amin(0).clamp(max=0), groups.amax(0).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high

        # Scales no smaller than float32, in which codes are computed, holds in full; none so large that one of the
        # grid's values overflows.
        info = torch.finfo(weight.dtype)
        least, most = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny), info.max / 2**bits

        def grid(shrink: float) -> UniformGrid:
            scale = ((high - low) * (shrink / (2**bits - 1))).clamp(least, most).to(weight.dtype)
            # A wholly pruned group has no range; any finite positive scale keeps its zeros exact.
            scale = torch.where(high == low, torch.ones_like(scale), scale)
            zero = (
                None
                if symmetric
                else (-low * shrink / scale.float()).round().clamp(0, 2**bits - 1).short()
            )
            return cls(bits, scale[:, None], None if zero is None else zero[:, None], len(groups))

        steps = torch.empty_like(groups)

        def error(candidate: UniformGrid) -> Tensor:
            """Squared, of each group, (n,)."""
            if not candidate._codes_are_exact:
                return (candidate.nearest(weight).float() - weight.float()).square().sum(1)
            # `nearest` in place; a product of two short floats is exact in float32
            scale, (least_code, most_code) = candidate.scale[:, 0].float(), candidate._codes
            torch.div(groups, scale, out=steps).round_()
            if candidate.zero_point is None:
                steps.clamp_(least_code, most_code)
            else:
                zero = candidate.zero_point[:, 0].float()
                torch.clamp(steps, least_code - zero, most_code - zero, out=steps)
            steps.mul_(scale)
            if weight.dtype != torch.float32:
                steps.copy_(steps.to(weight.dtype))
            return steps.sub_(groups).square_().sum(0)

        def clipped(candidate: UniformGrid) -> Tensor:
            """The part of the error of each group that grows as its range narrows, (n,)."""
            scale, ends = (
                candidate.scale[:, 0].float(),
                torch.tensor(candidate._codes, device=weight.device)[:, None],
            )
            if candidate.zero_point is not None:
                ends = ends - candidate.zero_point[:, 0]
            least_value, most_value = ends * scale
            return (
                torch.clamp(groups, least_value, most_value, out=steps)
                .sub_(groups)
                .square_()
                .sum(0)
            )

        best = grid(1.0)
        if clip == "none":
            return best
        scale, zero, lowest = best.scale, best.zero_point, error(best)
        for step in range(1, 33):
            candidate = grid(1.0 - 0.02 * step)
            if step % 4 == 0 and (clipped(candidate) >= lowest).all():
                break  # no narrower range can be better
            found = error(candidate)
            better = found < lowest
            scale = torch.where(better[:, None], candidate.scale, scale)
            zero = (
                None if zero is None else torch.where(better[:, None], candidate.zero_point, zero)
            )
            lowest = torch.where(better, found, lowest)
        return cls(bits, scale, zero, len(groups))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.scale.dtype

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 for the whole row."""
        return -1 if self.scale.shape[1] == 1 else self.inputs // self.scale.shape[1]

    @property
    def unit(self) -> int:
        return self.inputs // self.scale.shape[1]

    @cached_property
    def _group(self) -> Tensor:
        return torch.arange(self.inputs, device=self.scale.device) // self.unit

    def _affine(self, columns: Tensor | slice) -> tuple[Tensor, Tensor | int]:
        group = self._group[columns]
        return self.scale[:, group], 0 if self.zero_point is None else self.zero_point[:, group]

    def _beside(
        self, values: Tensor, columns: Tensor | slice
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """Values (..., out, k) of these columns, seen so that their scales and zero points broadcast to them."""
        if isinstance(columns, slice) and columns == slice(
            None
        ):  # without each weight's own copy of its scale
            zero = 0 if self.zero_point is None else self.zero_point[..., None]
            return values.unflatten(-1, (self.scale.shape[1], -1)), self.scale[..., None], zero
        return values, *self._affine(columns)

    @property
    def _codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low, low + 2**self.bits - 1

    @property
    def _codes_are_exact(self) -> bool:
        low, high = self._codes
        return max(-low, high) * torch.finfo(self.dtype).eps <= 1

    def quantize(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        values, scale, zero = self._beside(weight, columns)
        low, high = self._codes
        codes = (
            (values.float() / scale.float())
            .round_()
            .add_(zero)
            .clamp_(low, high)
            .short()
            .reshape(weight.shape)
        )
        if self._codes_are_exact:
            return codes
        # Such codes have more digits than the dtype (8 bit without sign in bfloat16): what is stored may have been
        # rounded past the middle between two of them.
        near = torch.stack([codes, (codes - 1).clamp_(min=low), (codes + 1).clamp_(max=high)])
        distance = (self.dequantize(near, columns).float() - weight.float()).abs()
        return near.gather(0, distance.argmin(0, keepdim=True))[0]

    def dequantize(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        steps, scale, zero = self._beside(codes, columns)
        return ((steps - zero).to(self.dtype) * scale).reshape(codes.shape)

    def nearest(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        if not self._codes_are_exact:
            return super().nearest(weight, columns)
        # The same arithmetic without codes.
        values, scale, zero = self._beside(weight, columns)
        steps, (low, high) = (values.float() / scale.float()).round_(), self._codes
        if isinstance(zero, int):
            steps.clamp_(low, high)
        else:
            torch.clamp(steps, low - zero.float(), high - zero.float(), out=steps)
        return (
            steps.add_(0.0).to(self.dtype).mul_(scale).reshape(weight.shape)
        )  # codes know no -0.0

    def rounder(self, columns: Tensor) -> Rounder:
        if not self._codes_are_exact:
            return super().rounder(columns)
        # The same arithmetic as above with each column contiguous, without codes and in place: a sweep is all
        # overhead. A product of two short floats is exact in float32, so it is rounded once, as in `dequantize`.
        scale, zero = self._affine(columns)
        scales = scale.T.float().contiguous().unbind()  # k of (out,)
        low, high = self._codes
        lows: Sequence[Any] = [low] * len(scales)
        highs: Sequence[Any] = [high] * len(scales)
        if not isinstance(zero, int):
            lows, highs = (low - zero.T.float()).unbind(), (high - zero.T.float()).unbind()
        short = self.dtype != torch.float32

        def round_(i: int, w: Tensor, out: Tensor) -> None:
            torch.div(w, scales[i], out=out).round_().clamp_(lows[i], highs[i]).mul_(scales[i])
            if short:
                out.copy_(out.to(self.dtype))

        return round_
