"""Have modules of a model add what an adapter makes of their inputs, as PEFT does."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from optimum_order.layers.low_rank import LowRank
from optimum_order.models import hooks

_HANDLE = "_optimum_order_adapter"
"""Attribute of a module that has an adapter."""


class _Adding:
    """The hook of one module.

    Args:
        adapter: Of the module.
    """

    def __init__(self, adapter: LowRank):
        self.adapter = adapter

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return self.adapter.added(args[0] if args else kwargs["input"], output)


def adapt(module: nn.Module, adapter: LowRank | None) -> None:
    """Have a module add the product of an adapter to its output.

    Args:
        module: An `nn.Linear`; only calls of the module add.
        adapter: The adapter; None to have the module compute with its weight alone.
    """
    register = None
    if adapter is not None:
        hook = _Adding(adapter)
        register = functools.partial(module.register_forward_hook, hook, with_kwargs=True)
    hooks.replace(module, _HANDLE, register)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a module of a model has an adapter."""
    return hooks.is_hooked(model, _HANDLE)
