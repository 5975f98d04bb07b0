"""What round-to-nearest and GPTQ share: the options of a uniform grid, and fitting one to a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from optimum_order.backends.base import Backend, option
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState


def group_size_option() -> Any:
    """The field for how many inputs share a scale, in every method that has one."""
    return option(
        "auto",
        "inputs that share a scale",
        check=lambda v: v in ("auto", -1) or (isinstance(v, int) and v > 0),
        allowed="auto, -1 for the whole row, or a positive integer",
    )


@dataclasses.dataclass(frozen=True)
class UniformOptions:
    """The grid a quantiser rounds to."""

    bits: int = option(
        dataclasses.MISSING,
        "width of a weight",
        check=lambda v: 2 <= v <= 8,
        allowed="an integer in 2..8",
    )
    group_size: int | str = group_size_option()
    symmetric: bool = option(True, "no zero point; what packed formats reload exactly")
    clip: str = option(
        "mse",
        "mse searches for the range that rounds with least error, none spans each group's extremes",
        check=lambda v: v in ("mse", "none"),
        allowed="mse or none",
    )

    def group_for(self, inputs: int) -> int:
        """The group size for a layer with this many inputs; -1 is the whole row."""
        if self.group_size == "auto":
            return next((size for size in (128, 64, 32) if inputs % size == 0), -1)
        return int(self.group_size)


class UniformQuantizer(Backend):
    """A backend that rounds to a `UniformGrid`."""

    kind = "quantize"
    Options = UniformOptions

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        size = self.options.group_for(shape[1])
        if size != -1 and shape[1] % size:
            fits = [str(d) for d in range(8, shape[1] + 1) if shape[1] % d == 0 and d <= 1024]
            advice = f"{', '.join(fits)} or -1 do" if fits else "-1 does"
            return f"group_size {size} does not divide its {shape[1]} inputs; {advice}"
        return None

    def fit(self, state: LayerState) -> UniformGrid:
        """The grid for this layer, its scales already in the dtype they are stored in."""
        options = self.options
        return UniformGrid.fit(
            state.weight,
            bits=options.bits,
            group_size=options.group_for(state.weight.shape[1]),
            symmetric=options.symmetric,
            clip=options.clip,
        )
