"""The options of a grid, and fitting the grid to a layer, for round-to-nearest and GPTQ.

A number of bits is a uniform grid. fp8 is float8 numbers times a scale of each row, as engines with
kernels of that type have it. A name such as q4_k is the grid of that K-quant of llama.cpp.
Rows that its superblocks do not divide get a uniform grid in groups of 32 instead, which takes as
many bits as what llama.cpp falls back to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from optimum_order.backends.base import Backend, option
from optimum_order.errors import OrderError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.grids.float8 import Float8Grid
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.superblock_search import SUPERBLOCK, TYPES
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage

_FLOAT8 = "fp8"
_FALLBACK_GROUP = 32
_FALLBACKS = {
    "q2_k": (4, True),
    "q3_k": (4, True),
    "q4_k": (5, True),
    "q5_k": (5, False),
    "q6_k": (8, True),
}
"""Bits and symmetry of the uniform grid of rows that superblocks do not divide."""


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

    bits: int | str = option(
        dataclasses.MISSING,
        "width of a weight, fp8 for float8 numbers, or a K-quant of llama.cpp",
        check=lambda v: v in (_FLOAT8, *TYPES) if isinstance(v, str) else 2 <= v <= 8,
        allowed=f"{_FLOAT8}, {', '.join(TYPES)} or an integer in 2..8",
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
    zero: bool = option(
        False,
        "keep zero on the grid of q2_k, q4_k and q5_k, so that the layer can be pruned later; what "
        "is pruned before has it anyway",
    )

    def group_for(self, inputs: int) -> int:
        """Return the group size for a layer with this many inputs; -1 is the whole row."""
        if self.group_size == "auto":
            return next((size for size in (128, 64, 32) if inputs % size == 0), -1)
        return int(self.group_size)


class UniformQuantizer(Backend):
    """A backend that rounds to a grid: uniform, float8, or a K-quant's."""

    kind = "quantize"
    Options = UniformOptions
    options: UniformOptions

    @classmethod
    def validate(cls, stage: Stage, options: UniformOptions) -> UniformOptions:
        if isinstance(options.bits, int):
            return dataclasses.replace(options, zero=False)  # always there
        defaults = {"group_size": "auto", "symmetric": True, "clip": "mse"}
        for name, default in defaults.items():
            if getattr(options, name) != default:
                raise OrderError(
                    f"Stage '{stage}': {options.bits} has blocks and scales of its own; leave out "
                    f"'{name}'."
                )
        # its scales are float16 numbers anyway, and zero is on every symmetric grid
        zero = options.zero and _loses_zero(options.bits)
        return dataclasses.replace(options, scales="auto", zero=zero)

    @property
    def makes_zero(self) -> bool:
        return self.options.zero or not _loses_zero(self.options.bits)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        inputs = shape[1]
        if self.options.bits == _FLOAT8:
            return None
        if isinstance(self.options.bits, str):
            if inputs % _FALLBACK_GROUP == 0:
                return None
            return (
                f"{self.options.bits} has blocks of {SUPERBLOCK} weights, or of "
                f"{_FALLBACK_GROUP} where these do not divide a row, and it has {inputs} inputs; "
                "give a number of bits"
            )
        size = self.options.group_for(inputs)
        if size == -1 or inputs % size == 0:
            return None
        sizes = [str(d) for d in range(8, inputs + 1) if inputs % d == 0 and d <= 1024]
        advice = f"{', '.join(sizes)} or -1 do" if sizes else "-1 does"
        return f"group_size {size} does not divide its {inputs} inputs; {advice}"

    def fit(self, state: LayerState, importance: Tensor | None = None) -> Grid:
        """Return the grid for a layer, its scales as they are stored.

        Args:
            state: The layer.
            importance: (in,), what the squared error of each input counts in the search for the
                scales of a K-quant; all the same by default.
        """
        options = self.options
        if options.bits == _FLOAT8:
            return Float8Grid.fit(state.weight)
        if isinstance(options.bits, str):
            if state.weight.shape[1] % SUPERBLOCK:
                bits, symmetric = _FALLBACKS[options.bits]
                return UniformGrid.fit(
                    state.weight,
                    bits=bits,
                    group_size=_FALLBACK_GROUP,
                    symmetric=symmetric,
                    clip="mse",
                    short_scales=True,
                )
            return SuperblockGrid.fit(
                state.weight,
                options.bits,
                importance=importance,
                zero=options.zero or state.pruned is not None,
            )
        return UniformGrid.fit(
            state.weight,
            bits=options.bits,
            group_size=options.group_for(state.weight.shape[1]),
            symmetric=options.symmetric,
            clip=options.clip,
            short_scales=options.scales == "float16",
        )

    def remarks_on(self, grid: Grid) -> tuple[str, ...]:
        """Return the note on a layer whose rows the superblocks of a K-quant do not divide."""
        if self.options.bits not in TYPES or isinstance(grid, SuperblockGrid):
            return ()
        return (
            f"{self.stage}: rows are no multiple of {SUPERBLOCK}, so it has {grid.bits} bits in "
            f"groups of {_FALLBACK_GROUP}",
        )


def _loses_zero(bits: int | str) -> bool:
    """Return whether zero is on the grid of such a layer only if it was pruned before."""
    return isinstance(bits, str) and bits in TYPES and TYPES[bits].affine
