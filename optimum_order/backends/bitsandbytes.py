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
from optimum_order.layers.grids.bitsandbytes import BLOCKSIZES, fit_blocks, fit_rows
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.order import Stage

_TILE = 32
"""Outputs that the library's CPU kernel takes at a time; it cannot run a layer of any other number
of outputs. Nor can it run a layer whose rows are not whole blocks, and decodes such a layer wrongly
as well."""


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
        if self.options.dtype == "int8":
            return None
        if inputs % size:
            sizes = [str(other) for other in BLOCKSIZES if inputs % other == 0]
            advice = f"{' or '.join(sizes)} does" if sizes else "none does, int8 needs none"
            return f"blocksize {size} does not divide its {inputs} inputs; {advice}"
        if outputs % _TILE:
            return (
                f"the library's CPU kernel needs a multiple of {_TILE} outputs, it has {outputs}; "
                "int8 does not"
            )
        return None

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        grid, codes = self._fit(state.weight)
        return dataclasses.replace(state, weight=grid.dequantize(codes), grid=grid)

    def _fit(self, weight: Tensor) -> tuple[Grid, Tensor]:
        options = self.options
        if options.dtype == "int8":
            return fit_rows(weight)
        return fit_blocks(weight, options.dtype, options.blocksize, options.double_quant)
