"""A model larger than memory: one block is resident at a time, states are read when asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from optimum_order.calibration.spill import Spill
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import ModelError
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState, is_finite
from optimum_order.models.lazy import Weights, embedding_parameters
from optimum_order.models.memory import trim
from optimum_order.models.units import Target, Unit


class Streamed:
    """The residency of a model that is read from its files a block at a time.

    Args:
        weights: The model, empty, and what its checkpoint holds.
        units: From `find_units(weights.model)`.
        work: Where the run keeps what is finished: the only place in which all states are.
        activation_limit: Bytes of activations between blocks that stay in memory.

    Attributes:
        states: Of every layer, read from the work dir or, of a block that no pass has changed,
            from the model while the block is resident. Those of one block at a time are in memory.
    """

    def __init__(
        self, weights: Weights, units: Sequence[Unit], work: WorkDir, activation_limit: int
    ):
        self.weights = weights
        self.device = weights.device
        self.states = States(units, work, weights)
        spill = Spill(work.folder, activation_limit)
        self.rest = spill.rest
        self.wake = spill.wake
        self._outside = weights.outside(units)
        used_once = embedding_parameters(weights.model)
        named = dict(weights.model.named_parameters(remove_duplicate=False))
        self._at_first = [name for name in self._outside if id(named[name]) in used_once]
        """Outside all blocks, large, and needed only at the beginning of a forward."""
        self._checked: set[str | None] = set()

    @contextlib.contextmanager
    def resident(self, unit: Unit | None) -> Iterator[None]:
        """Hold a block's weights, as they are by now, in memory while the context is active.

        Args:
            unit: The block; None for all that is needed before and between blocks.

        Raises:
            ModelError: If a weight is NaN or infinite.
        """
        names = self._outside if unit is None else self.weights.within(unit.name)
        self.weights.materialize(names)
        try:
            if (place := None if unit is None else unit.name) not in self._checked:
                named = dict(self.weights.model.named_parameters(remove_duplicate=False))
                refuse_infinite((name, named[name]) for name in names)
                self._checked.add(place)
            if unit is not None and self.states.changed(unit):
                for target in unit.targets:
                    target.put(self.states[target.name])
            yield
        finally:
            self.weights.release(self._at_first if unit is None else names)
            trim()


class States(MutableMapping[str, LayerState]):
    """The states of all layers, those of one block in memory.

    Args:
        units: All blocks of the model.
        work: Where the others are.
        weights: What the checkpoint holds, for layers that were only pruned so far.
    """

    def __init__(self, units: Sequence[Unit], work: WorkDir, weights: Weights):
        self._work = work
        self._weights = weights
        self._names = [unit.name for unit in units]
        self._place = {
            target.name: (number, target)
            for number, unit in enumerate(units)
            for target in unit.targets
        }
        self._held: dict[str, Packed] = {}
        self._own: dict[str, Tensor] = {}
        """Parameters of the block that were read from the checkpoint, as the model is empty."""
        self._unit = -1

    def changed(self, unit: Unit) -> bool:
        """Return whether a pass has left something of a block."""
        return self._work.latest(self._names.index(unit.name)) is not None

    def __getitem__(self, name: str) -> LayerState:
        number, target = self._place[name]
        self._turn_to(number)
        if name not in self._held:
            self._held[name] = Packed.of(LayerState(self._read(target)))
        held = self._held[name]
        return held.state(self._read(target) if held.weight is None else None)

    def __setitem__(self, name: str, state: LayerState) -> None:
        self._turn_to(self._place[name][0])
        self._held[name] = Packed.of(state)

    def _turn_to(self, number: int) -> None:
        if number != self._unit:
            self._unit = number
            self._held = {}
            self._own = {}
            if (file := self._work.latest(number)) is not None:
                self._held = dict(self._work.read(file)["states"])

    def _read(self, target: Target) -> Tensor:
        """Return a layer's weight from the model, or from the checkpoint where the model is empty.

        Pruning makes of both the same.
        """
        name = target.parameter_name
        if not target.parameter.is_meta:
            return target.read()
        if name not in self._own:
            self._own[name] = self._weights[name].to(self._weights.device)
        return target.matrix_of(self._own[name]).clone(memory_format=torch.contiguous_format)

    def __delitem__(self, name: str) -> None:
        raise TypeError("every layer has a state")

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def refuse_infinite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that all weights are finite numbers.

    Args:
        parameters: Each with its name.

    Raises:
        ModelError: If a weight is NaN or infinite.
    """
    for name, parameter in parameters:
        if not is_finite(parameter):
            raise ModelError(
                f"'{name}' holds a weight that is NaN or infinite; compress a checkpoint whose "
                "weights are finite."
            )
