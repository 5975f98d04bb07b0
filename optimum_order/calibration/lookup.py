"""The statistics of an embedding: what a head that shares its weight reads, and white noise.

A token looks up a row of the embedding, so all errors of the row count alike, as with inputs that
are white noise. A head that is tied to the embedding multiplies the same rows with the last hidden
states, and most of the loss is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.data.samples import placed
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.models import hf
from optimum_order.models.units import Target

SAMPLES = 8
"""Calibration samples, or a few more, of which the inputs of a head are taken."""
_LOOKUPS = 0.2
"""Mean square of the white noise that stands for look-ups, over that of the inputs of the head. It
is the trace of the mean outer product of the loss's gradient by what is looked up, over that of the
head's inputs times the variance of a predicted token: 295 / (0.66 * 2053) on SmolLM2-135M."""


class _Stop(BaseException):
    """Ends a forward at the head; no model code catches it."""


def tied_head(model: PreTrainedModel, target: Target) -> nn.Module | None:
    """Return the output head that shares the weight of an embedding, or None.

    Args:
        model: The model.
        target: One of its layers.
    """
    head: nn.Module | None = model.get_output_embeddings()
    shares = head is not None and getattr(head, "weight", None) is target.parameter
    return head if shares and target.kind == "embedding" else None


def statistics_of(
    model: PreTrainedModel,
    target: Target,
    head: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    needs: Collection[type[Accumulator]],
    multiplying: Callable[[], Any],
    dtype: torch.dtype = torch.float32,
) -> Statistics:
    """Gather the statistics of an embedding that is tied to a head.

    Args:
        model: In evaluation mode; it is run as it is.
        target: The embedding.
        head: From `tied_head`.
        batches: Keyword arguments of the model's forward; the first are run.
        needs: The statistics.
        multiplying: Gives the context of the forwards.
        dtype: What products may round the inputs to, see `Accumulation`.
    """
    inputs = target.view.shape[1]
    sums = Accumulation(inputs, needs, model.device, dtype)
    squares = 0.0

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal squares
        rows = args[0].reshape(-1, inputs)
        sums.add(rows)
        squares += float(rows.float().square().sum())
        raise _Stop

    handle = head.register_forward_pre_hook(see)
    samples = 0
    try:
        with torch.inference_mode(), hf.eager_experts(model):
            for batch in batches:
                if samples >= SAMPLES:
                    break
                samples += len(next(iter(batch.values())))
                try:
                    with multiplying():
                        model(**placed(batch, model), **hf.uncached(model))
                except _Stop:
                    pass
    finally:
        handle.remove()
    tokens = sums.tokens
    if tokens:
        # as many rows as there are channels, of one entry each
        sums.add(torch.eye(inputs, device=model.device) * math.sqrt(_LOOKUPS * squares / inputs))
    return Statistics(tokens, sums.result().results)


def chances(logits: Tensor) -> Tensor:
    """Return the mean variance of each predicted token, p (1 - p), (vocabulary,) float32.

    It is the curvature of the loss by each logit.

    Args:
        logits: (..., vocabulary).
    """
    rows = logits.detach().reshape(-1, logits.shape[-1])
    total = torch.zeros(logits.shape[-1], device=logits.device)
    for part in rows.split(64):  # a vocabulary is large
        p = part.float().softmax(-1)
        total += (p - p.square()).sum(0)
    return total / len(rows)
