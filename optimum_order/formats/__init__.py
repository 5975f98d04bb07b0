"""Formats on disk. One format is one file here, or a class in the entry-point group `optimum_order.formats`."""

import functools
import sys
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import FormatError, unknown
from optimum_order.formats.base import Format, Layers, Layout, Paired, Piece, outline
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target
from optimum_order.registry import discover

__all__ = ["Format", "Layers", "Layout", "Paired", "Piece", "available", "choose"]


@functools.cache
def available() -> dict[str, type[Format]]:
    """Every format by name."""
    return discover(sys.modules[__name__], Format, "optimum_order.formats")


def _refusals(formats: dict[str, Format], layout: Layout, layers: Layers) -> dict[str, str | None]:
    """Why each format cannot hold this model exactly, as a sentence, or None if it can; each layer is read once."""
    refusals: dict[str, str | None] = {}
    encoded: dict[str, dict[str, tuple[Target, LayerState]]] = {key: {} for key in formats}
    for name, (target, state) in layers.items():
        for key in [key for key in formats if key not in refusals]:
            if reason := formats[key].why_not(target, state):
                refusals[key] = f"Layer '{name}': {reason}."
            elif formats[key].encodes(state):
                encoded[key][name] = target, outline(state)
    return {
        key: refusals.get(key) or formats[key].why_not_model(layout, encoded[key])
        for key in formats
    }


def choose(
    model: PreTrainedModel,
    layers: Layers,
    name: str = "auto",
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> Format:
    """The format to save a model in.

    Args:
        model: The model, its weights dense.
        layers: Every layer that was compressed, by name; read one after the other.
        name: A format, or "auto" for the one of the fewest bytes, counted after encoding, among those that hold
            every layer exactly and that stock transformers loads with nothing else installed.
        tensors: What is in the model, by name, if it is empty.

    Raises:
        FormatError: If there is no such format or it cannot hold a layer.
    """
    formats = {key: cls() for key, cls in available().items()}
    if name != "auto" and name not in formats:
        raise FormatError(unknown("format", name, ["auto", *formats]))
    layout = Layout.of(model, tensors)
    if name != "auto":
        reason = _refusals({name: formats[name]}, layout, layers)[name]
        if reason is None:
            return formats[name]
        fitting = [
            key for key, other in _refusals(formats, layout, layers).items() if other is None
        ]
        raise FormatError(
            f"Format '{name}' cannot hold this model. {reason} {', '.join(fitting)} can; choose '{fitting[0]}' or "
            "'auto'."
        )
    refusals = _refusals(
        {key: format for key, format in formats.items() if format.stock}, layout, layers
    )
    sizes = {key: 0 for key, reason in refusals.items() if reason is None}
    if list(sizes) == ["dense"]:
        return formats["dense"]
    for _, state in layers.values():
        for key in sizes:
            sizes[key] += sum(tensor.nbytes for tensor in formats[key].encode(state).values())
    return formats[min(sizes, key=lambda key: (sizes[key], key != "dense"))]
