"""Sounds -> the inputs of a speech model, through the model's own feature extractor.

A source is a .wav file, a folder of them, a dataset `id[:config][:split][:column]` with a column of
sounds, or a list of arrays. A model that reads stretches of a fixed length, such as Whisper, gets
every sound cut into those; for any other model the sounds follow one another and are cut into
stretches of ten seconds, so that no padding is calibrated on.

The decoder of a speech model reads text. What was said is not known, so the decoder reads Python's
documentation, which every machine has.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_order.data import text
from optimum_order.data.arguments import Arguments
from optimum_order.data.draws import choose, shortage
from optimum_order.data.samples import MissingProcessorError, Purpose
from optimum_order.data.splits import find_column, load_split
from optimum_order.errors import DataError

INPUTS = ("input_features", "input_values")
"""The main inputs of models of sound."""

_SECONDS = 10
_TEXT_TOKENS = 64
_Sound = np.ndarray[Any, Any]


def load(
    source: Any,
    reader: Any,
    *,
    samples: int | None,
    seed: int = 0,
    purpose: Purpose = "calibration",
) -> Arguments:
    """Return the inputs of a speech model.

    Args:
        source: A .wav file, a folder of them, a dataset of the Hub or a local one as
            `id[:config][:split][:column]`, or a list of sounds: arrays (samples,) at the rate of
            the feature extractor, pairs of an array and its rate, or mappings with "array" and
            "sampling_rate".
        reader: The model, or its checkpoint: a `data.load.Reader`.
        samples: Stretches to take; None takes all.
        seed: The permutation that a calibration draws from. An evaluation takes the first ones.
        purpose: Chooses the split of a dataset.

    Raises:
        DataError: If the source cannot be read, or the model has no feature extractor.
    """
    extractor = _extractor(reader)
    rate = int(extractor.sampling_rate)
    name, sounds = _sounds(source, rate, purpose)
    stretches = _stretches(sounds, rate, getattr(extractor, "n_samples", None))
    if not stretches:
        raise DataError(f"{name} has no sounds. Give a source that has some.")
    index = choose(len(stretches), samples, seed if purpose == "calibration" else None)
    inputs = extractor(
        [stretches[i] for i in index.tolist()], sampling_rate=rate, return_tensors="pt"
    )
    main = reader.main_input_name
    if main not in inputs:
        raise DataError(
            f"{type(extractor).__name__} makes {', '.join(inputs)}, the model reads '{main}'. Use "
            "the feature extractor that belongs to the model."
        )
    arguments = {main: inputs[main].float()}
    if reader.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = _decoder_ids(reader, len(index), seed, purpose)
    return Arguments(arguments, name, shortage(name, len(stretches), samples, "sample"))


def _extractor(reader: Any) -> Any:
    processor = reader.processor
    extractor = getattr(processor, "feature_extractor", processor)
    if not hasattr(extractor, "sampling_rate"):
        raise MissingProcessorError(
            f"Sounds need a feature extractor, and there is none with the model that reads "
            f"'{reader.main_input_name}'. Save one beside the model, pass one as 'processor', or "
            f"give its tensors: calibration={{'{reader.main_input_name}': ...}}."
        )
    return extractor


def _decoder_ids(reader: Any, count: int, seed: int, purpose: Purpose) -> Tensor:
    """Return what the decoder reads: its first token and text, (count, tokens)."""
    windows = text.load(
        "builtin", reader.processor, samples=count, length=_TEXT_TOKENS, seed=seed, purpose=purpose
    )
    ids = windows.ids[torch.arange(count) % len(windows)].clone()
    start = getattr(reader.config, "decoder_start_token_id", None)
    if isinstance(start, int):
        ids[:, 0] = start
    return ids


def _stretches(sounds: Iterator[_Sound], rate: int, fixed: int | None) -> list[_Sound]:
    if fixed is not None:  # the feature extractor pads what is shorter, as in training
        parts = (
            sound[start : start + fixed]
            for sound in sounds
            for start in range(0, len(sound), fixed)
        )
        return list(parts)
    joined = np.concatenate([np.empty(0, np.float32), *sounds])
    length = min(_SECONDS * rate, len(joined))
    if length == 0:
        return []
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


# --- source -> sounds ----------------------------------------------------------------------------


def _sounds(source: Any, rate: int, purpose: Purpose) -> tuple[str, Iterator[_Sound]]:
    """Return the name of a source, and its sounds at a rate, each (samples,) float32."""
    if isinstance(source, (list, tuple)):
        name = f"{len(source)} sounds in memory"
        return name, (_from_memory(sound, rate, number) for number, sound in enumerate(source, 1))
    if not isinstance(source, (str, Path)):
        raise DataError(
            "Sounds are a .wav file, a folder of them, a dataset of the Hub or a list of arrays, "
            f"got {type(source).__name__}."
        )
    source = os.path.expanduser(str(source))
    if source == "builtin":
        raise DataError(
            "There are no built-in sounds for a model of speech. Give a folder of .wav files, a "
            "dataset of the Hub, or a list of arrays."
        )
    path = Path(source)
    files = [path] if path.suffix.lower() == ".wav" else []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".wav")
    if files:
        return path.resolve().name, (_from_file(file, file.name, rate) for file in files)
    return _from_dataset(source, rate, purpose)


def _from_memory(sound: Any, rate: int, number: int) -> _Sound:
    if isinstance(sound, Mapping) and "array" in sound:
        sound = (sound["array"], sound.get("sampling_rate", rate))
    own = rate
    if isinstance(sound, tuple) and len(sound) == 2:
        sound, own = sound
    array = np.asarray(sound.detach().cpu() if isinstance(sound, Tensor) else sound)
    if array.ndim != 1 or array.dtype.kind != "f" or not isinstance(own, (int, np.integer)):
        raise DataError(
            f"Sound {number} must be an array (samples,) of floats from -1 to 1, or a pair of one "
            f"and its rate, got {array.dtype} {array.shape}."
        )
    return _at_rate(array, int(own), rate)


def _from_dataset(source: str, rate: int, purpose: Purpose) -> tuple[str, Iterator[_Sound]]:
    import datasets

    split = load_split(source, purpose, "a folder of .wav files")
    features = split.data.features
    kinds = {key: isinstance(feature, datasets.Audio) for key, feature in features.items()}
    column = find_column(kinds, split.column, usual="audio", content="sounds", name=split.name)
    data = split.data.select_columns([column]).cast_column(column, datasets.Audio(decode=False))

    def sounds() -> Iterator[_Sound]:
        for number, row in enumerate(data, 1):
            stored = row[column]
            file = io.BytesIO(stored["bytes"]) if stored["bytes"] else Path(stored["path"])
            yield _from_file(file, f"row {number} of {split.name}", rate)

    return split.name, sounds()


def _from_file(file: Path | io.BytesIO, name: str, rate: int) -> _Sound:
    from scipy.io import wavfile

    try:
        own, array = wavfile.read(file)
    except (OSError, ValueError, EOFError):
        raise DataError(
            f"'{name}' is no .wav file that can be read. Convert it to one, or give arrays."
        ) from None
    if array.dtype.kind == "u":  # eight bits, around 128
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    if array.ndim == 2:
        array = array.mean(1)
    return _at_rate(array, own, rate)


def _at_rate(array: _Sound, own: int, rate: int) -> _Sound:
    """Return a sound (samples,) float32 at another rate."""
    if own != rate:
        from scipy.signal import resample_poly

        divisor = np.gcd(own, rate)
        array = resample_poly(array, rate // divisor, own // divisor)
    return array.astype(np.float32)
