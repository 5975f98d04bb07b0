"""bitsandbytes: NF4 and FP4 in blocks (Dettmers et al. 2023, arXiv 2305.14314) and LLM.int8 rows (arXiv 2208.07339).

Needs no data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from optimum_order.backends.base import Backend, option
from optimum_order.errors import OrderError
from optimum_order.layers.grids.bitsandbytes import BLOCKSIZES, fit_blocks, fit_rows
from optimum_order.order import Stage

_TILE = 32
"""Outputs that the library's CPU kernel takes at a time; it cannot run a layer of any other number of them. Nor can
it one whose rows are not whole blocks, and decodes that one wrongly as well."""


@dataclass(frozen=True)
class BitsAndBytesOptions:
    """Which of the library's grids."""

    dtype: str = option(
        "nf4", "data type", check=lambda v: v in ("nf4", "fp4", "int8"), allowed="nf4, fp4 or int8"
    )
    blocksize: int = option(
        64,
        "weights that share a scale, 4 bit only",
        check=lambda v: v in BLOCKSIZES,
        allowed="one of " + ", ".join(map(str, BLOCKSIZES)),
    )
    double_quant: bool = option(False, "quantise the scales too, 4 bit only")


class BitsAndBytes(Backend):
    """Absmax scaling onto NF4, FP4 (blocks) or int8 (rows), the data types stock transformers reads."""

    name = "bitsandbytes"
    summary = "round with the bitsandbytes library: nf4, fp4 or int8"
    kind = "quantize"
    Options = BitsAndBytesOptions

    @classmethod
    def validate(cls, stage: Stage, options: BitsAndBytesOptions) -> BitsAndBytesOptions:
        if options.dtype == "int8" and (options.blocksize != 64 or options.double_quant):
            raise OrderError(
                f"Stage '{stage}': int8 has one scale for each row; 'blocksize' and 'double_quant' belong to nf4 and "
                "fp4. Leave them out."
            )
        return options

    @property
    def resolved(self):
        return {"dtype": "int8"} if self.options.dtype == "int8" else super().resolved

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self.options.dtype == "int8":
            return None
        outputs, inputs = shape
        if inputs % self.options.blocksize:
            fits = [str(size) for size in BLOCKSIZES if inputs % size == 0]
            advice = f"{' or '.join(fits)} does" if fits else "none does, int8 needs none"
            return (
                f"blocksize {self.options.blocksize} does not divide its {inputs} inputs; {advice}"
            )
        if outputs % _TILE:
            return f"the library's CPU kernel needs a multiple of {_TILE} outputs, it has {outputs}; int8 does not"
        return None

    def compress(self, state, statistics):
        options = self.options
        if options.dtype == "int8":
            grid, codes = fit_rows(state.weight)
        else:
            grid, codes = fit_blocks(
                state.weight, options.dtype, options.blocksize, options.double_quant
            )
        return dataclasses.replace(state, weight=grid.dequantize(codes), grid=grid)
