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
from optimum_order.order import Stage


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

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.width = 0

    def cuts(
        self,
        block: str,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        names = [f"{block}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        if not all(name in states for name in names):
            raise OrderError(f"Stage '{self.stage}': block '{block}' has no gated MLP.")
        gate, up, down = (states[name].weight.float() for name in names)
        score = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)  # (channels,)
        self.width = round(len(score) * (1 - self.options.fraction))
        indices = score.topk(self.width).indices.sort().values
        return [Cut(names[0], 0, indices), Cut(names[1], 0, indices), Cut(names[2], 1, indices)]

    def configure(self, config: Any) -> None:
        config.intermediate_size = self.width
