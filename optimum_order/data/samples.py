"""What a model is calibrated or measured on: windows of tokens, or images."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import DataError


class Samples(ABC):
    """A number of inputs that a model reads one by one, all of one shape."""

    source: str
    """Where they came from, as the user gave it; of a local path only its last part."""
    note: str
    """What a user should know about them, or ""."""
    unit: ClassVar[str]
    """What one of them is called."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of all that a model reads. This goes into a manifest, the data itself never does."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """In order, a forward's arguments for at most `batch_size` samples each, and their "labels" if known."""

    @abstractmethod
    def take(self, index: Tensor) -> Samples:
        """Those of an index (k,) int64, in its order."""

    def head(self, count: int) -> Samples:
        """The first `count` of them, or all there are."""
        return self if count >= len(self) else self.take(torch.arange(count))

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot read these.

        Raises:
            DataError: Saying what it can read.
        """


@dataclass(frozen=True, eq=False)
class Windows(Samples):
    """Windows of tokens, all of one length.

    Args:
        ids: (samples, length) int64.
        source: Where the text came from, as the user gave it; of a local path only the file's name.
        bytes: UTF-8 bytes of the text that the predicted tokens spell, which are all but the first of each window;
            None where it is not known.
        dropped: Tokens of the text that are in no window.
        note: What a user should know about them, or "".
    """

    ids: Tensor
    source: str
    bytes: int | None = None
    dropped: int = 0
    note: str = ""
    unit = "window"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all windows together."""
        return self.ids.numel()

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the ids and their shape."""
        return _digest(self.ids.numpy().astype("<i8"))

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for ids in self.ids.split(batch_size):
            yield {"input_ids": ids}

    def take(self, index: Tensor) -> Windows:
        return replace(self, ids=self.ids[index], bytes=None)

    def check(self, model: PreTrainedModel) -> None:
        if model.main_input_name != "input_ids":
            raise DataError(
                f"{type(model).__name__} reads '{model.main_input_name}', got {self.source}, which is text."
            )
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = self.ids.shape[1]
        if longest is not None and length > longest:
            raise DataError(
                f"{type(model).__name__} reads at most {longest} tokens at once, got windows of {length}. Use a "
                f"sequence length of at most {longest}."
            )
        embedding: Any = model.get_input_embeddings()
        known, largest = embedding.weight.shape[0], int(self.ids.max())
        if largest >= known:
            raise DataError(
                f"{type(model).__name__} knows tokens 0 to {known - 1}, got token {largest} from {self.source}. Use "
                "the tokenizer that belongs to the model."
            )


@dataclass(frozen=True, eq=False)
class Images(Samples):
    """Images as a model reads them, resized and normalised.

    Args:
        pixels: (samples, channels, height, width) float32.
        source: Where they came from, as the user gave it; of a local path only the folder's name.
        labels: (samples,) int64 class numbers of the model, or None.
        note: What a user should know about them, or "".
    """

    pixels: Tensor
    source: str
    labels: Tensor | None = None
    note: str = ""
    unit = "image"

    def __len__(self) -> int:
        return len(self.pixels)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the pixels, the labels and their shapes."""
        labels = [] if self.labels is None else [self.labels.numpy().astype("<i8")]
        return _digest(self.pixels.numpy().astype("<f4"), *labels)

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self), batch_size):
            batch = {"pixel_values": self.pixels[start : start + batch_size]}
            if self.labels is not None:
                batch["labels"] = self.labels[start : start + batch_size]
            yield batch

    def take(self, index: Tensor) -> Images:
        return replace(
            self,
            pixels=self.pixels[index],
            labels=None if self.labels is None else self.labels[index],
        )

    def check(self, model: PreTrainedModel) -> None:
        if model.main_input_name != "pixel_values":
            raise DataError(
                f"{type(model).__name__} reads '{model.main_input_name}', got {self.source}, which are images."
            )
        channels = getattr(model.config, "num_channels", None)
        if channels not in (None, self.pixels.shape[1]):
            raise DataError(
                f"{type(model).__name__} reads images of {channels} channels, got {self.pixels.shape[1]} from "
                f"{self.source}. Use the image processor that belongs to the model."
            )


def placed(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch on the model's device, and its pixels in the model's dtype, to which not every model casts them."""
    return {
        k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype)
        for k, v in batch.items()
    }


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{'x'.join(map(str, array.shape))}:".encode() + array.tobytes())
    return digest.hexdigest()
