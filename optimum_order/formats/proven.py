"""Which formats are proven to load for which architecture: the data that `make census` writes.

A model class is free to look for a `.weight`, to call its layers in ways that no format expects, or
to put tensors together on its own. So what a codec can hold is no proof that the folder loads.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from transformers import PreTrainedModel

from optimum_order.formats.base import Codec, Layers

FILE = "census.json"
OK = "ok"
NOT_TRIED = "not tried: "
"""How the verdict on a case begins that a tiny model could not be stored in."""


@functools.cache
def census() -> dict[str, Any]:
    """Return the data: the version of transformers, and a verdict by class and case."""
    text = files("optimum_order.formats").joinpath(FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@functools.cache
def _cases() -> frozenset[str]:
    """Return the names of the cases that were tried."""
    return frozenset(case for verdicts in census()["classes"].values() for case in verdicts)


def why_unproven(model: PreTrainedModel, codec: Codec, layers: Layers) -> str | None:
    """Return why nobody knows whether a folder would load, or that it does not; None if it does.

    Args:
        model: The model; it may be empty.
        codec: A codec that can hold it.
        layers: The layers that the codec encodes, as outlines.

    Returns:
        A sentence.
    """
    case = codec.variant(layers)
    if not layers.states or case not in _cases():
        return None  # nothing but a dense model, or a format of somebody else's
    cls = type(model)
    custom = not cls.__module__.startswith("transformers.")
    verdicts = None if custom else census()["classes"].get(cls.__name__)
    if verdicts is None:
        # Custom code gets an ordinary dense model. A class of transformers may have conversions of
        # its own, which only our decoding is put before.
        if codec.loads_dense(layers) and (custom or not codec.stock):
            return None
        return f"{cls.__name__} is none of the architectures with which '{case}' was tried."
    verdict = verdicts[case]
    if verdict == OK:
        return None
    if verdict.startswith(NOT_TRIED):
        if not codec.stock and codec.loads_dense(layers):
            return None
        reason = verdict.removeprefix(NOT_TRIED).rstrip(".")
        return f"'{case}' could not be tried with {cls.__name__} ({reason})."
    return (
        f"With transformers {census()['transformers']}, a {cls.__name__} stored as '{case}' did "
        f"not load ({verdict.rstrip('.')})."
    )
