"""Remove experts of a mixture: those whose weighted outputs are smallest where they are used.

Source: Lasby et al. 2025 (REAP), arXiv 2510.13999, equation 9: the router's weight times the norm
of the expert's output, the mean of the tokens that are routed to the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any

from optimum_order.backends.base import Cut, Reshaper, option
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import ExpertNorms, SquaredNorms, Statistics

if TYPE_CHECKING:
    from optimum_order.models.architecture import Block, Layer, Roles


@dataclass(frozen=True)
class ExpertsOptions:
    """How many experts go."""

    ratio: float = option(
        MISSING,
        "fraction removed",
        check=lambda v: 0 < v < 1,
        allowed="a number in (0, 1)",
    )


class PruneExperts(Reshaper):
    """Remove the experts that add least, the same number in each block, with the router's rows."""

    name = "experts"
    summary = "remove the experts of a mixture that add least"
    needs = frozenset({SquaredNorms})
    slices = False
    weighs_experts = True
    Options = ExpertsOptions
    options: ExpertsOptions

    def remaining(self, experts: int) -> int:
        """Return the number of experts that remain of `experts`."""
        return round(experts * (1 - self.options.ratio))

    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        field = roles.fields.experts
        mixtures = [block.mixture for block in roles.blocks if block.mixture]
        if field is None or not mixtures:
            raise OrderError(
                f"Stage '{self.stage}' removes experts, and this model of type '{roles.family}' "
                "has none: width:0.2 removes channels of its MLPs."
            )
        experts = len(mixtures[0].experts)
        count = self.remaining(experts)
        routed = getattr(config, "num_experts_per_tok", 1)
        if not routed <= count < experts:
            raise OrderError(
                f"Stage '{self.stage}' would leave {count} of {experts} experts, and a token is "
                f"routed to {routed}: leave {routed} to {experts - 1}."
            )
        return {field: count}

    def reads(self, block: Block) -> tuple[Layer, ...]:
        return () if block.mixture is None else (block.mixture.router,)

    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        if block.mixture is None:
            return []
        router = block.mixture.router.name
        norms = statistics[router][ExpertNorms]
        chosen = norms.topk(self.remaining(len(norms))).indices.sort().values
        return [Cut(router, 0, chosen)]
