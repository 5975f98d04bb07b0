"""Remove whole blocks: each time the one whose absence changes the predictions least.

Source: Song et al. 2024 (SLEB), arXiv 2402.09025, algorithm 1, with the divergence from the model
before the stage in place of perplexity.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_order.backends.base import Remover, option
from optimum_order.errors import OrderError
from optimum_order.order import Stage

if TYPE_CHECKING:
    from optimum_order.models.architecture import Roles


@dataclass(frozen=True)
class DepthOptions:
    """How many blocks go."""

    blocks: int | None = option(
        None,
        "number of blocks removed; the first and the last stay",
        check=lambda v: v is not None and v > 0,
        allowed="a positive integer",
    )
    skip: tuple[int, ...] | int | None = option(
        None,
        "the blocks to remove, counted from 0, in place of a measurement",
        check=lambda v: (
            isinstance(v, int)
            or (
                len(v) > 0
                and len(set(v)) == len(v)
                and all(isinstance(index, int) and not isinstance(index, bool) for index in v)
            )
        ),
        allowed="a list of different block numbers such as [4, 11]",
    )


class Depth(Remover):
    """Remove blocks greedily, the model measured again after each."""

    name = "depth"
    summary = "remove the blocks that the predictions miss least"
    Options = DepthOptions
    options: DepthOptions

    @classmethod
    def validate(cls, stage: Stage, options: DepthOptions) -> DepthOptions:
        skip = (options.skip,) if isinstance(options.skip, int) else options.skip
        if options.blocks is None and skip is None:
            raise OrderError(
                f"Stage '{stage}' must give 'blocks', such as 'depth:2', or 'skip', such as "
                "'depth(skip=[4, 11])'."
            )
        if options.blocks is not None and skip is not None and options.blocks != len(skip):
            raise OrderError(
                f"Stage '{stage}': 'skip' names {len(skip)} blocks, and 'blocks' says "
                f"{options.blocks}: leave one of them out."
            )
        return options

    @property
    def forced(self) -> tuple[int, ...]:
        skip = self.options.skip
        return (skip,) if isinstance(skip, int) else skip or ()

    @property
    def needs_data(self) -> bool:
        return not self.forced

    def count(self, blocks: int) -> int:
        return len(self.forced) or self.options.blocks or 0

    def candidates(self, blocks: int, removed: Collection[int]) -> list[int]:
        return [index for index in range(1, blocks - 1) if index not in removed]

    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        blocks = len(roles.blocks)
        count = self.count(blocks)
        if count > blocks - 2:
            raise OrderError(
                f"Stage '{self.stage}' would remove {count} of {blocks} blocks, and the first and "
                f"the last stay: remove {max(blocks - 2, 0)} at most."
            )
        allowed = self.candidates(blocks, ())
        for index in self.forced:
            if index not in allowed:
                raise OrderError(
                    f"Stage '{self.stage}': block {index} cannot be removed. 'skip' names blocks "
                    f"from 1 to {blocks - 2}: the first and the last stay."
                )
        if (
            getattr(config, "mlp_only_layers", None)
            or getattr(config, "decoder_sparse_step", 1) > 1
        ):
            raise OrderError(
                f"Stage '{self.stage}': the config says by number which blocks have experts, and "
                "no other blocks can take these numbers. Models whose blocks are all alike can be "
                "made shorter."
            )
        return self.sizes_without(roles, config, self.forced or allowed[:count])
