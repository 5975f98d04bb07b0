"""Remove attention heads: a head of keys and values, with all query heads that read it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_order.backends.base import Cut, Reshaper
from optimum_order.backends.channels import ChannelOptions, cut_columns, remaining_groups
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics

if TYPE_CHECKING:
    from optimum_order.models.architecture import Attention, Block, Layer, Roles


class Heads(Reshaper):
    """Remove the groups of heads that the output misses least, the same number in each block.

    Source: see `channels`, with the columns that a group of heads writes to the output projection.
    """

    name = "heads"
    summary = "remove groups of attention heads and refit the output projection"
    needs = frozenset({Gram})
    Options = ChannelOptions
    options: ChannelOptions

    def remaining(self, groups: int) -> int:
        """Return the number of groups that remain of `groups`."""
        return round(groups * (1 - self.options.ratio))

    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        attention = roles.blocks[0].attention
        self._check(roles, attention)
        groups = attention.kv_heads
        count = self.remaining(groups)
        shapes = {number: self._fields(roles, attention, number) for number in range(1, groups)}
        allowed = [number for number, fields in shapes.items() if _loads(config, fields)]
        if count not in allowed:
            queries = attention.heads // groups
            names = ", ".join(f"{number * queries} + {number}" for number in allowed) or "none"
            raise OrderError(
                f"Stage '{self.stage}' would leave {count * queries} query heads and {count} heads "
                f"of keys and values, of {attention.heads} and {groups}. What loads: {names}."
            )
        return shapes[count]

    def _check(self, roles: Roles, attention: Attention) -> None:
        """Refuse an attention layer that has another shape wherever it has other heads."""
        fields = roles.fields
        names = {attention.q.name, attention.k.name, attention.v.name}
        norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm]
        reason = None
        if fields.head_dim is None:
            reason = "its config gives no size of a head, which follows from the number of heads"
        elif len(names) < 3:
            reason = "its queries, keys and values are one layer, cut up by the config"
        elif any(norm.size != attention.head_dim for norm in norms):
            reason = "it has norms over all heads together"
        if reason is not None:
            raise OrderError(
                f"Stage '{self.stage}' cannot remove heads of a model of type '{roles.family}': "
                f"{reason}. width:0.2 and depth:1 make this model smaller."
            )

    @staticmethod
    def _fields(roles: Roles, attention: Attention, groups: int) -> dict[str, Any]:
        fields = roles.fields
        sizes: dict[str, Any] = {fields.heads: groups * (attention.heads // attention.kv_heads)}
        if fields.kv_heads is not None:
            sizes[fields.kv_heads] = groups
        assert fields.head_dim is not None
        return sizes | {fields.head_dim: attention.head_dim}

    def reads(self, block: Block) -> tuple[Layer, ...]:
        return (block.attention.o,)

    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        attention = block.attention
        output = states[attention.o.name]
        seen = statistics[attention.o.name]
        size = attention.heads // attention.kv_heads * attention.head_dim
        groups = remaining_groups(
            output.weight,
            seen[Gram],
            size=size,
            count=self.remaining(attention.kv_heads),
            options=self.options,
        )
        columns = _channels(groups, size)
        rows = _channels(groups, attention.head_dim)
        return [
            Cut(attention.q.name, 0, columns),
            Cut(attention.k.name, 0, rows),
            Cut(attention.v.name, 0, rows),
            cut_columns(
                attention.o.name, output, seen, columns, stage=self.stage, options=self.options
            ),
        ]


def _channels(groups: Tensor, size: int) -> Tensor:
    """Return the channels of some groups of `size` consecutive ones."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _loads(config: Any, fields: Mapping[str, Any]) -> bool:
    """Return whether a config takes other values of some fields."""
    changed = copy.deepcopy(config)
    try:
        for field, value in fields.items():
            setattr(changed, field, value)
        type(changed).from_dict(changed.to_dict())
    except Exception:  # what a config checks of itself raises anything
        return False
    return True
