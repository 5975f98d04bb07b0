"""Mixed precision: the bits of each layer from their effect, under a budget on the average.

Minimize `sum_g error_g(bits_g)` subject to `sum_g n_g bits_g <= bits * sum_g n_g`, a
multiple-choice knapsack solved exactly as an integer program. The error of a width is the relative
squared error of the output of the *block*, with that group alone quantized by the named method: the
error of a layer's own output does not say how much of the error reaches the residual stream. With
`error=loss` it is what the group adds to the loss, by the gradients that `ecsq` divides its rate
with: a block whose output matters more then counts for more. Layers that read the same input are
one group by default, since serving engines fuse them.

Where K-quants of llama.cpp are among the widths, bits are those that a weight takes in a GGUF file,
with its part of all scales. Of the uniform grids those of 4, 5 and 8 bits in groups of 32 have a
type there: Q4_0, Q5_0 and Q8_0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from optimum_order.backends.base import Allocator, Measured, option
from optimum_order.backends.uniform import group_size_option, scales_option
from optimum_order.errors import OrderError
from optimum_order.layers.grids.superblock_search import TYPES
from optimum_order.layers.statistics import Accumulator, Gram
from optimum_order.order import Stage, Value

_BLOCK = 32
"""Weights that share a scale in GGUF's types of uniform grids."""
_IN_GGUF = {bits: bits + 16 / _BLOCK for bits in (4, 5, 8)} | {
    name: kind.stored_bits for name, kind in TYPES.items()
}
"""Bits of a weight in a GGUF file, by width."""


def _is_widths(value: tuple[Any, ...]) -> bool:
    if any(isinstance(width, str) for width in value):
        widths = [_IN_GGUF[width] for width in value if width in _IN_GGUF]
    else:
        widths = [w for w in value if type(w) is int and 2 <= w <= 8]
    unlike = len(set(value)) == len(value)
    return unlike and len(widths) == len(value) > 0 and widths == sorted(widths)


@dataclasses.dataclass(frozen=True)
class MixedPrecisionOptions:
    """The budget and the choices."""

    bits: float = option(
        dataclasses.MISSING,
        "average bits per weight",
        check=lambda v: 2 <= v <= 8,
        allowed="a number in [2, 8]",
    )
    widths: tuple[int | str, ...] = option(
        (2, 3, 4, 6, 8),
        "widths a layer may have; with K-quants of llama.cpp among them, bits count scales too",
        check=_is_widths,
        allowed=f"a rising list of integers in 2..8, or of {', '.join(TYPES)}, 4, 5 and 8",
    )
    quantizer: str = option(
        "gptq",
        "the method that rounds",
        check=lambda v: v in ("gptq", "rtn"),
        allowed="gptq or rtn",
    )
    group_size: int | str = group_size_option()
    scales: str = scales_option()
    fuse: bool = option(
        True,
        "one width for layers that read the same input, such as q, k and v, and for all experts",
    )
    error: str = option(
        "block",
        "the error of a width: of the output of the block, or what is added to the loss",
        check=lambda v: v in ("block", "loss"),
        allowed="block or loss",
    )
    first: str = option(
        "together",
        "which layers are quantized first: together goes block by block, weaker starts with the "
        "widest, stronger with the narrowest",
        check=lambda v: v in ("together", "weaker", "stronger"),
        allowed="together, weaker or stronger",
    )

    @property
    def has_k_quants(self) -> bool:
        """Whether K-quants are among the widths."""
        return any(isinstance(width, str) for width in self.widths)


class MixedPrecision(Allocator):
    """Choose a width for each layer; the named quantizer rounds."""

    name = "mixed_precision"
    summary = "bits per layer under an average-bits budget, solved exactly, then gptq or rtn"
    Options = MixedPrecisionOptions
    options: MixedPrecisionOptions

    @classmethod
    def validate(cls, stage: Stage, options: MixedPrecisionOptions) -> MixedPrecisionOptions:
        first = options.widths[0]
        least = _IN_GGUF[first] if options.has_k_quants else float(first)
        if options.bits < least:
            raise OrderError(
                f"Stage '{stage}': 'bits' must be at least the smallest of its widths, "
                f"{least:g}, got {options.bits:g}."
            )
        if options.has_k_quants and options.group_size not in ("auto", _BLOCK):
            raise OrderError(
                f"Stage '{stage}': K-quants have blocks and scales of their own, and the widths "
                "beside them groups of 32; leave out 'group_size'."
            )
        if options.has_k_quants:  # what else could be said changes nothing
            return dataclasses.replace(options, group_size="auto", scales="auto")
        return options

    @property
    def fused(self) -> bool:
        return self.options.fuse

    @property
    def weighs_outputs(self) -> bool:
        return self.options.error == "loss"

    @property
    def uses(self) -> frozenset[type[Accumulator]]:
        return frozenset({Gram}) if self.weighs_outputs else frozenset()

    def candidates(self) -> list[Stage]:
        options = self.options
        shared: dict[str, Value] = {"group_size": options.group_size}
        if options.scales != "auto":
            shared["scales"] = options.scales
        if options.has_k_quants:
            shared = {"group_size": _BLOCK, "scales": "float16"}
        return [
            Stage(options.quantizer, bits=width, **({} if isinstance(width, str) else shared))
            for width in options.widths
        ]

    def allocate(self, table: list[Measured]) -> list[dict[str, Stage]]:
        stages = self.candidates()
        sizes = {row.layers: row.weights for row in table}
        groups = list(sizes)
        error = np.zeros((len(groups), len(stages)))
        bits = np.zeros((len(groups), len(stages)))
        for row in table:
            place = groups.index(row.layers), stages.index(row.stage)
            error[place] = row.error
            width = row.stored_bits if self.options.has_k_quants else row.bits
            bits[place] = width * row.weights
        chosen = self._solve(error, bits, self.options.bits * sum(sizes.values()))
        concrete = {
            layer: stages[choice]
            for group, choice in zip(groups, chosen, strict=True)
            for layer in group
        }
        if self.options.first == "together":
            return [concrete]
        used = [stage for stage in stages if stage in concrete.values()]
        if self.options.first == "weaker":
            used.reverse()
        return [
            {layer: choice for layer, choice in concrete.items() if choice == stage}
            for stage in used
        ]

    def _solve(self, error: Any, bits: Any, budget: float) -> Any:
        """Return the candidate of each group, (groups,) integers, with the least sum of errors.

        Args:
            error: (groups, candidates).
            bits: (groups, candidates), of all weights of a group together.
            budget: The most that the chosen bits may sum to.
        """
        groups, candidates = error.shape
        least = bits.min(1).sum()
        if least > budget * (1 + 1e-9):
            weights = budget / self.options.bits
            raise OrderError(
                f"Stage '{self.stage}': the narrowest widths take {least / weights:.4g} bits for "
                f"each weight of this model, more than 'bits', {self.options.bits:g}. Give as "
                "many, or narrower 'widths'."
            )
        one_each = np.kron(np.eye(groups), np.ones(candidates))  # (groups, groups * candidates)
        solution = milp(
            # the solver takes costs within 1e-6 of each other as equal
            error.ravel() / (error.max() or 1.0) * 1e6,
            integrality=np.ones(error.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(bits.ravel(), -math.inf, budget),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if not solution.success:
            raise OrderError(
                f"Stage '{self.stage}': no choice of widths meets the budget ({solution.message})."
            )
        return solution.x.reshape(groups, candidates).argmax(1)
