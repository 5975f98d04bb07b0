"""In which formats the result of an order could be saved, and the bytes of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.engine.recipe import Recipe
from optimum_order.errors import FormatError, OrderError, unknown
from optimum_order.estimate.fit import Prediction, small_laboratory
from optimum_order.estimate.laboratory import Laboratory
from optimum_order.estimate.size import grown, stored
from optimum_order.estimate.trace import Counter
from optimum_order.formats import engines
from optimum_order.formats.transcode import foreseen, needs_transcoding
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target, Unit
from optimum_order.order import Order


@dataclass(frozen=True)
class Demand:
    """What is asked of the folder of a result.

    Args:
        format: The name of its format, or "auto" for any.
        engine: The engine that is to load it; None asks for no other than our package.
    """

    format: str = "auto"
    engine: str | None = None

    def check(self) -> None:
        """Refuse what is not known.

        Raises:
            FormatError: If there is no such format, or nothing is known of the engine.
        """
        if self.format not in (names := ["auto", *formats.available()]):
            raise FormatError(unknown("format", self.format, names))
        if self.engine is not None:
            engines.engine(self.engine)


@dataclass(frozen=True)
class Option:
    """One way to save a model.

    Args:
        format: The name of its format.
        bytes: Of all weight files.
        bits: Of a weight of the compressed layers, all side information counted.
        exact: Whether both are the same whatever the weights are.
    """

    format: str
    bytes: int
    bits: float
    exact: bool


@dataclass
class Sizes:
    """The sizes of what orders make of one model. No weight is read.

    Args:
        model: The model; it may be empty.
        units: Its blocks.
        start: Layers that are compressed already.
        demand: What is asked of the folder.
        beside: What goes with the layers, as fields of `formats.Contents`: a GGUF file holds the
            tokenizer.

    Attributes:
        weights: Weights of all layers.
        rest: Bytes of the weight files beside the layers.
        dense: Bytes of the weight files where nothing is compressed.
    """

    model: PreTrainedModel
    units: Sequence[Unit]
    start: Mapping[str, LayerState]
    demand: Demand
    beside: Mapping[str, Any] = field(default_factory=dict)
    weights: int = field(init=False)
    rest: int = field(init=False)
    dense: int = field(init=False)
    _laboratory: Laboratory = field(init=False)

    def __post_init__(self) -> None:
        targets = [target for unit in self.units for target in unit.targets]
        self._laboratory = small_laboratory(self.units)
        self.weights = sum(target.view.numel() for target in targets)
        self.dense = stored(self.model, {}, "dense", "").bytes
        self.rest = self.dense - sum(target.view.nbytes for target in targets)

    def bytes_at(self, bits: float) -> int:
        """Return the bytes of the weight files if a compressed weight takes so many bits."""
        return self.rest + int(bits * self.weights / 8)

    def bits_at(self, bytes_: float) -> float:
        """Return the bits of a compressed weight if the weight files take so many bytes."""
        return 8 * (bytes_ - self.rest) / self.weights

    def smallest(self, order: Order) -> Option | None:
        """Return the way to save what an order makes in the fewest bytes.

        Values that a format computes with otherwise than they are in memory are no way.

        Args:
            order: The order, in canonical form.

        Returns:
            None if the order cannot be run on this model, or no format will do.
        """
        recipe = Recipe.of(order)
        try:
            recipe.check(self.units, calibrated=True)
        except OrderError:  # such as groups that do not divide a layer's inputs
            return None
        layers = self._predicted(recipe, any_choice=False)
        codecs = self._fitting(layers)
        if not codecs and needs_transcoding(_contents(self.model, layers).layers):
            layers = _transcoded(self.model, layers)
            codecs = self._fitting(layers)
        choosing = any(method.kind == "allocate" for method in recipe.methods)
        if codecs and choosing and self.demand.engine is not None:
            # an engine has to load whatever a stage may choose
            several = self._predicted(recipe, any_choice=True)
            if needs_transcoding(_contents(self.model, several).layers):
                several = _transcoded(self.model, several)
            names = {codec.name for codec in self._fitting(several)}
            codecs = [codec for codec in codecs if codec.name in names]
        if not codecs:
            return None
        sizes = {codec: _layer_bytes(codec, layers) for codec in codecs}
        best = min(codecs, key=lambda codec: sizes[codec][0])
        total, exact = sizes[best]
        bits = 8 * total / self.weights
        bytes_ = self.bytes_at(bits)
        if exact:  # to the byte, with the names of all tensors
            bytes_ = stored(self.model, layers, best.name, str(order), self.beside).bytes
        return Option(best.name, bytes_, bits, exact)

    def _predicted(self, recipe: Recipe, *, any_choice: bool) -> _Samples:
        """Return every layer with a small one that was treated as the recipe treats it."""
        prediction = Prediction(self.units, any_choice=any_choice, laboratory=self._laboratory)
        for step in recipe.steps:
            step.run(prediction)
        samples = prediction.samples(self.start)
        return {name: (target, samples[name]) for name, target in prediction.targets.items()}

    def _fitting(self, layers: _Samples) -> list[formats.Codec]:
        """Return the codecs that meet the demand."""
        with Counter():  # answers what formats ask of numbers that are not there
            codecs = formats.fitting(
                _contents(self.model, layers), self.demand.engine, self.demand.format
            )
        return [codec for codec in codecs if codec.runs_dense]


_Samples = dict[str, tuple[Target, LayerState]]
"""Layers, each with a small one that stands for it."""


def _contents(model: PreTrainedModel, layers: _Samples) -> formats.Contents:
    """Return outlines of layers."""
    large: dict[tuple[int, torch.Size], LayerState] = {}
    for target, sample in layers.values():
        key = id(sample), target.view.shape
        if key not in large:
            large[key] = grown(sample, *target.view.shape)
    targets = {name: target for name, (target, _) in layers.items()}
    states = {name: large[id(sample), t.view.shape] for name, (t, sample) in layers.items()}
    return formats.Contents(model, formats.Layers(targets, states))


def _transcoded(model: PreTrainedModel, layers: _Samples) -> _Samples:
    """Return layers as transcoding would leave them, without values."""
    targets = {name: target for name, (target, _) in layers.items()}
    samples = formats.Layers(targets, {name: sample for name, (_, sample) in layers.items()})
    states = foreseen(formats.Contents(model, samples)).layers.states
    return {name: (target, states[name]) for name, target in targets.items()}


def _layer_bytes(codec: formats.Codec, layers: _Samples) -> tuple[float, bool]:
    """Return the bytes of all layers together, and whether they depend on no value."""
    sizes: dict[tuple[int, torch.Size], tuple[float, bool]] = {}
    total = 0.0
    exact = True
    for target, sample in layers.values():
        shape = target.view.shape
        key = id(sample), shape
        if key not in sizes:
            sizes[key] = _bytes_of(codec, sample, shape)
        total += sizes[key][0]
        exact = exact and sizes[key][1]
    return total, exact


def _bytes_of(codec: formats.Codec, sample: LayerState, shape: torch.Size) -> tuple[float, bool]:
    """Return the bytes of a layer that was treated like a small one, and whether they are sure."""
    if not codec.encodes(sample):
        return shape.numel() * sample.weight.element_size(), True
    with Counter():
        size = codec.size(grown(sample, *shape))
    if size.exact or sample.weight.is_meta:  # a bound, where a transcoded layer has no values
        return size.bytes, size.exact
    encoded = sum(tensor.nbytes for tensor in codec.encode(sample).values())
    return encoded * shape.numel() / sample.weight.numel(), False
