"""Activations: have layers round their inputs to 8 bits, which engines then multiply as such.

Weights stay as they are. The scale of a token is taken when the token comes, or one scale for all
tokens is taken from calibration. Stages that follow see the rounded inputs.
"""

import dataclasses

from optimum_order.backends.base import Backend, option
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import AbsMax, Statistics
from optimum_order.order import Stage


@dataclasses.dataclass(frozen=True)
class ActivationsOptions:
    """The grid of the inputs."""

    bits: int | str = option(
        8,
        "8 for integers, fp8 for float8 numbers",
        check=lambda v: v in (8, "fp8"),
        allowed="8 or fp8",
    )
    per: str = option(
        "token",
        "token takes a scale for each token when it is read, tensor one for all from calibration",
        check=lambda v: v in ("token", "tensor"),
        allowed="token or tensor",
    )


class Activations(Backend):
    """Give the inputs of layers a grid."""

    name = "activations"
    summary = "round the inputs of linear layers to 8 bits"
    kind = "inputs"
    Options = ActivationsOptions
    options: ActivationsOptions

    def __init__(self, stage: Stage):
        super().__init__(stage)
        if self.options.per == "tensor":
            self.needs = frozenset({AbsMax})

    def covers(self, layer: str, kind: str = "linear") -> bool:
        # what stock transformers rounds the inputs of
        return kind == "linear" and super().covers(layer, kind)

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        data_type = "fp8" if self.options.bits == "fp8" else "int8"
        inputs = InputGrid(data_type)
        if self.options.per == "tensor":
            inputs = InputGrid.fit(statistics[AbsMax].amax(), data_type, state.weight.dtype)
        return dataclasses.replace(state, inputs=inputs)
