"""Formats on disk. A format is one file here, or a class in an entry-point group.

A codec, in the group `optimum_order.formats`, holds one layer; its container, in the group
`optimum_order.containers`, holds a folder.
"""

import functools
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optimum_order.errors import ArtifactError, FormatError, unknown
from optimum_order.formats import engines
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
from optimum_order.formats.proven import why_unproven
from optimum_order.layers.state import LayerState
from optimum_order.order import Value
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
    "fitting",
    "intended",
    "outline",
    "stage_options",
]

logger = logging.getLogger(__name__)


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


def intended(format: str, engine: str | None = None) -> type[Codec] | None:
    """Return the codec that a model is compressed for, or None if its layers decide.

    Args:
        format: The name of a format, or "auto".
        engine: The engine that is to load the model.
    """
    if format != "auto" or engine is None:
        return available().get(format)
    engine_ = engines.engine(engine)
    loaded = {case.format for case in engine_.verdicts if engine_.loads(case)}
    return available().get(loaded.pop()) if len(loaded) == 1 else None


def stage_options(format: str, engine: str | None = None) -> Mapping[str, Value]:
    """Return the options with which stages make what a format holds and an engine loads.

    Those of the format are `Codec.options`. A stage that meets a rate takes codes as large as it
    may, so an engine that loads narrow codes alone says how large.

    Args:
        format: The name of a format, or "auto".
        engine: The engine that is to load the model.
    """
    codec = intended(format, engine)
    options = {} if codec is None else dict(codec.options)
    widest = None if engine is None else engines.engine(engine).widest
    if widest is not None:
        options["max_code"] = 2 ** (widest - 1) - 1
    return options


@dataclass(frozen=True)
class _Fit:
    """How a codec fits a model.

    Args:
        refusal: Why it cannot hold the model, or None if it can.
        bytes: Bytes of all layers.
        doubt: Why it is not proven that the folder would load, or None if it is.
        made_for: A kind of grid in the model for which the format is made, or None.
    """

    refusal: str | None
    bytes: int = 0
    doubt: str | None = None
    made_for: str | None = None


def _fits(codecs: Iterable[Codec], contents: Contents) -> dict[str, _Fit]:
    """Return how each codec fits, reading each layer once."""
    open_ = {codec.name: codec for codec in codecs}
    adapted = False
    fits: dict[str, _Fit] = {}
    encoded: dict[str, dict[str, LayerState]] = {name: {} for name in open_}
    sizes = dict.fromkeys(open_, 0)
    made_for: dict[str, str] = {}
    for layer, target, state in contents.layers:
        outlined = outline(state)
        adapted = adapted or state.adapter is not None
        for name, codec in list(open_.items()):
            if state.inputs is not None and not codec.holds_inputs:
                fits[name] = _Fit(
                    f"Layer '{layer}': its inputs are rounded ({state.inputs.words}), and '{name}' "
                    "stores weights alone."
                )
                del open_[name]
                continue
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
            if isinstance(state.grid, codec.made_for):
                made_for[name] = type(state.grid).__name__
            sizes[name] += codec.size(state).bytes
    for name, codec in open_.items():
        layers = Layers(contents.layers.targets, encoded[name])
        refusal = codec.why_not_model(contents.layout, layers) or codec.why_not_contents(contents)
        if adapted and refusal is None:
            refusal = codec.why_not_adapter(layers)
        doubt = None if refusal else why_unproven(contents.model, codec, layers)
        fits[name] = _Fit(refusal, sizes[name], doubt, made_for.get(name))
    return fits


