"""Formats on disk. One format is one file here, or a class in the entry-point group `optimum_order.formats`."""

import functools
import sys

from transformers import PreTrainedModel

from optimum_order.errors import FormatError, unknown
from optimum_order.formats.base import Format, Layers, Layout, Piece
from optimum_order.registry import discover

__all__ = ["Format", "Layers", "Layout", "Piece", "available", "choose"]


@functools.cache
def available() -> dict[str, type[Format]]:
    """Every format by name."""
    return discover(sys.modules[__name__], Format, "optimum_order.formats")


def _refusal(format: Format, layout: Layout, layers: Layers) -> str | None:
    """Why a format cannot hold this model exactly, as a sentence, or None if it can."""
    for name, (target, state) in layers.items():
        if reason := format.why_not(target, state):
            return f"Layer '{name}': {reason}."
    return format.why_not_model(layout, layers)


def choose(model: PreTrainedModel, layers: Layers, name: str = "auto") -> Format:
    """The format to save a model in.

    Args:
        model: The model, its weights dense.
        layers: Every layer that was compressed, by name.
        name: A format, or "auto" for the one of the fewest bytes, counted after encoding, among those that hold
            every layer exactly and that stock transformers loads with nothing else installed.

    Raises:
        FormatError: If there is no such format or it cannot hold a layer.
    """
    formats = {key: cls() for key, cls in available().items()}
    if name != "auto" and name not in formats:
        raise FormatError(unknown("format", name, ["auto", *formats]))
    if name == "auto":
        formats = {key: format for key, format in formats.items() if format.stock}
    layout = Layout.of(model)
    refusals = {key: _refusal(format, layout, layers) for key, format in formats.items()}
    fitting = [key for key, reason in refusals.items() if reason is None]
    if name != "auto":
        if refusals[name] is not None:
            raise FormatError(
                f"Format '{name}' cannot hold this model. {refusals[name]} {', '.join(fitting)} can; choose "
                f"'{fitting[0]}' or 'auto'."
            )
        return formats[name]
    if fitting == ["dense"]:
        return formats["dense"]

    def size(key: str) -> int:
        encoded = (formats[key].encode(state) for _, state in layers.values())
        return sum(tensor.nbytes for tensors in encoded for tensor in tensors.values())

    return formats[min(fitting, key=lambda key: (size(key), key != "dense"))]
