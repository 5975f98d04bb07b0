"""The state of one layer between stages, and the promises every stage keeps about it.

A layer is a matrix `W` of shape (out, in), whatever module it came from. Its state is three things: the weight,
which weights are `pruned`, and the `grid` of values a quantised weight may take. `pruned` is stated, never
inferred: rounding alone turns 15 % of Gaussian weights into zeros at 4 bit.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optimum_order.errors import InvariantError

_WEIGHTS_AT_A_TIME = 2**17

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""

Rounder = Callable[[int, Tensor, Tensor], Any]
"""Puts the grid values nearest to a column into a tensor, see `Grid.rounder`."""


@dataclass(frozen=True)
class Statistics:
    """What calibration knows about the inputs `X` (tokens, in) of one layer.

    Args:
        tokens: How many rows `X` had; 0 for an expert that no token reached.
        squared_norms: (in,) float32, the sum over tokens of `x_j ** 2`.
        gram: (in, in) float32, `X^T X`; None unless a stage needed it.
    """

    tokens: int
    squared_norms: Tensor
    gram: Tensor | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of these statistics, made once for all layers that read the same input."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def isotropic(self) -> Statistics:
        """The statistics of white noise: all that can be assumed of inputs nobody has seen."""
        gram = None if self.gram is None else torch.eye(len(self.squared_norms), device=self.gram.device)
        return Statistics(tokens=0, squared_norms=torch.ones_like(self.squared_norms), gram=gram)

    def squared_error(self, delta: Tensor) -> float:
        """`||X delta^T||^2 = tr(delta H delta^T)`, or its diagonal part where there is no Gram matrix."""
        delta = delta.float()
        if self.gram is not None:
            return torch.linalg.vecdot(delta @ self.gram, delta).sum(dtype=torch.float64).item()
        return torch.sum(delta.square() @ self.squared_norms, dtype=torch.float64).item()


class Grid(ABC):
    """The values each weight of one layer may take. Zero is always one of them.

    Codes are what a format packs; `dequantize(quantize(W))` is the nearest point of the grid, in the dtype the
    artifact will be loaded in, so that what was measured is what loads.
    """

    bits: int
    """Width of one code."""
    dtype: torch.dtype
    """The dtype of the dequantised weight."""

    @abstractmethod
    def quantize(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The integer codes of the nearest grid values of `weight` (out, k), which holds these columns of W."""

    @abstractmethod
    def dequantize(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The values (out, k) of these codes, in `dtype`."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """How many weights share one scale: the granularity of the quantisation."""

    def nearest(self, weight: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The grid value nearest to each of these columns of W, (out, k), in `dtype`."""
        return self.dequantize(self.quantize(weight, columns), columns)

    def rounder(self, columns: Tensor) -> Rounder:
        """`nearest` for a sweep, which asks for one column at a time.

        Args:
            columns: (k,) columns of W.

        Returns:
            A function of i, of current values (out,) of column `columns[i]`, and of where to put the nearest grid
            values, (out,) float32. A zero may come out as -0.0.
        """
        return lambda i, w, out: out.copy_(self.nearest(w[:, None], columns[i : i + 1])[:, 0])

    def holds(self, weight: Tensor) -> bool:
        """Whether every weight (out, in) lies on the grid, bit for bit."""
        return torch.equal(self.nearest(weight), weight.to(self.dtype))


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
        cls, weight: Tensor, *, bits: int, group_size: int = -1, symmetric: bool = True, clip: str = "none"
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
        parts = groups.split(max(1, _WEIGHTS_AT_A_TIME // size)) if weight.device.type == "cpu" else [groups]
        found = [cls._fit(part, bits, symmetric=symmetric, clip=clip) for part in parts]
        scale = torch.cat([grid.scale for grid in found]).view(len(weight), -1)
        zero = None if symmetric else torch.cat([grid.zero_point for grid in found]).view_as(scale)
        return cls(bits=bits, scale=scale, zero_point=zero, inputs=inputs)

    @classmethod
    def _fit(cls, weight: Tensor, bits: int, *, symmetric: bool, clip: str) -> UniformGrid:
        """The grid of some groups, each a row of (n, size)."""
        groups = weight.float().T.contiguous()  # (size, n): a group's scale meets it in the same lane of a vector
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
            zero = None if symmetric else (-low * shrink / scale.float()).round().clamp(0, 2**bits - 1).short()
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
            scale, ends = candidate.scale[:, 0].float(), torch.tensor(candidate._codes, device=weight.device)[:, None]
            if candidate.zero_point is not None:
                ends = ends - candidate.zero_point[:, 0]
            least_value, most_value = ends * scale
            return torch.clamp(groups, least_value, most_value, out=steps).sub_(groups).square_().sum(0)

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
            zero = None if zero is None else torch.where(better[:, None], candidate.zero_point, zero)
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

    def _beside(self, values: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor, Tensor | int]:
        """Values (..., out, k) of these columns, seen so that their scales and zero points broadcast to them."""
        if isinstance(columns, slice) and columns == slice(None):  # without each weight's own copy of its scale
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
        codes = (values.float() / scale.float()).round_().add_(zero).clamp_(low, high).short().reshape(weight.shape)
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
        return steps.add_(0.0).to(self.dtype).mul_(scale).reshape(weight.shape)  # codes know no -0.0

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


@dataclass(frozen=True)
class StageRecord:
    """What one stage did to one layer, for the manifest.

    Args:
        stage: The concrete stage, as canonical text.
        relative_error: Squared error it added over the squared size of what it found.
        measured_on: "outputs" (`tr(dW H dW^T) / tr(W H W^T)`), "inputs" (the same with H's diagonal) or "weights".
    """

    stage: str
    relative_error: float
    measured_on: str


@dataclass(frozen=True)
class LayerState:
    """One layer between stages.

    Args:
        weight: (out, in), in the dtype of the artifact.
        pruned: (out, in) bool, True where a weight was removed; None if none was.
        grid: Where the weights lie once quantised; None before.
        notes: What happened on the way that a reader of the result should know, such as a raised damping.
    """

    weight: Tensor
    pruned: Tensor | None = None
    grid: Grid | None = None
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> Tensor:
        """`pruned`, or a mask of nothing: (out, in) bool."""
        return torch.zeros_like(self.weight, dtype=torch.bool) if self.pruned is None else self.pruned

    @property
    def sparsity(self) -> float:
        """The fraction of weights removed, between 0 and 1."""
        return 0.0 if self.pruned is None else self.pruned.float().mean(dtype=torch.float64).item()

    @property
    def bits(self) -> int:
        """Width of one stored weight, in bits."""
        return self.weight.element_size() * 8 if self.grid is None else self.grid.bits

    def to(self, device: torch.device) -> LayerState:
        """The state with all of its tensors on a device."""
        return _moved(self, device)

    def check(self, where: str) -> None:
        """Raise InvariantError unless this state keeps every promise.

        Args:
            where: Names the layer and stage in the message.
        """

        def broken(what: str) -> InvariantError:
            return InvariantError(f"{where}: {what}. This is a bug in the backend, not in your input.")

        if not torch.isfinite(torch.stack(self.weight.aminmax())).all():  # NaN is the least and the most of anything
            raise broken("a weight is NaN or infinite")
        if self.pruned is not None:
            if self.pruned.dtype != torch.bool or self.pruned.shape != self.weight.shape:
                raise broken("the mask is not a boolean tensor of the weight's shape")
            # the bits of +0.0, and of nothing else, are 0
            if lost := int(torch.count_nonzero(integers(self.weight).masked_fill(~self.pruned, 0))):
                raise broken(f"{lost} pruned weights are no longer +0.0")
        if self.grid is not None:
            if self.grid.dtype != self.weight.dtype:
                raise broken(f"the grid is in {self.grid.dtype}, the weight in {self.weight.dtype}")
            if not self.grid.holds(self.weight):
                raise broken("a weight is off its quantisation grid")


def integers(weight: Tensor) -> Tensor:
    """The bits of a weight, as integers in the same memory: equal only where it is the same to the sign of a zero."""
    return weight.view(_INTEGERS[weight.element_size()])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _moved(value: Any, device: torch.device) -> Any:
    """A value with its tensors, and those of the dataclasses in it, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.replace(
        value, **{field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
    )
