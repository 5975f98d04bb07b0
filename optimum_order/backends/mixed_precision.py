"""Mixed precision: the bits of each layer from their effect, under a budget on the average.

Minimize `sum_g error_g(bits_g)` subject to `sum_g n_g bits_g <= bits * sum_g n_g`, a
multiple-choice knapsack solved exactly as an integer program. The error of a width is the relative
squared error of the output of the *block*, with that group alone quantized by the named method: the
error of a layer's own output does not say how much of the error reaches the residual stream. With
`error=loss` it is what the group adds to the loss, by the gradients that `ecsq` divides its rate
with: a block whose output matters more then counts for more. Layers that read the same input are
one group by default, since serving engines fuse them.
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
from optimum_order.layers.statistics import Accumulator, Gram
from optimum_order.order import Stage, Value


def _is_widths(value: tuple[Any, ...]) -> bool:
    widths = [v for v in value if isinstance(v, int) and not isinstance(v, bool) and 2 <= v <= 8]
    return len(widths) == len(value) > 0 and list(value) == sorted(set(value))


@dataclasses.dataclass(frozen=True)
class MixedPrecisionOptions:
    """The budget and the choices."""

    bits: float = option(
        dataclasses.MISSING,
        "average bits per weight",
        check=lambda v: 2 <= v <= 8,
        allowed="a number in [2, 8]",
    )
    widths: tuple[int, ...] = option(
        (2, 3, 4, 6, 8),
        "widths a layer may have",
        check=_is_widths,
        allowed="a rising list of integers in 2..8",
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


class MixedPrecision(Allocator):
    """Choose a width for each layer; the named quantizer rounds."""

    name = "mixed_precision"
    summary = "bits per layer under an average-bits budget, solved exactly, then gptq or rtn"
    Options = MixedPrecisionOptions
    options: MixedPrecisionOptions

    @classmethod
    def validate(cls, stage: Stage, options: MixedPrecisionOptions) -> MixedPrecisionOptions:
        if options.bits < options.widths[0]:
            raise OrderError(
                f"Stage '{stage}': 'bits' must be at least the smallest of its widths, "
                f"{options.widths[0]}, got {options.bits:g}."
            )
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
        return [Stage(options.quantizer, bits=width, **shared) for width in options.widths]

    def allocate(self, table: list[Measured]) -> list[dict[str, Stage]]:
        stages = self.candidates()
        sizes = {row.layers: row.weights for row in table}
        groups = list(sizes)
        error = np.zeros((len(groups), len(stages)))
        bits = np.zeros((len(groups), len(stages)))
        for row in table:
            place = groups.index(row.layers), stages.index(row.stage)
            error[place] = row.error
            bits[place] = row.bits * row.weights
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
