"""Fidelity: the distance of a model's output distributions from the original's, in nats.

    KL(p || q) = sum_k p_k (log p_k - log q_k),    p the original's distribution, q the model's

A sample's score is the mean over its positions: every token of a window, the one answer of a
classifier. It is 0 where both models agree. It needs no labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, without_labels
from optimum_order.errors import ModelError
from optimum_order.evaluation.base import Metric

_SLICE = 2**20
"""Logits taken to float64 at a time: few enough to stay in a cache, for any vocabulary."""
_NOT_ONE_CLASS = ("regression", "multi_label_classification")


class Fidelity(Metric):
    """Mean KL divergence of the original's output distributions to the model's; lower is better.

    A study measures many models against one original, so the original's logits are cached, batch by
    batch, and the original runs only once. It must not change meanwhile.

    Args:
        reference: The model before compression, in evaluation mode.
        cache_bytes: Size of the cache. Logits beyond it are computed anew each time.

    Raises:
        ModelError: If the reference is missing.
    """

    name = "fidelity"
    summary = (
        "mean KL of the original's output distribution to the model's in nats, for any model with "
        "logits"
    )
    higher_is_better = False
    needs_reference = True

    def __init__(
        self, reference: PreTrainedModel | None = None, *, cache_bytes: int = 2**30
    ) -> None:
        super().__init__(reference)
        self._original = cast(PreTrainedModel, reference)
        self._cache_bytes = cache_bytes
        self._cache: dict[bytes, Tensor] = {}

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if self._original.training:
            raise ModelError(
                "Fidelity needs its reference in evaluation mode, it is in training mode: call "
                ".eval()."
            )
        for compared in (self._original, model):
            name = type(compared).__name__
            if compared.config.is_encoder_decoder:
                raise ModelError(
                    f"Fidelity is for models that read one input, got {name}, whose decoder needs "
                    "another. Use a decoder-only or encoder-only model."
                )
            problem = getattr(compared.config, "problem_type", None)
            if problem in _NOT_ONE_CLASS:
                raise ModelError(
                    "Fidelity compares probabilities of classes of which one is true, got "
                    f"{name} with problem_type '{problem}'. Use another metric."
                )
            samples.check(compared)

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = without_labels(batch)
        original = self._original_logits(inputs)
        logits = _logits(model, inputs)
        if original.shape != logits.shape:
            raise ModelError(
                f"The original's logits have the shape {tuple(original.shape)}, those of the model "
                f"to compare {tuple(logits.shape)}. Give as 'reference' the model that this one "
                "was made from."
            )
        return torch.stack(
            [_divergence(p.to(q.device), q) for p, q in zip(original, logits, strict=True)]
        )

    def _original_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the original's logits, in the dtype of its forward."""
        # the key is of a whole batch: the same samples round differently in other batches
        key = _digest(inputs)
        if key in self._cache:
            return self._cache[key]
        logits = _logits(self._original, inputs)
        cached = sum(tensor.nbytes for tensor in self._cache.values())
        if cached + logits.nbytes <= self._cache_bytes:
            self._cache[key] = logits.cpu()
        return logits


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a model's logits: (b, positions, k), or (b, k) of a classifier of whole samples."""
    options = {"use_cache": False} if model.can_generate() else {}
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **options)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1:
        return logits
    got = "no logits"
    if isinstance(logits, Tensor):
        got = f"logits of the shape {tuple(logits.shape)}"
    raise ModelError(
        f"Fidelity compares distributions over tokens or classes, {type(model).__name__} computes "
        f"{got}. Load the checkpoint with such a head: AutoModelForCausalLM, AutoModelForMaskedLM, "
        "AutoModelForSequenceClassification or AutoModelForImageClassification."
    )


def _divergence(original: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over positions of KL(softmax(original) || softmax(logits)), float64.

    Args:
        original: (positions, k) or (k,).
        logits: Of the same shape.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    original = original.reshape(-1, original.shape[-1])
    logits = logits.reshape(-1, logits.shape[-1])
    rows = max(1, _SLICE // original.shape[-1])
    for start in range(0, len(original), rows):
        p = original[start : start + rows].double().log_softmax(-1)
        q = logits[start : start + rows].double().log_softmax(-1)
        # a class that the original rules out adds nothing, even where both logarithms are infinite
        nats = (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0.0).sum(-1)
        total += nats.clamp(min=0).sum()  # rounding alone can make a divergence negative
    return total / len(original)


def _digest(inputs: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()
