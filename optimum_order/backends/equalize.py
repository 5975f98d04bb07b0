"""Equalize: let columns that read large inputs round more finely, for what others lose by it.

A column of a layer is multiplied by a power of two, and whatever makes the column's input, a norm's
gain or the rows of another layer, is divided by it. The model computes the same bits in float32 and
bfloat16; in float16 small products lose some, and the check on a batch decides. What changes is how
a quantizer that follows sees the weights: in a group that shares a scale, a larger column is
rounded by a smaller part of itself. The power of each column is that of its input's size to some
strength, and the strength of each input is the one at which rounding to nearest moves the outputs
of its layers least.

Source: Lin et al. 2024, arXiv 2306.00978 (AWQ), Eq. 4 and 5; here with powers of two, the root mean
square of an input as its size, and the error of the layers' outputs from the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimum_order.backends.base import Equalizer, option
from optimum_order.backends.rtn import RTN
from optimum_order.backends.uniform import group_size_option
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Stage

_STRENGTHS = torch.arange(1, 21) / 20
_MOST = 6
"""The largest exponent: columns further from the others than that hardly round better."""


@dataclass(frozen=True)
class EqualizeOptions:
    """The rounding that the columns are made ready for."""

    bits: int = option(
        4,
        "width of the integers that the layers are to be rounded to",
        check=lambda v: 2 <= v <= 8,
        allowed="from 2 to 8",
    )
    group_size: int | str = group_size_option()


class Equalize(Equalizer):
    """Multiply columns by a power of their inputs' size, as far as rounding gains by it."""

    name = "equalize"
    summary = "move powers of two between layers, so that columns with large inputs round finer"
    needs = frozenset({Gram})
    Options = EqualizeOptions
    options: EqualizeOptions

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self._rounding = RTN(
            Stage("rtn", bits=self.options.bits, group_size=self.options.group_size)
        )

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return self._rounding.check_shape(shape)

    def exponents(
        self, readers: Sequence[LayerState], statistics: Statistics, rows: Tensor
    ) -> Tensor:
        gram = statistics[Gram]  # (in, in)
        sizes = gram.diagonal().clamp(min=0).sqrt()
        shared = torch.zeros(int(rows.max()) + 1, device=sizes.device)
        sizes = shared.scatter_reduce(0, rows, sizes, "amax")[rows]
        logarithms = (sizes / sizes[sizes > 0].median()).log2() if sizes.any() else sizes
        logarithms = logarithms.clamp(-2 * _MOST, 2 * _MOST)  # -inf for inputs that are always zero
        best = torch.zeros(len(rows), dtype=torch.int8, device=sizes.device)
        least = self._error(readers, gram, best)
        for strength in _STRENGTHS:
            exponents = (strength * logarithms).round().clamp(-_MOST, _MOST).to(torch.int8)
            error = self._error(readers, gram, exponents)
            if error < least:
                best, least = exponents, error
        return best

    def _error(self, readers: Sequence[LayerState], gram: Tensor, exponents: Tensor) -> float:
        """Return the squared error of the outputs of some layers, rounded so; summed over tokens.

        Args:
            readers: Layers of one input.
            gram: (in, in), of that input.
            exponents: (in,) int8.
        """
        error = 0.0
        for state in readers:
            weight = torch.ldexp(state.weight, exponents.int())
            rounded = self._rounding.compress(replace(state, weight=weight), Statistics(0, {}))
            change = (torch.ldexp(rounded.weight, -exponents.int()) - state.weight).float()
            error += ((change @ gram) * change).sum().item()
        return error
