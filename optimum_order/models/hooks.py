"""One hook of each purpose on a module: a new one takes the place of the one before."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle


def replace(module: nn.Module, name: str, register: Callable[[], RemovableHandle] | None) -> None:
    """Remove the hook of a purpose from a module, and register another.

    Args:
        module: The module.
        name: An attribute of the module that stands for the purpose.
        register: Registers the new hook; None to have none.
    """
    earlier = vars(module).pop(name, None)
    if earlier is not None:
        earlier.remove()
    if register is not None:
        vars(module)[name] = register()


def is_hooked(model: nn.Module, name: str) -> bool:
    """Return whether a module of a model has the hook of a purpose.

    Args:
        model: The model.
        name: As in `replace`.
    """
    return any(name in vars(module) for module in model.modules())
