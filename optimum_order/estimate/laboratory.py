"""What a method takes on a layer, from trying it on a small one of random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from optimum_order.backends import Backend, Recovery
from optimum_order.engine.recipe import method
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.trace import Counter
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import AbsMax, Accumulator, Gram, SquaredNorms, Statistics
from optimum_order.models import precision
from optimum_order.models.units import Target
from optimum_order.order import Stage

_MOST_ROWS, _FEW_ROWS = 2048, 64
_COLUMNS = 256
"""A layer is tried with that many inputs, or the next larger number that divides its own."""


@dataclass(frozen=True)
class Trial:
    """A small layer after some stages, and what the last of them took.

    Products grow with out * in^2, factorisations with in^3 and everything else with out * in.

    Args:
        state: The layer.
        seconds: Of all but products and factorisations, for each weight.
        products: Floating-point operations of matrix products, for each out * in^2.
        checks: The same of those that only say how large the error is.
        factors: Floating-point operations of factorisations, for each in^3.
        shared: The same of those that layers which read the same input do once.
        working: Bytes held at most, for each weight.
        square: The same for each in^2.
    """

    state: LayerState
    seconds: float
    products: float
    checks: float
    factors: float
    shared: float
    working: float
    square: float

    def takes(self, rows: int, inputs: int, speed: Rates) -> float:
        """Seconds on a layer of this shape, without what it shares with others."""
        multiplying = self.products / speed.products + self.checks / speed.gram
        return (
            rows * inputs * (self.seconds + inputs * multiplying)
            + self.factors * inputs**3 / speed.factors
        )

    def holds(self, rows: int, inputs: int) -> int:
        """Bytes held at most on a layer of this shape, beyond the layer itself."""
        return int(self.working * rows * inputs + self.square * inputs**2)


class Laboratory:
    """Tries every sequence of stages on every kind of layer once.

    Args:
        targets: The layers that are to be compressed.
        device: Where.
        speed: What the machine does.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device, speed: Rates):
        self.device, self.speed = device, speed
        self.dtype = targets[0].parameter.dtype
        heights = sorted(target.view.shape[0] for target in targets)
        self.rows = min(heights[len(heights) // 2], _MOST_ROWS)
        self.setup = 0.0
        """Seconds that methods took to get ready, such as to load a library."""
        self._ready: set[type] = set()

    def trial(self, history: tuple[Stage, ...], inputs: int) -> Trial:
        """The last of these stages after the others, on a layer with so many inputs.

        Args:
            history: Concrete stages, first to last.
            inputs: Of the layer. It is tried with fewer, if they are enough to treat it the same.
        """
        return self._trial(history, self._narrow(history, inputs))

    def state(self, history: tuple[Stage, ...], inputs: int) -> LayerState:
        """Such a layer after all of these stages, of which there may be none."""
        return self._state(history, self.rows, self._narrow(history, inputs))

    def apply(self, stage: Stage, state: LayerState) -> LayerState:
        """Return a layer after a stage that is given made-up statistics.

        Args:
            stage: A concrete stage.
            state: The layer.
        """
        return self._compress(stage, state, self._statistics(stage, state.weight.shape[1]))

    def _narrow(self, history: tuple[Stage, ...], inputs: int) -> int:
        groups = [getattr(method(stage).options, "group_size", None) for stage in history]
        least = max(
            [_COLUMNS, *(2 * size for size in groups if isinstance(size, int))]
        )  # a row of several groups
        for fewer in range(least, inputs):
            alike = all(
                inputs % size or fewer % size == 0 for size in (32, 64, 128, 256)
            )  # what "auto" and K-quants look at
            if (
                inputs % fewer == 0
                and alike
                and not any(method(s).check_shape((self.rows, fewer)) for s in history)
            ):
                return fewer
        return inputs

    @functools.cache  # noqa: B019 (it goes when the estimate is made)
    def _trial(self, history: tuple[Stage, ...], inputs: int) -> Trial:
        stage, before = history[-1], self._state(history[:-1], self.rows, inputs)
        few = min(_FEW_ROWS, self.rows)
        small = self._state(history[:-1], few, inputs)
        if type(method(stage)) not in self._ready:
            self._ready.add(type(method(stage)))
            seconds = [self._timed(stage, small) for _ in range(2)]
            self.setup += max(0.0, seconds[0] - seconds[1])
        seen = self._statistics(stage, inputs)
        with Counter() as first:  # what layers share is kept in `seen` from now on
            self._compress(stage, before, seen)
        with Counter() as second:
            after = self._compress(stage, before, seen)
        with Counter() as checks:
            self._check(before, after, seen)
        begin = time.perf_counter()
        self._check(before, self._compress(stage, before, seen), seen)
        seconds = time.perf_counter() - begin - second.factors / self.speed.factors
        seconds -= second.products / self.speed.products + checks.products / self.speed.gram
        working = 0.0
        if few < self.rows:
            with Counter() as counter:
                self._compress(stage, small, self._statistics(stage, inputs))
            working = (first.peak - counter.peak) / ((self.rows - few) * inputs)
        weights = self.rows * inputs
        return Trial(
            after,
            max(seconds, 0.0) / weights,
            second.products / (weights * inputs),
            checks.products / (weights * inputs),
            second.factors / inputs**3,
            (first.factors - second.factors) / inputs**3,
            working,
            max(0.0, first.peak - working * weights) / inputs**2,
        )

    @functools.cache  # noqa: B019
    def _state(self, history: tuple[Stage, ...], rows: int, inputs: int) -> LayerState:
        if history:
            seen = self._statistics(history[-1], inputs)
            return self._compress(history[-1], self._state(history[:-1], rows, inputs), seen)
        weight = 0.02 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
        return LayerState(weight.to(self.device, self.dtype))

    def _statistics(self, stage: Stage, inputs: int) -> Statistics | None:
        """What a stage needs to know, new to it."""
        backend = method(stage)
        if not backend.needs:
            return None
        gram = self._gram(inputs)
        squares = gram.diagonal().contiguous()
        results: dict[type[Accumulator], Tensor] = {AbsMax: squares.sqrt(), SquaredNorms: squares}
        if Gram in backend.needs:
            results = {AbsMax: squares.sqrt(), Gram: gram}
        return Statistics(2 * inputs, results)

    @functools.cache  # noqa: B019
    def _gram(self, inputs: int) -> Tensor:
        x = torch.randn(2 * inputs, inputs, generator=torch.Generator().manual_seed(1)).to(
            self.device
        )
        return x.T @ x

    def _timed(self, stage: Stage, before: LayerState) -> float:
        begin = time.perf_counter()
        self._compress(stage, before, self._statistics(stage, before.weight.shape[1]))
        return time.perf_counter() - begin

    def _compress(self, stage: Stage, before: LayerState, seen: Statistics | None) -> LayerState:
        chosen = method(stage)
        if chosen.reads_original:
            original = self._state((), *before.weight.shape).weight
            before = dataclasses.replace(before, original=original)
        # neither reshapers nor transforms are tried
        with _unsaid():
            return cast(Backend | Recovery, chosen).tried(before, seen)

    def _check(self, before: LayerState, after: LayerState, seen: Statistics | None) -> None:
        with precision.products(torch.bfloat16, self.device):  # as the pipeline does it
            relative_error(before.weight, after.weight, seen)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Hide what methods warn of: the layers are made up."""
    logger = logging.getLogger("optimum_order.backends")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
