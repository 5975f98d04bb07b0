"""Fidelity: the distance of a model's output distributions from the original's, in nats.

    KL(p || q) = sum_k p_k (log p_k - log q_k),    p the original's distribution, q the model's

A sample's score is the mean over its positions: every token of a window, the one answer of a
classifier, every token of what an encoder-decoder says. It is 0 where both models agree. It needs
no labels: the decoder of both models reads what the original says, its likeliest token after each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.fit import decoder_start
from optimum_order.data.samples import Samples, without_labels
from optimum_order.errors import ModelError
from optimum_order.evaluation.base import Metric
from optimum_order.models.rehearsal import takes

_SLICE = 2**20
"""Logits taken to float64 at a time: few enough to stay in a cache, for any vocabulary."""
_SAID = 64
"""The most tokens that an encoder-decoder says of a sample."""
_NOT_ONE_CLASS = ("regression", "multi_label_classification")


@dataclass(frozen=True)
class _Answer:
    """What the original says of a batch.

    Args:
        logits: (b, positions, k), or (b, k) of a classifier of whole samples.
        decoder_ids: (b, positions) that the decoder reads; None without encoder.
        lengths: (b,) the positions of each sample that count; None where all do.
    """

    logits: Tensor
    decoder_ids: Tensor | None = None
    lengths: Tensor | None = None


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
        self._cache: dict[bytes, _Answer] = {}

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether the model says something of what its encoder reads."""
        return bool(model.config.is_encoder_decoder and model.can_generate())

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if self._original.training:
            raise ModelError(
                "Fidelity needs its reference in evaluation mode, it is in training mode: call "
                ".eval()."
            )
        for compared in (self._original, model):
            name = type(compared).__name__
            if compared.config.is_encoder_decoder and not compared.can_generate():
                raise ModelError(
                    f"Fidelity compares what models say, and {name} has no head that says "
                    "anything. Load the checkpoint with one, such as AutoModelForSeq2SeqLM."
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
        answer = self._answer(inputs)
        original = answer.logits
        logits = _logits(model, _with_decoder(inputs, answer.decoder_ids))
        if original.shape != logits.shape:
            raise ModelError(
                f"The original's logits have the shape {tuple(original.shape)}, those of the model "
                f"to compare {tuple(logits.shape)}. Give as 'reference' the model that this one "
                "was made from."
            )
        lengths = [None] * len(logits) if answer.lengths is None else answer.lengths.tolist()
        return torch.stack(
            [
                _divergence(p[:length].to(q.device), q[:length])
                for p, q, length in zip(original, logits, lengths, strict=True)
            ]
        )

    def _answer(self, inputs: Mapping[str, Tensor]) -> _Answer:
        """Return what the original says, its logits in the dtype of its forward."""
        # the key is of a whole batch: the same samples round differently in other batches
        key = _digest(inputs)
        if key in self._cache:
            return self._cache[key]
        ids = lengths = None
        if self._original.config.is_encoder_decoder:
            ids, lengths = _said(self._original, inputs)
        logits = _logits(self._original, _with_decoder(inputs, ids))
        answer = _Answer(logits, ids, lengths)
        cached = sum(answer.logits.nbytes for answer in self._cache.values())
        if cached + logits.nbytes <= self._cache_bytes:
            self._cache[key] = _Answer(logits.cpu(), ids, lengths)
        return answer


def _with_decoder(inputs: Mapping[str, Tensor], ids: Tensor | None) -> dict[str, Tensor]:
    """Return the arguments of a forward whose decoder reads some tokens."""
    if ids is None:
        return dict(inputs)
    return _of_encoder(inputs) | {"decoder_input_ids": ids}


def _of_encoder(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}


def _said(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what an encoder-decoder says, its likeliest token after each.

    Args:
        model: The model.
        inputs: The arguments of its forward.

    Returns:
        What the decoder reads when it says so, (b, positions) int64, and the positions up to the
        one that ends the answer, (b,).
    """
    encoder: Any = model.get_encoder()
    arguments = {name: tensor.to(model.device) for name, tensor in _of_encoder(inputs).items()}
    mask = {name: arguments[name] for name in arguments.keys() & {"attention_mask"}}
    outputs = encoder(**arguments, return_dict=True)
    count = len(next(iter(arguments.values())))
    ids = torch.full((count, 1), decoder_start(model) or 0, device=model.device)
    ended = torch.zeros(count, dtype=torch.bool, device=model.device)
    lengths = torch.zeros(count, dtype=torch.int64, device=model.device)
    ends = torch.tensor(_ends(model), dtype=torch.int64, device=model.device)
    # newer versions of transformers call the argument "cache"
    cache = "cache" if "cache" in takes(model) else "past_key_values"
    most = min([_SAID, *_positions(model)])
    step: Tensor = ids
    past = None
    while True:
        lengths += ~ended
        cached = {cache: past, "use_cache": True}
        forward = model(encoder_outputs=outputs, decoder_input_ids=step, **cached, **mask)
        token = forward.logits[:, -1].argmax(-1, keepdim=True)
        ended |= torch.isin(token[:, 0], ends)
        if ended.all() or ids.shape[1] == most:
            return ids, lengths
        ids = torch.cat([ids, token], dim=1)
        past = getattr(forward, cache, None)
        step = ids if past is None else token


def _positions(model: PreTrainedModel) -> list[int]:
    """Return the most tokens that the decoder reads, by each field of the config that says so."""
    config = model.config.get_text_config(decoder=True)
    fields = ("max_target_positions", "max_position_embeddings")
    sizes = [getattr(config, field, None) for field in fields]
    return [size for size in sizes if isinstance(size, int) and size > 0]


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end an answer."""
    for settings in (getattr(model, "generation_config", None), model.config):
        ends = getattr(settings, "eos_token_id", None)
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


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
