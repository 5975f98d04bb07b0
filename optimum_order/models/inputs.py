"""Have modules of a model round their inputs to a grid, as an engine with 8-bit kernels does."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from optimum_order.layers.inputs import InputGrid
from optimum_order.models import hooks

_HANDLE = "_optimum_order_inputs"
"""Attribute of a module whose inputs have a grid."""


class _Last(threading.local):
    """The input that a thread rounded last: the layers that read it too get the same tensor.

    Whoever compares inputs by their memory then sees that they are shared.
    """

    read: weakref.ref[Tensor] | None = None
    moment: tuple[bool, bool, int | None] | None = None
    grid: InputGrid | None = None
    rounded: weakref.ref[Tensor] | None = None

    def find(self, x: Tensor, grid: InputGrid) -> Tensor | None:
        """Return what an input was rounded to, if it is the last one and has not changed since."""
        if self.read is None or self.rounded is None or self.read() is not x:
            return None
        same = self.moment == _moment(x) and _alike(self.grid, grid)
        return self.rounded() if same else None

    def put(self, x: Tensor, grid: InputGrid, rounded: Tensor) -> None:
        """Remember an input for as long as somebody else holds it."""
        self.read = weakref.ref(x)
        self.moment = _moment(x)
        self.grid = grid
        self.rounded = weakref.ref(rounded)


_last = _Last()


class _StraightThrough(torch.autograd.Function):
    """Rounds, and lets gradients through as if it had not: those of rounding are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: InputGrid) -> Tensor:
        return grid.nearest(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Rounding:
    """The hook of one module.

    Args:
        grid: Of its input.
    """

    def __init__(self, grid: InputGrid):
        self.grid = grid

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._rounded(kwargs["input"])}

    def _rounded(self, x: Tensor) -> Tensor:
        rounded = _last.find(x, self.grid)
        if rounded is None:
            rounded = cast(Tensor, _StraightThrough.apply(x, self.grid))  # type: ignore[no-untyped-call]
            _last.put(x, self.grid, rounded)
        return rounded


def quantize_inputs(module: nn.Module, grid: InputGrid | None) -> None:
    """Have a module round its input before it computes.

    Args:
        module: An `nn.Linear`; only calls of the module round.
        grid: The grid; None to have it read its input as it is.
    """
    register = None
    if grid is not None:
        hook = _Rounding(grid)
        register = functools.partial(module.register_forward_pre_hook, hook, with_kwargs=True)
    hooks.replace(module, _HANDLE, register)


def rounds_inputs(model: nn.Module) -> bool:
    """Return whether a module of a model rounds its input."""
    return hooks.is_hooked(model, _HANDLE)


def _moment(x: Tensor) -> tuple[bool, bool, int | None]:
    """Return what must be the same for a tensor to be made of an input again."""
    version = None if x.is_inference() else x._version
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), version


def _alike(one: InputGrid | None, other: InputGrid) -> bool:
    if one is None or one.data_type != other.data_type:
        return False
    if one.scale is None or other.scale is None:
        return one.scale is other.scale
    return torch.equal(one.scale.cpu(), other.scale.cpu())
