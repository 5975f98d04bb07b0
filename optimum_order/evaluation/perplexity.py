"""Perplexity: the exponential of the mean negative log-likelihood, in nats per predicted token.

Over windows x^1 .. x^n of T tokens, each read on its own,

    log PPL = -1 / (n (T - 1)) * sum_i sum_{t=2..T} log p(x^i_t | x^i_1 .. x^i_{t-1})

The first token of a window is only read: BOS where the tokenizer has one. The standard error is
that of log PPL over windows. Bits per byte are the same likelihood, independent of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, Windows
from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation.base import Metric

_LARGEST = 700.0  # exp of more is no float64
_FEW = 16
"""Tokens by which a model is seen to look ahead."""
_MOVED = 1e-5
"""Relative change of a logit vector that no rounding makes at every position at once."""


class Perplexity(Metric):
    """Perplexity of a causal language model; lower is better."""

    name = "perplexity"
    summary = "exp of the mean negative log-likelihood per token, for causal language models"
    higher_is_better = False

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether the model is a causal language model."""
        if not model.can_generate() or model.config.is_encoder_decoder:
            return False
        return _causal_flags(model) != {False}

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if not self.is_usual(model):
            raise ModelError(
                "Perplexity is for causal language models, such as LlamaForCausalLM; "
                f"{type(model).__name__} has no causal language-model head. Load the checkpoint as "
                "one, or leave the evaluation out."
            )
        if not isinstance(samples, Windows):
            raise DataError(
                f"Perplexity is measured on text, got {samples.source}, which are {samples.unit}s. "
                "Give text or token ids."
            )
        super().check(model, samples)
        shapes_only = model.device.type == "meta"
        if not (_causal_flags(model) or shapes_only) and _looks_ahead(
            model, samples.ids[:1, :_FEW]
        ):
            raise ModelError(
                f"Perplexity is for causal language models; {type(model).__name__} reads the "
                "tokens that it would have to predict. Use another metric, such as fidelity."
            )

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        # one window at a time: float32 logits of a large vocabulary are the peak of memory
        nats = [
            functional.cross_entropy(window[:-1].float(), targets[1:])
            for window, targets in zip(logits, ids, strict=True)
        ]
        return torch.stack(nats)

    def value(self, mean: float) -> float:
        if mean > _LARGEST:
            raise ModelError(
                f"The mean negative log-likelihood is {mean:g} nats per token, so there is no "
                "finite perplexity: the model is broken. Use a milder compression."
            )
        return math.exp(mean)

    def details(self, mean: float, samples: Samples) -> dict[str, float]:
        figures = {"log_perplexity": mean}
        if isinstance(samples, Windows) and samples.bytes:
            predicted = samples.tokens - len(samples)
            figures["bits_per_byte"] = mean * predicted / math.log(2) / samples.bytes
        return figures


def _causal_flags(model: PreTrainedModel) -> set[bool]:
    """Return what the attentions of a model say of themselves; nothing where they say nothing.

    BERT with a causal head, for example, is causal only as a decoder.
    """
    flags = {getattr(module, "is_causal", None) for module in model.modules()}
    return {flag for flag in flags if isinstance(flag, bool)}


@torch.inference_mode()
def _looks_ahead(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether the logits of every position depend on the last token.

    Args:
        model: The model; its mode is restored.
        ids: (1, tokens).
    """
    if ids.shape[1] < 2:
        return False
    others = ids.clone()
    others[0, -1] = others[0, -1] - 1 if others[0, -1] > 0 else 1
    training = model.training
    model.train(False)
    try:
        before, after = (
            model(input_ids=tokens.to(model.device), use_cache=False).logits[0, :-1].float()
            for tokens in (ids, others)
        )
    finally:
        model.train(training)
    return bool(((before - after).norm(dim=-1) > _MOVED * before.norm(dim=-1)).all())
