"""Samples that a model is calibrated or measured on: windows of tokens, or images."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import DataError
from optimum_order.models.rehearsal import stated_positions, table_positions

Purpose = Literal["calibration", "evaluation"]
"""The use of a source: many sources have one part for calibration and another for evaluation."""

_LABELS = "labels"
_TOKENS_PER_BATCH = 2048
"""A larger batch is no faster and takes more memory: glibc maps every piece over 32 MB anew."""
_PIXELS_PER_BATCH = 2**22
_IMAGES_PER_BATCH = 64


class MissingProcessorError(DataError):
    """Data that needs a tokenizer or an image processor, and there is none with the model."""


class Samples(ABC):
    """Inputs of one model, all of one shape, each of which the model reads on its own.

    A subclass gives its `tensors`; batches, digest and description follow from them.
    """

    largest_batch: int | None = None
    """The most samples that the model takes in one forward; None where any number will do."""

    source: str
    """The source as the user named it; only the last part of a local path."""
    note: str
    """A remark for the user, or ""."""
    unit: ClassVar[str]
    """The word for one sample."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The arguments of a forward over all samples, (samples, ...), and "labels" if known."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """The number of samples whose activations take some tens of megabytes."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """The size of the samples, as a manifest states it."""

    @abstractmethod
    def take(self, index: Tensor) -> Samples:
        """Return the samples of an index.

        Args:
            index: (k,) int64, in the order of the result.
        """

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot read the samples.

        Raises:
            DataError: If the model reads another kind, length, or range of inputs.
        """

    @property
    def tokens(self) -> int | None:
        """The number of tokens in all samples together; None for images."""
        return None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of everything a model reads. The manifest holds the digest, never the data."""
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            array = tensor.numpy().astype("<f4" if tensor.is_floating_point() else "<i8")
            digest.update(f"{'x'.join(map(str, array.shape))}:".encode() + array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield `tensors` in slices of at most `batch_size` samples, in order.

        No slice is larger than `largest_batch`.
        """
        if self.largest_batch is not None:
            batch_size = min(batch_size, self.largest_batch)
        for start in range(0, len(self), batch_size):
            stop = start + batch_size
            yield {name: tensor[start:stop] for name, tensor in self.tensors.items()}

    def inputs(self) -> list[dict[str, Tensor]]:
        """Return all batches as a walk reads them: the arguments of a forward, without labels."""
        return [without_labels(batch) for batch in self.batches(self.batch_size)]

    def describe(self) -> dict[str, Any]:
        """Return the entry of a manifest: source, sizes and digest, and no data."""
        about_size = {"source": self.source, "samples": len(self), **self.sizes}
        return about_size | {"digest": self.digest, "note": self.note}


