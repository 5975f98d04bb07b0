"""The tensors in a nested value: the one definition of what is looked into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in a value.

    Tensors are looked for in lists, tuples and dicts, in all else that torch registers as a
    pytree, such as the outputs of a transformers model, and in the fields of dataclasses.
    """
    tensors: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif _is_dataclass(leaf):
            tensors += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return tensors


def map_tensors(function: Callable[[Tensor], Tensor], value: T) -> T:
    """Return a value with a function applied to every tensor in it, see `tensors_in`.

    Args:
        function: Gives the new tensor.
        value: Not changed; a dataclass without a tensor is shared with the result.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _is_dataclass(leaf) or not tensors_in(leaf):
            return leaf
        fields = {
            field.name: map_tensors(function, getattr(leaf, field.name))
            for field in dataclasses.fields(leaf)
            if field.init
        }
        return dataclasses.replace(leaf, **fields)

    return cast(T, pytree.tree_map(mapped, value))


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
