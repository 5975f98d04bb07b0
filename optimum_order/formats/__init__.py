"""Formats on disk. A format is one file here, or a class in an entry-point group.

A codec, in the group `optimum_order.formats`, holds one layer; its container, in the group
`optimum_order.containers`, holds a folder.
"""

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from optimum_order.errors import ArtifactError, FormatError, unknown
from optimum_order.formats.base import (
    Codec,
    Container,
    Contents,
    Layers,
    Size,
    Written,
    outline,
)
from optimum_order.formats.layout import Layout, Piece
from optimum_order.layers.state import LayerState
from optimum_order.registry import discover

__all__ = [
    "Codec",
    "Container",
    "Contents",
    "Layers",
    "Layout",
    "Piece",
    "Size",
    "Written",
    "available",
    "choose",
    "container",
    "containers",
    "outline",
]


@functools.cache
def available() -> dict[str, type[Codec]]:
    """Return every codec by the name of its format."""
    return discover(sys.modules[__name__], Codec, "optimum_order.formats")


@functools.cache
def containers() -> dict[str, type[Container]]:
    """Return every container by name."""
    return discover(sys.modules[__name__], Container, "optimum_order.containers")


def container(format: str) -> Container:
    """Return the container of a format.

    Raises:
        ArtifactError: If the format or its container is not installed.
    """
    codec = available().get(format)
    if codec is None:
        raise ArtifactError(
            f"It is stored as '{format}', which is no format that is installed. Installed: "
            f"{', '.join(available())}."
        )
    if codec.container not in containers():
        raise ArtifactError(
            f"Format '{format}' needs the container '{codec.container}', which is not installed."
        )
    return containers()[codec.container]()


@dataclass(frozen=True)
class _Fit:
    """Why a codec cannot hold a model, or None if it can, and the bytes of all layers."""

    refusal: str | None
    bytes: int = 0


def _fits(codecs: Iterable[Codec], contents: Contents) -> dict[str, _Fit]:
    """Return how each codec fits, reading each layer once."""
    open_ = {codec.name: codec for codec in codecs}
    fits: dict[str, _Fit] = {}
    encoded: dict[str, dict[str, LayerState]] = {name: {} for name in open_}
    sizes = dict.fromkeys(open_, 0)
    for layer, target, state in contents.layers:
        outlined = outline(state)
        for name, codec in list(open_.items()):
            if not codec.encodes(state):
                sizes[name] += state.weight.nbytes
                continue
            reason = codec.why_not(target, state)
            if reason is None and not state.weight.is_meta:
                reason = codec.why_not_values(state)
            if reason is not None:
                fits[name] = _Fit(f"Layer '{layer}': {reason}.")
                del open_[name]
                continue
            encoded[name][layer] = outlined
            sizes[name] += codec.size(state).bytes
    for name, codec in open_.items():
        layers = Layers(contents.layers.targets, encoded[name])
        fits[name] = _Fit(codec.why_not_model(contents.layout, layers), sizes[name])
    return fits


def choose(contents: Contents, name: str = "auto") -> Codec:
    """Return the codec to save a model with.

    Args:
        contents: The model and its layers, or outlines of them: then nothing is compressed yet, and
            what shapes and grids rule out is refused in time.
        name: A format, or "auto" for the one of the fewest bytes among those that hold every layer
            exactly and that stock transformers loads with nothing else installed.

    Raises:
        FormatError: If the format does not exist or cannot hold a layer.
    """
    codecs = {key: codec() for key, codec in available().items()}
    if name == "auto":
        fits = _fits([codec for codec in codecs.values() if codec.stock], contents)
        fitting = [key for key, fit in fits.items() if fit.refusal is None]
        return codecs[min(fitting, key=lambda key: (fits[key].bytes, key != "dense"))]
    if name not in codecs:
        raise FormatError(unknown("format", name, ["auto", *codecs]))
    refusal = _fits([codecs[name]], contents)[name].refusal
    if refusal is not None:
        fits = _fits(codecs.values(), contents)
        fitting = [key for key in codecs if fits[key].refusal is None]
        raise FormatError(
            f"Format '{name}' cannot hold this model. {refusal} {', '.join(fitting)} can; "
            f"choose '{fitting[0]}' or 'auto'."
        )
    return codecs[name]