@dataclass(frozen=True, eq=False)
class Windows(Samples):
    """Windows of tokens, all of one length.

    Args:
        ids: (samples, length) int64.
        source: The source as the user named it; only the file name of a local path.
        bytes: UTF-8 bytes that the predicted tokens spell, which are all but the first of each
            window; None if not known.
        dropped: Tokens of the text that are in no window.
        note: A remark for the user, or "".
        largest_batch: The most windows that the model takes in one forward, or None.
        decoder_start: The token that begins the input of a decoder, where the model has one beside
            its encoder. The decoder then reads the window itself, one token later: as in training
            to reproduce the window.
    """

    ids: Tensor
    source: str
    bytes: int | None = None
    dropped: int = 0
    note: str = ""
    largest_batch: int | None = None
    decoder_start: int | None = None
    unit = "window"

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self.decoder_start is None:
            return {"input_ids": self.ids}
        begin = torch.full((len(self.ids), 1), self.decoder_start)
        decoder = torch.cat([begin, self.ids[:, :-1]], dim=1)
        return {"input_ids": self.ids, "decoder_input_ids": decoder}

    @property
    def batch_size(self) -> int:
        return max(1, _TOKENS_PER_BATCH // self.ids.shape[1])

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def sizes(self) -> dict[str, Any]:
        return {"sequence_length": self.ids.shape[1], "tokens": self.tokens}

    def take(self, index: Tensor) -> Windows:
        return replace(self, ids=self.ids[index], bytes=None)

    def check(self, model: PreTrainedModel) -> None:
        _check_input(model, "input_ids", f"{self.source}, which is text")
        name = type(model).__name__
        limits = filter(None, (stated_positions(model), table_positions(model)))
        longest = min(limits, default=None)
        length = self.ids.shape[1]
        if longest is not None and length > longest:
            raise DataError(
                f"{name} reads at most {longest} tokens at once, got windows of {length}. Use a "
                f"sequence length of at most {longest}."
            )
        check_tokens(model, self.ids, self.source)


@dataclass(frozen=True, eq=False)
class Images(Samples):
    """Images as a model reads them, resized and normalized.

    Args:
        pixels: (samples, channels, height, width) float32.
        source: The source as the user named it; only the folder name of a local path.
        labels: (samples,) int64 class numbers of the model, or None.
        note: A remark for the user, or "".
        largest_batch: The most images that the model takes in one forward, or None.
    """

    pixels: Tensor
    source: str
    labels: Tensor | None = None
    note: str = ""
    largest_batch: int | None = None
    unit = "image"

    @property
    def tensors(self) -> dict[str, Tensor]:
        labels = {} if self.labels is None else {_LABELS: self.labels}
        return {"pixel_values": self.pixels, **labels}

    @property
    def batch_size(self) -> int:
        return max(1, min(_IMAGES_PER_BATCH, _PIXELS_PER_BATCH // self.pixels[0].numel()))

    @property
    def sizes(self) -> dict[str, Any]:
        return {"image_shape": list(self.pixels.shape[1:])}

    def take(self, index: Tensor) -> Images:
        labels = None if self.labels is None else self.labels[index]
        return replace(self, pixels=self.pixels[index], labels=labels)

    def check(self, model: PreTrainedModel) -> None:
        _check_input(model, "pixel_values", f"{self.source}, which are images")
        channels = getattr(model.config, "num_channels", None)
        if channels not in (None, self.pixels.shape[1]):
            raise DataError(
                f"{type(model).__name__} reads images of {channels} channels, got "
                f"{self.pixels.shape[1]} from {self.source}. Use the image processor that belongs "
                "to the model."
            )


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of a forward alone: with labels a model would compute a loss."""
    return {name: tensor for name, tensor in batch.items() if name != _LABELS}


def placed(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch on the model's device, with pixels in the model's dtype.

    Not every model casts its pixels.

    Args:
        batch: The arguments of a forward.
        model: The model that is to read them.
    """
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
    }


def check_tokens(model: PreTrainedModel, ids: Tensor, source: str) -> None:
    """Refuse tokens for which a model has no embedding.

    Args:
        model: The model, on any device.
        ids: Token ids of any shape.
        source: The name of the source of the ids.

    Raises:
        DataError: If an id is negative, or beyond the last row of the embedding.
    """
    try:
        table: Any = model.get_input_embeddings()
        vocabulary = table.weight.shape[0]
    except (NotImplementedError, AttributeError):
        return  # a model with several vocabularies, or with none
    for token in (int(ids.max()), int(ids.min())):
        if not 0 <= token < vocabulary:
            raise DataError(
                f"{type(model).__name__} knows tokens 0 to {vocabulary - 1}, got token {token} "
                f"from {source}. Use the tokenizer that belongs to the model, or give the model "
                "rows for all its tokens: model.resize_token_embeddings(len(tokenizer))."
            )


def _check_input(model: PreTrainedModel, name: str, samples: str) -> None:
    if model.main_input_name != name:
        raise DataError(
            f"{type(model).__name__} reads '{model.main_input_name}', got {samples}. Give data of "
            "the kind that the model reads."
        )
