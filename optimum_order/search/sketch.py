"""What orders do to some layers of a model, each with a calibration draw of its own: nothing is run to the end.

Layers are taken in an order that spreads any number of them over the depth and the kinds of layers of a model, and the
k-th of them sees draw k mod R. So a mean over layers is one over draws too, and how it varies from layer to layer tells
about both. The inputs are those of the original model: each layer stands for itself, and one pass of each draw's few
samples is all the data costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

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
        orders: From `Runner.check`; no stage of them is an allocator.
        draws: The calibration samples of each draw; empty where there is no calibration.
        done: Called after each layer.

    Raises:
        OrderError: If a stage looks at more than one layer.
    """

    def __init__(
        self,
        runner: Runner,
        orders: Sequence[Order],
        draws: Sequence[Batches],
        done: Callable[[], None] = lambda: None,
    ):
        self.runner, self.draws, self._done = runner, list(draws), done
        self._backends = {stage: one_layer(stage) for order in orders for stage in order}
        names = list(runner.original.states)
        self.layers = [names[i] for i in spread(len(names))]
        """All of them, in the order in which they are taken."""
        self._place = {name: k for k, name in enumerate(self.layers)}
        self.states: dict[Order, dict[str, LayerState]] = {order: {} for order in orders}
        self.errors: dict[Order, dict[str, float]] = {order: {} for order in orders}
        """Relative squared output errors."""
        self._alignment: dict[str, float] = {}
        self._known: dict[str, Statistics] = {}

    def draw(self, layer: str) -> int:
        """The number of the draw that a layer sees."""
        return self._place[layer] % max(1, len(self.draws))

    def take(self, count: int, orders: Collection[Order]) -> None:
        """See to it that the first `count` layers are compressed in these orders."""
        missing = [
            name
            for name in self.layers[:count]
            if any(name not in self.states[order] for order in orders)
        ]
        for part in self._portions(missing):
            known = self._looked_at(part)
            for name in part:
                self._compress(name, known.get(name), orders)

    def _portions(self, names: list[str]) -> Iterator[list[str]]:
        """The layers in parts whose Gram matrices fit in memory."""
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

    def _looked_at(self, names: list[str]) -> dict[str, Statistics]:
        """What each layer reads in its own draw; of all layers at once where that fits in memory."""
        if not self.draws or all(name in self._known for name in names):
            return self._known
        wanted = self.layers if sum(map(self._bytes, self.layers)) <= _GRAM_BYTES else names
        self._known = {}
        self.runner.reset()
        for number, batches in enumerate(self.draws):
            mine = [t for t in self._targets() if t.name in wanted and self.draw(t.name) == number]
            if mine:
                self._known |= glance(self.runner.model, mine, batches, self.runner.dtype)
        return self._known

    def _compress(
        self, name: str, statistics: Statistics | None, orders: Collection[Order]
    ) -> None:
        original = self.runner.original.states[name]
        begun: dict[tuple[Stage, ...], LayerState] = {(): original}
        for order in orders:
            for length, stage in enumerate(order, 1):
                if order.stages[:length] not in begun:
                    before = begun[order.stages[: length - 1]]
                    begun[order.stages[:length]] = self._backends[stage].apply(
                        before, statistics, where=name
                    )
            state = begun[order.stages]
            self.states[order][name] = state
            self.errors[order][name] = relative_error(original.weight, state.weight, statistics)[0]
        self._alignment[name] = _alignment(original.weight, statistics)
        self._done()

    def logarithms(self, order: Order) -> Tensor:
        """Of the output errors, layer by layer in the order in which they were taken: (layers,) float64."""
        found = self.errors[order]
        known = torch.tensor(
            [found[name] for name in self.layers if name in found], dtype=torch.float64
        )
        return known.clamp(min=torch.finfo(torch.float32).tiny).log()

    def write(self, order: Order, *, without: int | None = None) -> None:
        """Put an order's layers into the model, the original's where they were not taken.

        Args:
            order: Which.
            without: A draw whose layers are left as they were.
        """
        found = self.states[order]
        for target in self._targets():
            name = target.name
            known = name in found and not (without is not None and self.draw(name) == without)
            target.write((found[name] if known else self.runner.original.states[name]).weight)

    def imagine(self, order: Order) -> None:
        """Put into the model what a whole run may look like, by the layers that were taken.

        All other layers get white noise that makes the same relative error in their outputs, the same noise for every
        order. That is milder than what it stands for, whose errors are not independent of the weights.

        Args:
            order: Which.
        """
        known = self.states[order]
        error = sum(self.errors[order].values()) / len(known)
        alignment = sum(self._alignment[name] for name in known) / len(known)
        generator = torch.Generator().manual_seed(0)
        for target in self._targets():
            weight = self.runner.original.states[target.name].weight
            noise = _noise(
                weight, generator
            )  # for known layers too, so that the others' is the same in every order
            found = known[target.name].weight if target.name in known else None
            target.write(weight + (error * alignment) ** 0.5 * noise if found is None else found)

    def _targets(self) -> list[Target]:
        return [target for unit in self.runner.units for target in unit.targets]


def one_layer(stage: Stage) -> Backend:
    """The backend of a stage.

    Raises:
        OrderError: If it looks at more than one layer.
    """
    chosen = method(stage)
    if not isinstance(chosen, Backend):
        raise OrderError(
            f"Stage '{stage}' looks at more than one layer at a time and cannot be judged by single ones; use strategy "
            "'auto'."
        )
    return chosen


def spread(count: int) -> list[int]:
    """0 .. count - 1 so ordered that the first few lie all over: steps of about the golden section.

    A step that has no divisor in common with the number of layers meets every kind of layer, though blocks repeat.

    Args:
        count: At least 1.
    """
    fair = [step for step in range(1, count + 1) if math.gcd(step, count) == 1]
    step = min(fair, key=lambda step: abs(step - _GOLDEN * count))
    return [k * step % count for k in range(count)]


def _noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of the mean square of a weight."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return noise * weight.float().square().mean().sqrt().to(weight.dtype)


def _alignment(weight: Tensor, statistics: Statistics | None) -> float:
    """Squared size of a layer's outputs over that of white weights of the same size."""
    if statistics is None or statistics.tokens == 0:
        return 1.0
    white = weight.float().square().mean() * len(weight) * statistics[SquaredNorms].double().sum()
    return squared_error(weight, statistics) / white.item() if white else 1.0
