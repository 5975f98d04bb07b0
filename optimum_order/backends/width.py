"""Remove channels of the MLPs: rows of gate and up, and the columns of down, go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optimum_order.backends.base import Cut, Reshaper, option
from optimum_order.backends.channels import ChannelOptions, cut_columns, remaining_groups
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics

if TYPE_CHECKING:
    from optimum_order.models.architecture import Block, Layer, Roles


@dataclass(frozen=True)
class WidthOptions(ChannelOptions):
    """How many channels are removed, and whether the rest is refitted."""

    multiple: int = option(
        32,
        "the number of channels that remain is a multiple of this",
        check=lambda v: v > 0,
        allowed="a positive integer",
    )


class Width(Reshaper):
    """Remove the channels that the output of the MLP misses least, the same number in each block.

    Source: see `channels`.
    """

    name = "width"
    summary = "remove channels of the MLPs and refit those that remain"
    needs = frozenset({Gram})
    Options = WidthOptions
    options: WidthOptions

    def remaining(self, width: int) -> int:
        """Return the number of channels that remain of `width`.

        Raises:
            OrderError: If none would remain, or none be removed.
        """
        multiple = self.options.multiple
        count = round(width * (1 - self.options.ratio) / multiple) * multiple
        if not 0 < count < width:
            raise OrderError(
                f"Stage '{self.stage}' would leave {count} of {width} channels, in multiples "
                f"of {multiple}: choose another ratio, or a smaller 'multiple'."
            )
        return count

    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        field = roles.fields.intermediate
        mixed = [block.name for block in roles.blocks if block.dense is None]
        if field is None or mixed:
            raise OrderError(
                f"Stage '{self.stage}' removes channels of MLPs, and {mixed[0]} has experts: "
                "experts:0.25 removes some of these."
            )
        widths = {block.dense.width for block in roles.blocks if block.dense}
        if len(widths) > 1:
            raise OrderError(
                f"Stage '{self.stage}' needs MLPs of one width, and the blocks have "
                f"{', '.join(map(str, sorted(widths)))} channels."
            )
        return {field: self.remaining(widths.pop())}

    def reads(self, block: Block) -> tuple[Layer, ...]:
        assert block.dense is not None
        return (block.dense.down,)

    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        mlp = block.dense
        assert mlp is not None
        down = states[mlp.down.name]
        seen = statistics[mlp.down.name]
        channels = remaining_groups(
            down.weight,
            seen[Gram],
            size=1,
            count=self.remaining(mlp.width),
            options=self.options,
        )
        rows: dict[str, list[torch.Tensor]] = {}  # gate and up may be one layer
        for layer in mlp.readers:
            rows.setdefault(layer.name, []).append(layer.selected(channels))
        cuts = [Cut(name, 0, torch.cat(parts)) for name, parts in rows.items()]
        refitted = cut_columns(
            mlp.down.name, down, seen, channels, stage=self.stage, options=self.options
        )
        return [*cuts, refitted]
