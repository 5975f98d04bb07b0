"""Mixed precision: the bits of each layer from what they cost it, under a budget on the average.

Minimise `sum_l error_l(bits_l)` subject to `sum_l n_l bits_l <= bits * sum_l n_l`, a multiple-choice knapsack
solved exactly as an integer programme. The error of a width is the relative squared error of the layer's output
under the named quantiser, `tr(dW H dW^T) / tr(W H W^T)`, each layer alone; layers that read the same input get
the same width, since serving engines fuse them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from optimum_order.backends.base import Allocator, Measured, option
from optimum_order.errors import OrderError
from optimum_order.order import Stage


def _is_widths(value: tuple) -> bool:
    widths = [v for v in value if isinstance(v, int) and not isinstance(v, bool) and 2 <= v <= 8]
    return len(widths) == len(value) > 0 and list(value) == sorted(set(value))


@dataclasses.dataclass(frozen=True)
class MixedPrecisionOptions:
    bits: float = option(
        dataclasses.MISSING, "average bits per weight", check=lambda v: 2 <= v <= 8, allowed="a number in [2, 8]"
    )
    widths: tuple = option(
        (2, 3, 4, 6, 8), "widths a layer may have", check=_is_widths, allowed="a rising list of integers in 2..8"
    )
    quantizer: str = option(
        "gptq", "the method that rounds", check=lambda v: v in ("gptq", "rtn"), allowed="gptq or rtn"
    )
    group_size: int | str = option(
        "auto",
        "inputs that share a scale",
        check=lambda v: v in ("auto", -1) or (isinstance(v, int) and v > 0),
        allowed="auto, -1 for the whole row, or a positive integer",
    )
    fuse: bool = option(True, "one width for layers that read the same input, such as q, k and v")
    first: str = option(
        "together",
        "which layers are quantised first: together goes block by block, weaker starts with the widest, stronger "
        "with the narrowest",
        check=lambda v: v in ("together", "weaker", "stronger"),
        allowed="together, weaker or stronger",
    )


class MixedPrecision(Allocator):
    """Chooses a width per layer; the rounding itself is the named quantiser's."""

    name = "mixed_precision"
    summary = "bits per layer under an average-bits budget, solved exactly, then gptq or rtn"
    Options = MixedPrecisionOptions

    @classmethod
    def validate(cls, stage: Stage, options: MixedPrecisionOptions) -> MixedPrecisionOptions:
        if options.bits < options.widths[0]:
            raise OrderError(
                f"Stage '{stage}': 'bits' must be at least the smallest of its widths, {options.widths[0]}, got "
                f"{options.bits:g}."
            )
        return options

    def candidates(self) -> list[Stage]:
        options = self.options
        return [Stage(options.quantizer, bits=width, group_size=options.group_size) for width in options.widths]

    def allocate(self, table: list[Measured]) -> list[dict[str, Stage]]:
        group_of = {row.layer: row.group if self.options.fuse else row.layer for row in table}
        groups = sorted(set(group_of.values()))
        stages = self.candidates()
        weights = {layer: row.weights for row in table for layer in [row.layer]}
        place = {
            (group, stage): g * len(stages) + s for g, group in enumerate(groups) for s, stage in enumerate(stages)
        }
        error, size = np.zeros(len(place)), np.zeros(len(place))
        for row in table:
            error[place[group_of[row.layer], row.stage]] += row.error
            size[place[group_of[row.layer], row.stage]] += row.bits * row.weights
        one_each = np.kron(np.eye(len(groups)), np.ones(len(stages)))
        budget = self.options.bits * sum(weights.values())
        solved = milp(
            error,
            integrality=np.ones(len(place)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -math.inf, budget * (1 + 1e-9))],
            options={"mip_rel_gap": 0.0},
        )
        if not solved.success:
            raise OrderError(f"Stage '{self.stage}': no choice of widths meets the budget ({solved.message}).")
        chosen = solved.x.reshape(len(groups), len(stages)).argmax(1)
        stage_of = dict(zip(groups, (stages[s] for s in chosen), strict=True))
        concrete = {layer: stage_of[group] for layer, group in group_of.items()}
        if self.options.first == "together":
            return [concrete]
        used = [stage for stage in stages if stage in concrete.values()]
        if self.options.first == "weaker":
            used.reverse()
        return [{layer: stage for layer, stage in concrete.items() if stage == each} for each in used]
