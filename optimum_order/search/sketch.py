"""What orders do to some layers of a model, each with its own calibration draw; no run is finished.

Layers are taken in a sequence that spreads any number of them over the depth and the kinds of
layers of a model, and the k-th of them sees draw k mod R. So a mean over layers is one over draws
too, and its spread from layer to layer tells about both. The inputs are those of the original
model: each layer stands for itself, and one pass over the few samples of each draw is all the data
costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from optimum_order.backends import Backend
from optimum_order.calibration.glance import glance
from optimum_order.engine.recipe import method
from optimum_order.engine.runner import Batches, Runner
from optimum_order.errors import OrderError
from optimum_order.layers.error import relative_error, squared_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import SquaredNorms, Statistics
from optimum_order.models.units import Target
from optimum_order.order import Order, Stage

_GRAM_BYTES = 2**30
_GOLDEN = (5**0.5 - 1) / 2


class Sketch:
    """Some layers after every order.

    Args:
        runner: The model.
        orders: From `Runner.check`; each stage prunes or quantizes one layer by itself.
        draws: The calibration samples of each draw; empty without calibration.
        done: Called after each layer.

    Attributes:
        layers: All layers, in the sequence in which they are taken.
        states: The layers that were taken, by order and name.
        errors: Their relative squared output errors.

    Raises:
        OrderError: If a stage looks at more than one layer.
    """

    def __init__(
        self,
        runner: Runner,
        orders: Sequence[Order],
        draws: Sequence[Batches],
        done: Callable[[], object] = lambda: None,
    ):
        self.runner = runner
        self.draws = list(draws)
        self._done = done
        self._backends = {stage: one_layer(stage) for order in orders for stage in order}
        names = list(runner.original.states)
        self.layers = [names[i] for i in spread(len(names))]
        self._positions = {name: position for position, name in enumerate(self.layers)}
        self.states: dict[Order, dict[str, LayerState]] = {order: {} for order in orders}
        self.errors: dict[Order, dict[str, float]] = {order: {} for order in orders}
        self._alignment: dict[str, float] = {}
        self._statistics: dict[str, Statistics] = {}

    def draw(self, layer: str) -> int:
        """Return the number of the draw that a layer sees."""
        return self._positions[layer] % max(1, len(self.draws))

    def take(self, count: int, orders: Collection[Order]) -> None:
        """Compress the first layers in some orders, where they are not compressed yet.

        Args:
            count: How many layers.
            orders: The orders.
        """
        missing = [
            name
            for name in self.layers[:count]
            if any(name not in self.states[order] for order in orders)
        ]
        for names in self._portions(missing):
            statistics = self._gather(names)
            for name in names:
                self._compress(name, statistics.get(name), orders)

    def _portions(self, names: list[str]) -> Iterator[list[str]]:
        """Yield the layers in parts whose Gram matrices fit in memory."""
        part: list[str] = []
        for name in names:
            if part and sum(map(self._bytes, [*part, name])) > _GRAM_BYTES:
                yield part
                part = []
            part.append(name)
        if part:
            yield part

    def _bytes(self, name: str) -> int:
        return 4 * self.runner.original.states[name].weight.shape[1] ** 2

    def _gather(self, names: list[str]) -> dict[str, Statistics]:
        """Return the inputs of each layer in its own draw; of all layers if memory allows."""
        if not self.draws or all(name in self._statistics for name in names):
            return self._statistics
        if sum(map(self._bytes, self.layers)) <= _GRAM_BYTES:
            names = self.layers
        self._statistics = {}
        self.runner.reset()
        for number, batches in enumerate(self.draws):
            targets = [
                target
                for target in self._targets()
                if target.name in names and self.draw(target.name) == number
            ]
            if targets:
                model = self.runner.model
                self._statistics |= glance(model, targets, batches, self.runner.dtype)
        return self._statistics

    def _compress(
        self, name: str, statistics: Statistics | None, orders: Collection[Order]
    ) -> None:
        """Compress one layer in each order, every shared beginning once."""
        original = self.runner.original.states[name]
        states: dict[tuple[Stage, ...], LayerState] = {(): original}
        for order in orders:
            for length, stage in enumerate(order, 1):
                prefix = order.stages[:length]
                if prefix not in states:
                    before = states[prefix[:-1]]
                    states[prefix] = self._backends[stage].apply(before, statistics, where=name)
            state = states[order.stages]
            self.states[order][name] = state
            self.errors[order][name] = relative_error(original.weight, state.weight, statistics)[0]
        self._alignment[name] = _alignment(original.weight, statistics)
        self._done()

    def logarithms(self, order: Order) -> Tensor:
        """Return the logarithm of each taken layer's output error: (layers,) float64."""
        errors = self.errors[order]
        values = [errors[name] for name in self.layers if name in errors]
        tiny = torch.finfo(torch.float32).tiny
        return torch.tensor(values, dtype=torch.float64).clamp(min=tiny).log()

    def imagine(self, order: Order) -> None:
        """Put into the model what a whole run may look like, by the layers that were taken.

        All other layers get white noise that makes the same relative error in their outputs, the
        same noise for every order. That is milder than a compression, whose errors are not
        independent of the weights.

        Args:
            order: The order.
        """
        states = self.states[order]
        error = sum(self.errors[order].values()) / len(states)
        alignment = sum(self._alignment[name] for name in states) / len(states)
        generator = torch.Generator().manual_seed(0)
        for target in self._targets():
            weight = self.runner.original.states[target.name].weight
            # drawn for taken layers too, so that the noise of the others is the same in all orders
            noise = _noise(weight, generator)
            if target.name in states:
                target.put(states[target.name])
            else:
                target.write(weight + (error * alignment) ** 0.5 * noise)

    def _targets(self) -> list[Target]:
        return [target for unit in self.runner.units for target in unit.targets]


def one_layer(stage: Stage) -> Backend:
    """Return the backend of a stage.

    Raises:
        OrderError: If the stage looks at more than one layer.
    """
    chosen = method(stage)
    if chosen.kind not in ("prune", "quantize"):
        raise OrderError(
            f"Stage '{stage}' looks at more than one layer at a time and cannot be judged by "
            "single ones; use strategy 'auto'."
        )
    return cast(Backend, chosen)


def spread(count: int) -> list[int]:
    """Return 0 .. count - 1 in a sequence whose first numbers lie all over the range.

    Steps are of about the golden section. A step that has no divisor in common with the number of
    layers meets every kind of layer, though blocks repeat.

    Args:
        count: At least 1.
    """
    coprime = [step for step in range(1, count + 1) if math.gcd(step, count) == 1]
    step = min(coprime, key=lambda step: abs(step - _GOLDEN * count))
    return [k * step % count for k in range(count)]


def _noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return white noise of the mean square of a weight."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return noise * weight.float().square().mean().sqrt().to(weight.dtype)


def _alignment(weight: Tensor, statistics: Statistics | None) -> float:
    """Return the squared size of a layer's outputs over that of white weights of the same size."""
    if statistics is None or statistics.tokens == 0:
        return 1.0
    white = weight.float().square().mean() * len(weight) * statistics[SquaredNorms].double().sum()
    return squared_error(weight, statistics) / white.item() if white else 1.0
