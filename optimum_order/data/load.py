"""Samples of the kind that a model reads: windows of text, or images."""

from __future__ import annotations

from typing import Any, Protocol

from optimum_order.data import images
from optimum_order.data import text as data
from optimum_order.data.samples import Images, Samples

_TOKENS_PER_BATCH = 2048
"""More are no faster, but take more memory, of which pieces over 32 MB are new to the process each time."""
_PIXELS_PER_BATCH = 2**22
_IMAGES_PER_BATCH = 64


class Reader(Protocol):
    """A model, or what is known about one that has not been loaded."""

    @property
    def config(self) -> Any: ...

    @property
    def main_input_name(self) -> str: ...


def samples_for(
    reader: Reader,
    source: Any,
    processor: Any,
    *,
    samples: int | None,
    length: int,
    seed: int = 0,
    purpose: data.Purpose = "calibration",
    draw: int = 0,
) -> Samples:
    """Images for a model whose main input is "pixel_values", windows of text for any other.

    Args:
        reader: The model, or where it comes from.
        source, processor, samples, seed, purpose, draw: As `data.load` and `images.load` take them.
        length: Tokens in a window of text.

    Raises:
        DataError: If the source cannot be read, or has too little.
    """
    if reader.main_input_name == "pixel_values":
        options: dict[str, Any] = {
            "samples": samples,
            "seed": seed,
            "purpose": purpose,
            "draw": draw,
        }
        return images.load(source, processor, reader.config, **options)
    return data.load(
        source, processor, samples=samples, length=length, seed=seed, purpose=purpose, draw=draw
    )


def batch_size(samples: Samples) -> int:
    """How many samples are run at a time, so that a batch of any kind takes some tens of megabytes."""
    if isinstance(samples, Images):
        return max(1, min(_IMAGES_PER_BATCH, _PIXELS_PER_BATCH // samples.pixels[0].numel()))
    return max(1, _TOKENS_PER_BATCH // samples.ids.shape[1])


def inputs(samples: Samples) -> list[dict[str, Any]]:
    """All batches of samples as a walk takes them: the arguments of a forward, without labels."""
    batches = samples.batches(batch_size(samples))
    return [
        {name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches
    ]
