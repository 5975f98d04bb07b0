"""Whether a format will hold what an order makes of a model, asked before anything is compressed.

Small layers of random weights go through the stages of the order; formats then see outlines of
layers that were treated like them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.backends import (
    Allocator,
    Backend,
    Equalizer,
    Measured,
    Method,
    Profiler,
    Recovery,
    Remover,
    Reshaper,
    Transform,
)
from optimum_order.backends.base import Rewrite, needs_of
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.reshape import Outline
from optimum_order.estimate.laboratory import Laboratory
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.size import grown, stored
from optimum_order.estimate.trace import Counter, UnitCost
from optimum_order.formats.transcode import choose
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import AbsMax, Drift, Gram, SquaredNorms
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage

_ROWS = 64
"""Outputs of a layer that is tried."""


def check_format(
    model: PreTrainedModel,
    units: Sequence[Unit],
    recipe: Recipe,
    start: Mapping[str, LayerState],
    format: str,
    *,
    unproven: bool = False,
    engine: str | None = None,
    beside: Mapping[str, Any] | None = None,
    after: Sequence[Outline] = (),
) -> str:
    """Refuse a format that cannot hold the result of a recipe, or is not proven to load.

    What only the values of a layer can rule out is found when the model is saved.

    Args:
        model: The model; it may be empty.
        units: Its blocks.
        recipe: What is to be done; checked.
        start: Layers that are compressed already.
        format: The name of a format; "auto" holds whatever rounds no inputs.
        unproven: Whether the format may be one that is not proven to load for this architecture.
        engine: The engine that is to load the result.
        beside: What goes with the layers, as fields of `formats.Contents`.
        after: The model after each stage that makes it smaller.

    Returns:
        The name of the format; for an engine that of the one that "auto" will take, if the layers
        can be predicted.

    Raises:
        FormatError: If the format does not exist, cannot hold a layer or is not proven; or if the
            engine was not seen to load such a result.
    """
    rounds_inputs = any(method.kind == "inputs" for method in recipe.methods) or any(
        state.inputs is not None for state in start.values()
    )
    if engine is None and format in ("auto", "dense") and not rounds_inputs:
        return format
    prediction = Prediction(units, any_choice=engine is not None, after=after)
    for step in recipe.steps:
        step.run(prediction)
    if not prediction.is_sure or (after and start):
        return format
    states = prediction.states(start)
    layers = formats.Layers(prediction.targets, states)
    smaller = after[-1].model if after else model
    contents = formats.Contents(smaller, layers, **(beside or {}))
    with Counter():  # answers what formats ask of numbers that are not there
        codec, _ = choose(contents, format, unproven=unproven, engine=engine)
    return format if engine is None else codec.name


def predicted_bytes(
    model: PreTrainedModel,
    units: Sequence[Unit],
    recipe: Recipe,
    start: Mapping[str, LayerState],
    format: str,
    *,
    beside: Mapping[str, Any],
    after: Sequence[Outline],
) -> int | None:
    """Return the bytes of the weight files of a result, or None where shapes do not tell them.

    Args:
        model: The model; it may be empty.
        units: Its blocks.
        recipe: What is to be done; checked.
        start: Layers that are compressed already.
        format: The name of a format, or "auto".
        beside: What goes with the layers, as fields of `formats.Contents`.
        after: The model after each stage that makes it smaller.

    Raises:
        FormatError: If the format cannot hold the result.
    """
    prediction = Prediction(units, after=after)
    for step in recipe.steps:
        step.run(prediction)
    if not prediction.is_sure or (after and start):
        return None
    samples = prediction.samples(start)
    layers = {name: (target, samples[name]) for name, target in prediction.targets.items()}
    smaller = after[-1].model if after else model
    size = stored(smaller, layers, format, str(recipe.order), beside)
    return size.bytes if size.exact else None


def small_laboratory(units: Sequence[Unit]) -> Laboratory:
    """Return what tries methods on layers of few rows; their kind is asked for, not their speed.

    Args:
        units: The model's blocks.
    """
    targets = [target for unit in units for target in unit.targets]
    nothing = Rates(**{field.name: 1.0 for field in dataclasses.fields(Rates)})
    laboratory = Laboratory(targets, torch.device("cpu"), nothing)
    laboratory.rows = min(laboratory.rows, _ROWS)
    return laboratory


class Prediction:
    """Notes what each layer gets in place of running it: an `Engine` of `backends.base`.

    Args:
        units: The model's blocks.
        any_choice: Whether each candidate of an allocator is given to some layers, in place of the
            likely ones: an engine must load whatever it chooses.
        laboratory: Tries methods, from `small_laboratory`; several predictions may share one.
        after: The model after each stage that makes it smaller.

    Attributes:
        targets: Every layer by name.
        is_sure: Whether the layers at the end can be predicted.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        any_choice: bool = False,
        laboratory: Laboratory | None = None,
        after: Sequence[Outline] = (),
    ):
        self.targets = {target.name: target for unit in units for target in unit.targets}
        self._after = iter(after)
        self.is_sure = True
        self._units = units
        self._any_choice = any_choice
        self._groups: list[tuple[str, ...]] = []
        """Layers that an allocator treats alike."""
        self._candidates: list[Backend] = []
        """What they may get."""
        self._stages: dict[str, tuple[Stage, ...]] = dict.fromkeys(self.targets, ())
        self._laboratory = laboratory or small_laboratory(units)

    def apply(self, backends: Sequence[Backend]) -> None:
        """Note backends for every layer that they cover."""
        if not needs_of(backends) <= {AbsMax, Drift, Gram, SquaredNorms}:
            self.is_sure = False  # a plug-in asks for statistics that nothing here can make up
        self._note(backends)

    def _note(self, methods: Sequence[Backend | Recovery]) -> None:
        for name, target in self.targets.items():
            self._stages[name] += tuple(m.stage for m in methods if m.covers(name, target.kind))

    def assign(self, backends: Mapping[str, Backend], allocator: Method) -> None:
        """Note the backends that an allocator chose."""
        if self._any_choice and self._candidates:
            backends = self._dealt(backends)
        for name, backend in backends.items():
            self._stages[name] += (backend.stage,)

    def measure(self, allocator: Allocator) -> list[Measured]:
        """Guess the table of an allocator."""
        from optimum_order.estimate import guessed

        costs = {unit.name: UnitCost() for unit in self._units}
        table = list(guessed(allocator, self._units, costs, self._laboratory))
        self._groups = list(dict.fromkeys(row.layers for row in table))
        self._candidates = list(allocator.backends.values())
        return table

    def _dealt(self, backends: Mapping[str, Backend]) -> dict[str, Backend]:
        """Return the candidates of an allocator, dealt to its groups of layers in turn."""
        candidates = self._candidates
        dealt = {
            name: candidates[index % len(candidates)]
            for index, group in enumerate(self._groups)
            for name in group
        }
        return {name: dealt[name] for name in backends}

    def profile(self, profiler: Profiler) -> None:
        """Profile nothing: layers are as large whatever they share."""

    def added_losses(self, method: Method, candidates: Sequence[Rewrite]) -> list[float]:
        """Say the same of all."""
        return [0.0] * len(candidates)

    def reshape(self, reshaper: Reshaper) -> None:
        """Go on with the layers that there will be; give up where nobody says which."""
        outline = next(self._after, None)
        if outline is None:
            self.is_sure = False
            return
        self._units = outline.units
        self.targets = {target.name: target for unit in outline.units for target in unit.targets}
        self._stages = {name: self._stages.get(name, ()) for name in self.targets}

    def shorten(self, remover: Remover) -> None:
        """Go on with the layers that there will be."""
        self.reshape(remover)

    def transform(self, transform: Transform) -> None:
        """Go on with the layers that there will be, which are compressed no longer."""
        outline = next(self._after, None)
        if outline is not None:
            self._units = outline.units
            self.targets = {t.name: t for unit in outline.units for t in unit.targets}
        self._stages = dict.fromkeys(self.targets, ())

    def equalize(self, equalizer: Equalizer) -> None:
        """Go on: the layers are as large as before."""
        next(self._after, None)

    def recover(self, recovery: Recovery) -> None:
        """Note a recovery that gives layers an adapter; others leave masks and grids alone."""
        if recovery.kind == "adapt":
            self._note([recovery])

    def states(self, start: Mapping[str, LayerState]) -> dict[str, LayerState]:
        """Return the layers at the end, without values.

        Args:
            start: Layers that are compressed already.
        """
        samples = self.samples(start)
        return {
            name: grown(samples[name], *target.view.shape) for name, target in self.targets.items()
        }

    def samples(self, start: Mapping[str, LayerState]) -> dict[str, LayerState]:
        """Return small layers that were treated like those at the end.

        Args:
            start: Layers that are compressed already.
        """
        samples: dict[object, LayerState] = {}
        by_name = {}
        for name, target in self.targets.items():
            first = start.get(name)
            key = (*self._kind(first), self._stages[name], target.view.shape)
            if key not in samples:
                samples[key] = self._sample(target, self._stages[name], first)
            by_name[name] = samples[key]
        return by_name

    @staticmethod
    def _kind(state: LayerState | None) -> tuple[object, ...]:
        grid = None if state is None else state.grid
        pruned = state is not None and state.pruned is not None
        inputs = None if state is None or state.inputs is None else state.inputs.words
        return type(grid), getattr(grid, "bits", None), getattr(grid, "unit", None), pruned, inputs

    def _sample(
        self, target: Target, stages: tuple[Stage, ...], first: LayerState | None
    ) -> LayerState:
        """Return a small layer after some stages.

        Args:
            target: The layer that it stands for.
            stages: What it gets, first to last.
            first: What the layer is at the start, if it is compressed already.
        """
        inputs = target.view.shape[1]
        changed = first is not None and (first.grid, first.pruned, first.inputs) != (None,) * 3
        if first is None or not changed:
            return self._laboratory.state(stages, inputs)
        rows = slice(0, min(_ROWS, len(first.weight)))
        state = LayerState(
            first.weight[rows],
            pruned=None if first.pruned is None else first.pruned[rows],
            grid=None if first.grid is None else first.grid.take(rows),
            inputs=first.inputs,
        )
        for stage in stages:
            state = self._laboratory.apply(stage, state)
        return state