def fitting(contents: Contents, engine: str | None = None, name: str = "auto") -> list[Codec]:
    """Return every codec that holds a model exactly and is proven to load for its architecture.

    Args:
        contents: The model and its layers, or outlines of them.
        engine: The engine that is to load the folder, if any: then codecs that the engine was seen
            to load with such layers. Otherwise codecs that transformers loads by the folder alone.
        name: The only format to consider, whatever else transformers has to be told; "auto" for
            any.

    Raises:
        FormatError: If the engine is unknown.
    """
    codecs = {key: codec() for key, codec in available().items() if name in ("auto", key)}
    if engine is None:
        codecs = {
            key: codec for key, codec in codecs.items() if codec.gguf_file is None or key == name
        }
        fits = _fits(codecs.values(), contents)
        reasons = {key: fit.refusal or fit.doubt for key, fit in fits.items()}
    else:
        reasons = _reasons(engines.engine(engine), contents)
    return [codecs[key] for key, reason in reasons.items() if key in codecs and reason is None]


def choose(
    contents: Contents,
    name: str = "auto",
    *,
    unproven: bool = False,
    engine: str | None = None,
) -> Codec:
    """Return the codec to save a model with.

    Args:
        contents: The model and its layers, or outlines of them: then nothing is compressed yet, and
            what shapes and grids rule out is refused in time.
        name: A format, or "auto" for the one of the fewest bytes among those that hold every layer
            exactly, that stock transformers loads with nothing else installed or that are made for
            a grid of the model, and that are proven to load for this architecture.
        unproven: Whether a format that was named may be one that is not proven to load.
        engine: The engine that is to load the folder; then "auto" takes the format of the fewest
            bytes that was seen to load there.

    Raises:
        FormatError: If the format does not exist, cannot hold a layer or is not proven; or if the
            engine is unknown, or was not seen to load such a folder.
    """
    codecs = {key: codec() for key, codec in available().items()}
    if engine is not None:
        return _choose_for(engines.engine(engine), contents, name, unproven=unproven)
    if name == "auto":
        candidates = [codec for codec in codecs.values() if codec.stock or codec.made_for]
        fits = {
            key: fit
            for key, fit in _fits(candidates, contents).items()
            if codecs[key].stock or fit.made_for
        }
        fitting = sorted(
            (key for key, fit in fits.items() if fit.refusal is None),
            key=lambda key: (fits[key].bytes, key != "dense"),
        )
        chosen = next((key for key in fitting if fits[key].doubt is None or key == "dense"), "")
        if not chosen:  # where inputs are rounded, "dense" may not do
            raise FormatError(_no_format(codecs, fits))
        if fitting[0] != chosen:
            _say(f"Stored as '{chosen}', not as '{fitting[0]}': {fits[fitting[0]].doubt}")
        if not codecs[chosen].stock:
            needed = f"'import {codecs[chosen].import_first}' before transformers loads it"
            if codecs[chosen].gguf_file:
                needed = f"transformers loads it with gguf_file='{codecs[chosen].gguf_file}'"
            _say(
                f"Stored as '{chosen}', the format for layers of a {fits[chosen].made_for}: "
                f"{needed}. '--format dense' needs nothing of the kind."
            )
        return codecs[chosen]
    if name not in codecs:
        raise FormatError(unknown("format", name, ["auto", *codecs]))
    fit = _fits([codecs[name]], contents)[name]
    if fit.refusal is not None:
        fits = _fits(codecs.values(), contents)
        fitting = [key for key in codecs if fits[key].refusal is None and fits[key].doubt is None]
        if not fitting:
            raise FormatError(_no_format(codecs, fits))
        advised = min(fitting, key=lambda key: not codecs[key].stock)
        raise FormatError(
            f"Format '{name}' cannot hold this model. {fit.refusal} {', '.join(fitting)} can; "
            f"choose '{advised}' or 'auto'."
        )
    if fit.doubt is not None and not unproven:
        raise FormatError(
            f"Format '{name}' is not proven to load for this model. {fit.doubt} Choose 'dense' or "
            "'auto', or insist with unproven=True (--unproven)."
        )
    return codecs[name]


