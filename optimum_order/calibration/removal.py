"""How far a model is from itself without one of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from optimum_order.data.samples import placed
from optimum_order.layers.tree import tensors_in
from optimum_order.models import hf, precision
from optimum_order.models.architecture import Roles
from optimum_order.models.sizes import Structure, keep_blocks


@torch.inference_mode()
def losses_without(
    model: PreTrainedModel,
    roles: Roles,
    samples: Sequence[Mapping[str, Tensor]],
    removed: Sequence[int],
    candidates: Sequence[int],
) -> dict[int, float]:
    """Return how far a model is from itself without some blocks, and one more.

    What comes before the block that is left out is computed once.

    Args:
        model: In evaluation mode; in the end it is as it was.
        roles: Its roles.
        samples: Arguments of a forward, one sample each.
        removed: Blocks that are gone, counted from 0.
        candidates: Blocks of which each is left out in turn; never the first that remains.

    Returns:
        For each candidate the divergence of the predictions in nats a token, or the squared error
        of the output, relative to its size; the mean of the samples.
    """
    options = hf.uncached(model)
    structure = Structure(model)
    remaining = [index for index in range(len(roles.blocks)) if index not in removed]
    blocks = [model.get_submodule(roles.blocks[index].name) for index in remaining]
    losses = dict.fromkeys(candidates, 0.0)
    try:
        for sample in samples:
            arguments = {**placed(sample, model), **options}
            with precision.forwards(model.dtype, model.dtype, model.device):
                structure.restore()
                distance = _distance(model(**arguments))
                keep_blocks(model, roles, remaining)
                outputs: list[Any] = []
                with _recorded(blocks, outputs):
                    model(**arguments)
                for candidate in candidates:
                    place = remaining.index(candidate)
                    with _answered(blocks[: place + 1], outputs[place - 1]):
                        losses[candidate] += distance(model(**arguments)) / len(samples)
    finally:
        structure.restore()
    return losses


@contextlib.contextmanager
def _recorded(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Gather the outputs of blocks in the order in which these run."""
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _answered(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Have blocks give an output without a computation."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _distance(output: Any) -> Callable[[Any], float]:
    """Return a function that says how far another output is from this one."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1:
        expected = logits.flatten(0, -2).float().log_softmax(-1)

        def divergence(other: Any) -> float:
            predicted = other.logits.flatten(0, -2).float().log_softmax(-1)
            apart = functional.kl_div(predicted, expected, log_target=True, reduction="batchmean")
            return apart.item()

        return divergence
    tensor = next(t for t in tensors_in(output) if t.is_floating_point()).float()

    def squared_error(other: Any) -> float:
        apart = next(t for t in tensors_in(other) if t.is_floating_point()).float() - tensor
        return (apart.square().sum() / tensor.square().sum().clamp(min=1e-30)).item()

    return squared_error
