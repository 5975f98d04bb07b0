"""Fidelity: how far a model's output distributions are from those of the original, in nats. It needs no labels.

    KL(p || q) = sum_k p_k (log p_k - log q_k),    p the original's distribution, q the compressed model's

A sample's score is the mean over its positions: every token of a window, the one answer of a classifier. It is 0
where both models say the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples
from optimum_order.errors import ModelError
from optimum_order.evaluation.base import Metric

_SLICE = (
    2**20
)  # logits taken to float64 at a time: small enough to stay in a cache, whatever the vocabulary
_NOT_ONE_CLASS = ("regression", "multi_label_classification")


class Fidelity(Metric):
    """Mean KL divergence of the original's output distributions to the model's; lower is better.

    A study measures many models against one original, so its logits are kept, batch by batch, and the original is
    run once only. It must not change meanwhile.

    Args:
        reference: The model before compression, in evaluation mode.
        cache_bytes: How much of its logits to keep; what does not fit is computed anew each time.
    """

    name = "fidelity"
    summary = "mean KL of the original's output distribution to the model's in nats, for any model with logits"
    higher_is_better = False
    needs_reference = True

    def __init__(self, reference: PreTrainedModel | None = None, *, cache_bytes: int = 2**30):
        super().__init__(reference)
        self.cache_bytes = cache_bytes
        self._cache: dict[bytes, Tensor] = {}

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if self.reference.training:
            raise ModelError(
                "Fidelity needs its reference in evaluation mode, it is in training mode: call .eval()."
            )
        for each in (self.reference, model):
            if each.config.is_encoder_decoder:
                raise ModelError(
                    f"Fidelity is for models that read one input, got {type(each).__name__}, whose decoder needs "
                    "another. Use a decoder-only or encoder-only model."
                )
            problem = getattr(each.config, "problem_type", None)
            if problem in _NOT_ONE_CLASS:
                raise ModelError(
                    f"Fidelity compares probabilities of classes of which one is true, got {type(each).__name__} with "
                    f"problem_type '{problem}'. Use another metric."
                )
            samples.check(each)

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        original, other = self._original(inputs), _logits(model, inputs)
        if original.shape != other.shape:
            raise ModelError(
                f"The original's logits have the shape {tuple(original.shape)}, those of the model to compare "
                f"{tuple(other.shape)}. Give as 'reference' the model that this one was made from."
            )
        return torch.stack(
            [_divergence(p.to(q.device), q) for p, q in zip(original, other, strict=True)]
        )

    def _original(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The original's logits, in the dtype they were computed in: they are exact, and in 16 bit half the size."""
        key = _digest(
            inputs
        )  # of the whole batch: other batches of the same samples round differently
        if key in self._cache:
            return self._cache[key]
        logits = _logits(self.reference, inputs)
        if sum(kept.nbytes for kept in self._cache.values()) + logits.nbytes <= self.cache_bytes:
            self._cache[key] = logits.cpu()
        return logits


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(b, positions, k), or (b, k) of a classifier of whole samples."""
    options = {"use_cache": False} if model.can_generate() else {}
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **options)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        found = (
            f"logits of the shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else "no logits"
        )
        raise ModelError(
            f"Fidelity compares distributions over tokens or classes, {type(model).__name__} computes {found}. Load "
            "the checkpoint with such a head: AutoModelForCausalLM, AutoModelForMaskedLM, "
            "AutoModelForSequenceClassification or AutoModelForImageClassification."
        )
    return logits


def _divergence(original: Tensor, other: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(original) || softmax(other)), in float64, a slice of positions at a time.

    Args:
        original: (positions, k) or (k,).
        other: Of the same shape.
    """
    total = torch.zeros((), dtype=torch.float64, device=other.device)
    original, other = original.reshape(-1, original.shape[-1]), other.reshape(-1, other.shape[-1])
    rows = max(1, _SLICE // original.shape[-1])
    for p, q in zip(original.split(rows), other.split(rows), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        # what the original rules out adds nothing, though both logarithms may be infinite there
        nats = (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0.0).sum(-1)
        total += nats.clamp(min=0).sum()  # rounding alone can make it negative
    return total / len(original)


def _digest(inputs: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        digest.update(
            f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode()
            + tensor.cpu().numpy().tobytes()
        )
    return digest.digest()