def _no_format(codecs: Mapping[str, Codec], fits: Mapping[str, _Fit]) -> str:
    """Return why no format is sure to hold a model whose inputs are rounded.

    Args:
        codecs: The codecs by name.
        fits: How they fit.
    """
    name = next(key for key in fits if codecs[key].holds_inputs)
    if fits[name].refusal is not None:
        return f"No format holds this model. {fits[name].refusal}"
    return (
        f"No format but '{name}' could hold this model, and it is not proven to load. "
        f"{fits[name].doubt} Insist with --format {name} --unproven."
    )


def _choose_for(engine: engines.Engine, contents: Contents, name: str, *, unproven: bool) -> Codec:
    """Return the codec to save a model with for an engine, as `choose` does."""
    adapted = any(state.adapter is not None for _, _, state in contents.layers)
    if adapted and engine.name not in engines.ADAPTED:
        raise FormatError(
            f"{engine.name} was not seen to load an adapter beside a folder: leave out the stage "
            f"that makes one, or take {' or '.join(engines.ADAPTED)} (--for)."
        )
    if name == "auto":
        reasons = _reasons(engine, contents)
        chosen = next((key for key, reason in reasons.items() if reason is None), None)
        named, reason = next(iter(reasons.items()))
    else:
        chosen = named = choose(contents, name, unproven=unproven).name
        reason = engine.why_not(contents.model, *_encoded(name, contents))
        if reason is not None and unproven:
            return available()[name]()
        chosen = None if reason else name
    if chosen is None:
        raise FormatError(f"{reason} {_advice(engine, contents, named)}")
    codec, layers = _encoded(chosen, contents)
    if caution := engine.caution(contents.model, codec, layers):
        _say(f"Stored as '{chosen}': {caution}")
    return codec


def _reasons(engine: engines.Engine, contents: Contents) -> dict[str, str | None]:
    """Return why an engine is not known to load each format, or None if it is.

    Formats that hold the model come first, the one of the fewest bytes before all others. A layer
    that was quantized has its width for a reason, so "dense" is left out then; and so are formats
    that only our own package makes loadable, or that were not tried there. Of those that do not
    hold the model, the ones that the engine loads at some width say most.
    """
    usual = {format for names in engine.loaded_widths().values() for format in names}
    quantized = any(state.grid is not None for _, _, state in contents.layers)
    codecs = [
        codec()
        for key, codec in available().items()
        if not codec.import_first and not (quantized and key == "dense")
    ]
    tried = {case.format for case in engine.verdicts}
    codecs = [codec for codec in codecs if codec.name in tried] or codecs
    fits = _fits(codecs, contents)

    def rank(key: str) -> tuple[bool, bool, int, bool]:
        refused = fits[key].refusal is not None
        return refused, refused and key not in usual, fits[key].bytes, key != "dense"

    return {
        key: fits[key].refusal
        or fits[key].doubt
        or engine.why_not(contents.model, *_encoded(key, contents))
        for key in sorted(fits, key=rank)
    }


def _encoded(name: str, contents: Contents) -> tuple[Codec, Layers]:
    """Return a codec and the layers that it encodes, as outlines."""
    codec = available()[name]()
    states = {layer: outline(state) for layer, _, state in contents.layers if codec.encodes(state)}
    return codec, Layers(contents.layers.targets, states)


def _advice(engine: engines.Engine, contents: Contents, named: str) -> str:
    """Return what would load where a format does not.

    Args:
        engine: The engine that was asked for.
        contents: The model and its layers.
        named: The format to insist on.
    """
    widths = [f"{width} as {' or '.join(n)}" for width, n in engine.loaded_widths().items()]
    loads = f"It loads {'; '.join(widths)}. " if widths else ""
    others = [
        other
        for other in engines.content()["engines"]
        if other != engine.name and None in _reasons(engines.engine(other), contents).values()
    ]
    choices = ["--format dense"] if engine.loads(engines.Case("dense")) else []
    choices += [f"--for {' or '.join(others)}"] if others else []
    choices.append(f"insist with --format {named} --unproven")
    return f"{loads}Choose {', or '.join(choices)}."


@functools.cache
def _say(text: str) -> None:
    """Log a line once."""
    logger.warning(text)
