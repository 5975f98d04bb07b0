"""Make the MLPs of a model narrower: structured pruning by the norms of their channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optimum_order.backends import Reshaper, option
from optimum_order.backends.base import Cut
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.models.architecture import Block, Roles


@dataclasses.dataclass(frozen=True)
class NarrowOptions:
    """How much narrower."""

    fraction: float = option(
        0.5,
        "fraction of the channels removed",
        check=lambda v: 0 < v < 1,
        allowed="a number in (0, 1)",
    )


class Narrow(Reshaper):
    """Remove the MLP channels with the least `|gate_c| |up_c| |down_c|`, of gated MLPs."""

    name = "narrow"
    summary = "remove the channels of the MLPs with the smallest norms"
    Options = NarrowOptions

    def remaining(self, width: int) -> int:
        """Return the number of channels that remain of `width`."""
        return round(width * (1 - self.options.fraction))

    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        if any(block.dense is None or block.dense.gate is None for block in roles.blocks):
            raise OrderError(f"Stage '{self.stage}' makes gated MLPs narrower.")
        return {"intermediate_size": self.remaining(config.intermediate_size)}

    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        mlp = block.dense
        assert mlp is not None and mlp.gate is not None
        names = [mlp.gate.name, mlp.up.name, mlp.down.name]
        gate, up, down = (states[name].weight.float() for name in names)
        score = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)  # (channels,)
        indices = score.topk(self.remaining(len(score))).indices.sort().values
        return [Cut(names[0], 0, indices), Cut(names[1], 0, indices), Cut(names[2], 1, indices)]
