"""What a method takes on a layer, from trying it on a small one of random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optimum_order import pipeline
from optimum_order.backends import Backend, method
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.trace import Counter
from optimum_order.layer import LayerState, Statistics
from optimum_order.order import Stage
from optimum_order.targets import Target

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
        factors: Floating-point operations of Cholesky factorisations, for each in^3.
        working: Bytes held at most, for each weight.
        square: The same for each in^2.
    """

    state: LayerState
    seconds: float
    products: float
    factors: float
    working: float
    square: float

    def takes(self, rows: int, inputs: int, speed: Rates) -> float:
        """Seconds on a layer of this shape."""
        products, factors = self.products * rows * inputs**2, self.factors * inputs**3
        return self.seconds * rows * inputs + products / speed.products + factors / speed.factors

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

    def _narrow(self, history: tuple[Stage, ...], inputs: int) -> int:
        groups = [getattr(method(stage).options, "group_size", None) for stage in history]
        least = max([_COLUMNS, *(2 * size for size in groups if isinstance(size, int))])  # a row of several groups
        for fewer in range(least, inputs):
            alike = all(inputs % size or fewer % size == 0 for size in (32, 64, 128))  # what "auto" looks at
            if inputs % fewer == 0 and alike and not any(method(s).check_shape((self.rows, fewer)) for s in history):
                return fewer
        return inputs

    @functools.cache  # noqa: B019 (it goes when the estimate is made)
    def _trial(self, history: tuple[Stage, ...], inputs: int) -> Trial:
        few = min(_FEW_ROWS, self.rows)
        before, counter = self._state(history[:-1], self.rows, inputs), self._count(history, self.rows, inputs)
        begin = time.perf_counter()
        after = self._run(history[-1], before)
        seconds = time.perf_counter() - begin
        seconds -= counter.products / self.speed.products + counter.factors / self.speed.factors
        working = 0.0
        if few < self.rows:
            working = (counter.peak - self._count(history, few, inputs).peak) / ((self.rows - few) * inputs)
        return Trial(
            after,
            max(seconds, 0.0) / (self.rows * inputs),
            counter.products / (self.rows * inputs**2),
            counter.factors / inputs**3,
            working,
            max(0.0, counter.peak - working * self.rows * inputs) / inputs**2,
        )

    @functools.cache  # noqa: B019
    def _state(self, history: tuple[Stage, ...], rows: int, inputs: int) -> LayerState:
        if history:
            return self._run(history[-1], self._state(history[:-1], rows, inputs))
        weight = 0.02 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
        return LayerState(weight.to(self.device, self.dtype))

    def _count(self, history: tuple[Stage, ...], rows: int, inputs: int) -> Counter:
        before = self._state(history[:-1], rows, inputs)
        self._statistics(inputs)
        with Counter() as counter:
            self._run(history[-1], before)
        return counter

    @functools.cache  # noqa: B019
    def _statistics(self, inputs: int) -> Statistics:
        x = torch.randn(2 * inputs, inputs, generator=torch.Generator().manual_seed(1)).to(self.device)
        gram = x.T @ x
        return Statistics(len(x), gram.diagonal().contiguous(), gram)

    def _run(self, stage: Stage, before: LayerState) -> LayerState:
        backend = method(stage)
        assert isinstance(backend, Backend)
        found = self._statistics(before.weight.shape[1])
        seen = found if "gram" in backend.needs else Statistics(found.tokens, found.squared_norms)
        after = backend.apply(before, seen if backend.needs else None)
        pipeline.relative_error(before.weight, after.weight, seen if backend.needs else None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return after
