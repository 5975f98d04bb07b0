"""Embedding: how far the vectors that a model gives to texts are from the original's.

    1 - cos(e, f) = 1 - e . f / (||e|| ||f||),    e the original's vector of a text, f the model's

A text's vector is the mean of its last hidden states, padding left out, as sentence-transformers
pools by default. Search and clustering compare vectors by their angles, so lengths do not count.

Source: Reimers & Gurevych 2019, arXiv 1908.10084 (mean pooling, cosine similarity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, without_labels
from optimum_order.errors import ModelError
from optimum_order.evaluation.base import Metric
from optimum_order.models import hf


class Embedding(Metric):
    """Mean cosine distance of a model's vectors to the original's; lower is better.

    Args:
        reference: The model before compression, in evaluation mode.

    Raises:
        ModelError: If the reference is missing.
    """

    name = "embedding"
    summary = "mean cosine distance of mean-pooled vectors to the original's, for encoders"
    higher_is_better = False
    needs_reference = True
    bounds = (-2.0, 0.0)

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether the model reads texts and has no head that says anything of them."""
        config = model.config
        if model.main_input_name != "input_ids" or config.is_encoder_decoder or config.sub_configs:
            return False
        classes = [
            hf.auto_classes()[name].get(config.model_type, ())
            for name in ("AutoModel", "AutoModelForTextEncoding")
        ]
        return any(type(model).__name__ in names for names in classes)

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        for compared in (cast(PreTrainedModel, self.reference), model):
            if compared.config.is_encoder_decoder:
                raise ModelError(
                    "The metric 'embedding' is for models that read one input, got "
                    f"{type(compared).__name__}, whose decoder needs another."
                )
            samples.check(compared)

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = without_labels(batch)
        original = vectors(cast(PreTrainedModel, self.reference), inputs)
        own = vectors(model, inputs).to(original.device)
        if own.shape != original.shape:
            raise ModelError(
                f"The original's vectors have {original.shape[1]} entries, those of the model to "
                f"compare {own.shape[1]}. Give as 'reference' the model that this one was made "
                "from."
            )
        # half the squared distance of unit vectors is 1 - cos, without its cancellation
        return (normalize(original) - normalize(own)).square().sum(1) / 2


def vectors(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the vector of each text, (b, width) float64.

    Args:
        model: In evaluation mode.
        inputs: Arguments of its forward.

    Raises:
        ModelError: If the model computes no hidden states.
    """
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    states = getattr(model(**placed, **hf.uncached(model)), "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise ModelError(
            f"The metric 'embedding' pools the last hidden states of an encoder, and "
            f"{type(model).__name__} returns none. Load the checkpoint with AutoModel."
        )
    states = states.double()
    mask = placed.get("attention_mask")
    if mask is None:
        return states.mean(1)
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1)
