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


class Perplexity(Metric):
    """Perplexity of a causal language model; lower is better."""

    name = "perplexity"
    summary = "exp of the mean negative log-likelihood per token, for causal language models"
    higher_is_better = False

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether the model is a causal language model."""
        return bool(model.can_generate() and not model.config.is_encoder_decoder)

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
