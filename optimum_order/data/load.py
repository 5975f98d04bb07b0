"""Loading samples of the kind that a model reads: text, images, sounds or tensors."""

from __future__ import annotations

from typing import Any, Protocol

from optimum_order.data import arguments, audio, images, text
from optimum_order.data.draws import spread
from optimum_order.data.samples import MissingProcessorError, Purpose, Samples
from optimum_order.errors import ModelError


class Reader(Protocol):
    """A model with its processor, loaded or not."""

    @property
    def processor(self) -> Any: ...

    @property
    def processor_error(self) -> ModelError | None: ...

    @property
    def config(self) -> Any: ...

    @property
    def main_input_name(self) -> str: ...


def load_samples(
    reader: Reader,
    source: Any,
    *,
    samples: int | None,
    length: int,
    seed: int = 0,
    purpose: Purpose = "calibration",
) -> Samples:
    """Return images for a model whose main input is "pixel_values", sounds for one of speech.

    For any other model the samples are windows of text. Arguments of a forward are taken as they
    are, for every model.

    Args:
        reader: The model, or its checkpoint.
        source: Text, images or sounds, as `text.load`, `images.load` and `audio.load` take them, or
            arguments of a forward, as `arguments.load` takes them.
        samples: Samples to take; None takes all.
        length: Tokens in a window of text.
        seed: The permutation that a calibration draws from.
        purpose: The part of the source to read, and the way text is cut.

    Raises:
        DataError: If the source cannot be read, or is too short.
        ModelError: If the source needs the processor of the model, and that cannot be used.
    """
    processor = reader.processor
    options: Any = {"samples": samples, "seed": seed, "purpose": purpose}
    if arguments.is_source(source):
        return arguments.load(source, **options)
    try:
        if reads_audio(reader):
            return audio.load(source, reader, **options)
        if reads_images(reader):
            return images.load(source, processor, reader.config, **options)
        return text.load(source, processor, length=length, **options)
    except MissingProcessorError:
        if reader.processor_error is not None:
            raise reader.processor_error from None
        raise


def load_evaluation(
    reader: Reader, source: Any, *, length: int, samples: int | None = None
) -> Samples:
    """Return the samples to measure a model on: all of a source, or some from all over it.

    Images are decoded only where they are taken: a source of images lies in a fixed permutation,
    so that its first images are from all over it. Text is read whole.

    Args:
        reader: The model, or its checkpoint.
        source: As in `load_samples`.
        length: Tokens in a window of text.
        samples: Samples to take; None takes all.

    Raises:
        DataError: If the source cannot be read, or is too short.
    """
    first = samples if reads_images(reader) else None
    pool = load_samples(reader, source, samples=first, length=length, purpose="evaluation")
    return spread(pool, samples)


def reads_images(reader: Reader) -> bool:
    """Return whether a model's main input is an image."""
    return reader.main_input_name == "pixel_values"


def reads_text(reader: Reader) -> bool:
    """Return whether a model's main input is token ids."""
    return reader.main_input_name == "input_ids"


def reads_audio(reader: Reader) -> bool:
    """Return whether a model's main input is a sound."""
    return reader.main_input_name in audio.INPUTS
