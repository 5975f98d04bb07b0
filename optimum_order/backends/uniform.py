"""The options of a uniform grid, and fitting the grid to a layer, for round-to-nearest and GPTQ."""

from __future__ import annotations

import dataclasses
from typing import Any

from optimum_order.backends.base import Backend, option
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState


def group_size_option() -> Any:
    """Return the field for the group size, the same in every method that has one."""
    return option(
        "auto",
        "inputs that share a scale",
        check=lambda v: v in ("auto", -1) or (isinstance(v, int) and v > 0),
        allowed="auto, -1 for the whole row, or a positive integer",
    )


def scales_option() -> Any:
    """Return the field for the scales, the same in every method that has one."""
    return option(
        "auto",
        "auto takes scales of the model's data type, float16 those that float16 holds as well, "
        "with their products by zero points; so does --format gguf",
        check=lambda v: v in ("auto", "float16"),
        allowed="auto or float16",
    )


@dataclasses.dataclass(frozen=True)
class UniformOptions:
    """The grid that a quantizer rounds to."""

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
    scales: str = scales_option()

    def group_for(self, inputs: int) -> int:
        """Return the group size for a layer with this many inputs; -1 is the whole row."""
        if self.group_size == "auto":
            return next((size for size in (128, 64, 32) if inputs % size == 0), -1)
        return int(self.group_size)


class UniformQuantizer(Backend):
    """A backend that rounds to a `UniformGrid`."""

    kind = "quantize"
    Options = UniformOptions
    options: UniformOptions

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        inputs = shape[1]
        size = self.options.group_for(inputs)
        if size == -1 or inputs % size == 0:
            return None
        sizes = [str(d) for d in range(8, inputs + 1) if inputs % d == 0 and d <= 1024]
        advice = f"{', '.join(sizes)} or -1 do" if sizes else "-1 does"
        return f"group_size {size} does not divide its {inputs} inputs; {advice}"

    def fit(self, state: LayerState) -> UniformGrid:
        """Return the grid for a layer, its scales in the dtype in which they are stored."""
        options = self.options
        return UniformGrid.fit(
            state.weight,
            bits=options.bits,
            group_size=options.group_for(state.weight.shape[1]),
            symmetric=options.symmetric,
            clip=options.clip,
            short_scales=options.scales == "float16",
        )
