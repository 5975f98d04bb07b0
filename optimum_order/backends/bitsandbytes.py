"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8 rows. Needs no data.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3 (NF4, double quantization); Dettmers et
al. 2022, arXiv 2208.07339, section 3.1 (int8 rows).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimum_order.backends.base import Backend, option
from optimum_order.errors import OrderError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.grids.bitsandbytes import (
    BLOCKSIZES,
    computes_right,
    fit_blocks,
    fit_rows,
)
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.order import Stage

_TILE = 32
"""Outputs that the library's kernels for some processors take at a time."""


@dataclass(frozen=True)
class BitsAndBytesOptions:
    """The choice among the grids of the library."""

    dtype: str = option(
        "nf4", "data type", check=lambda v: v in ("nf4", "fp4", "int8"), allowed="nf4, fp4 or int8"
    )
    blocksize: int = option(
        64,
        "weights that share a scale, 4 bit only",
        check=lambda v: v in BLOCKSIZES,
        allowed="one of " + ", ".join(map(str, BLOCKSIZES)),
    )
    double_quant: bool = option(False, "quantize the scales too, 4 bit only")


class BitsAndBytes(Backend):
    """Absmax scaling onto NF4, FP4 (blocks) or int8 (rows), which stock transformers reads."""

    name = "bitsandbytes"
    summary = "round with the bitsandbytes library: nf4, fp4 or int8"
    kind = "quantize"
    Options = BitsAndBytesOptions
    options: BitsAndBytesOptions

    @classmethod
    def validate(cls, stage: Stage, options: BitsAndBytesOptions) -> BitsAndBytesOptions:
        if options.dtype == "int8" and (options.blocksize != 64 or options.double_quant):
            raise OrderError(
                f"Stage '{stage}': int8 has one scale for each row; 'blocksize' and 'double_quant' "
                "belong to nf4 and fp4. Leave them out."
            )
        return options

    @property
    def resolved(self) -> dict[str, Any]:
        values = super().resolved
        if self.options.dtype == "int8":
            del values["blocksize"], values["double_quant"]
        return values

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        outputs, inputs = shape
        size = self.options.blocksize
        if self.options.dtype == "int8" or (inputs % size == 0 and outputs % _TILE == 0):
            return None
        few = outputs % _TILE + _TILE
        if computes_right(few, inputs, self.options.dtype, size):
            return None
        advice = "int8 takes any shape"
        fitting = [str(other) for other in BLOCKSIZES if inputs % other == 0]
        if outputs % _TILE == 0 and fitting:
            advice = f"blocksize {' or '.join(fitting)} works, and {advice}"
        return (
            f"the library takes it on a GPU, but its kernels for this CPU do not compute "
            f"{outputs} x {inputs} in blocks of {size}; {advice}"
        )

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        grid, codes = self._fit(state.weight)
        return dataclasses.replace(state, weight=grid.dequantize(codes), grid=grid)

    def _fit(self, weight: Tensor) -> tuple[Grid, Tensor]:
        options = self.options
        if options.dtype == "int8":
            return fit_rows(weight)
        return fit_blocks(weight, options.dtype, options.blocksize, options.double_quant)
