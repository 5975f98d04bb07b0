"""Watch the experts of mixtures: how much each adds to the tokens that are routed to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.calibration.ranks import Ranks
from optimum_order.layers.statistics import ExpertNorms, Statistics
from optimum_order.models.architecture import Block, Experts


@contextlib.contextmanager
def expert_norms(
    model: PreTrainedModel, blocks: Sequence[Block], ranks: Ranks, *, counts: bool = True
) -> Iterator[Callable[[str], Statistics]]:
    """While active, gather the norms of what experts add.

    Args:
        model: Runs its experts one at a time, see `hf.eager_experts`.
        blocks: The blocks; those without a mixture are passed over.
        ranks: The processes that share the samples.
        counts: Whether this rank has samples to count.

    Yields:
        Gives what all ranks have gathered for a router so far, by its name; to be called once for
        each, by all ranks.
    """
    sums: dict[str, tuple[ExpertNorms, list[int]]] = {}
    handles = []
    for block in blocks:
        mixture = block.mixture
        if mixture is None:
            continue
        module = mixture.experts[0].down.target(model).module
        sums[mixture.router.name] = (ExpertNorms(len(mixture.experts), model.device), [0])
        if counts:
            hook = _hook(mixture, *sums[mixture.router.name])
            handles.append(module.register_forward_pre_hook(hook))

    def gathered(router: str) -> Statistics:
        norms, (tokens,) = sums[router]
        ranks.merge(norms)
        return Statistics(ranks.total(tokens), {ExpertNorms: norms.result()})

    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()


def _hook(mixture: Experts, norms: ExpertNorms, tokens: list[int]) -> Callable[..., None]:
    """Return a hook of a module of fused experts, called with tokens, indices and weights."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x, index, weights = args
        rows = torch.zeros(len(x), len(mixture.experts), device=x.device)
        for expert in range(len(mixture.experts)):
            token, place = (index == expert).nonzero(as_tuple=True)
            if len(token):
                alone = index.new_full((len(token), 1), expert)
                rows[token, expert] = _norms(module, x[token], alone, weights[token, place, None])
        norms.update(rows.to(norms.device))
        tokens[0] += len(x)

    return hook


def _norms(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the norm of what experts add to each token, (tokens,)."""
    added: Tensor = module.forward(x, index, weights)  # not a call, which has hooks
    norms: Tensor = added.float().norm(dim=-1)
    return norms
