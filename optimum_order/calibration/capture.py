"""Seeing which input meets which weight, without knowing any architecture.

A layer is recognised by the memory its weight lies in, at the moment torch multiplies it with something. So one
mechanism serves `nn.Linear`, GPT-2's `Conv1D` and the single experts of a fused parameter, and q/k/v or gate/up,
which read the same tensor, share one accumulator without anyone saying so.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optimum_order.calibration.statistics import Accumulator
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layer import Statistics
from optimum_order.targets import Target

# Which positional arguments of a product are its input and its weight.
_PRODUCTS = {
    torch.nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}


class Capture(TorchFunctionMode):
    """While active, accumulates the inputs of the targets that it watches.

    Args:
        targets: The layers to watch.
        gram: Whether to keep `X^T X` and not only its diagonal.
    """

    def __init__(self, targets: Iterable[Target], *, gram: bool):
        super().__init__()
        self.gram = gram
        self.watched = {target.view.data_ptr(): target for target in targets}
        self.accumulators: dict[str, Accumulator] = {}
        self.leaders: dict[str, str] = {}
        """For each layer seen, the first layer that read the same input."""
        self._last: dict[str, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        places = _PRODUCTS.get(func)
        if places and len(args) > places[1]:
            target = self.watched.get(args[places[1]].data_ptr())
            if target is not None:
                self._see(target, args[places[0]])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        self._last.clear()  # kept only so that an address cannot be reused while we compare it
        return super().__exit__(*exception)

    def _see(self, target: Target, x: Tensor) -> None:
        name = target.name
        if name not in self.leaders:
            shared = (leader for leader, last in self._last.items() if _same(last, x))
            self.leaders[name] = next(shared, name)
        leader = self.leaders[name]
        if leader != name:
            if leader not in self._last or not _same(self._last[leader], x):
                raise InvariantError(f"'{name}' shared its input with '{leader}' in one batch and not in the next.")
            return
        if leader not in self.accumulators:
            self.accumulators[leader] = Accumulator(x.shape[-1], gram=self.gram, device=x.device)
        self.accumulators[leader].add(x)
        self._last[leader] = x

    def statistics(self) -> dict[str, Statistics]:
        """What is known about every watched layer, by name; zero tokens where none came by.

        Raises:
            ModelError: If an input was NaN or infinite.
        """
        results = {leader: accumulator.result() for leader, accumulator in self.accumulators.items()}
        for target in self.watched.values():
            if target.name not in self.leaders:
                inputs, device = target.view.shape[1], target.view.device
                results[target.name] = Accumulator(inputs, gram=self.gram, device=device).result()
        for name, statistics in results.items():
            if not torch.isfinite(statistics.squared_norms).all():
                raise ModelError(
                    f"The inputs of '{name}' are NaN or infinite on the calibration data, so nothing can be learnt "
                    "from them. Load the model with dtype='float32', or leave the layer out with 'ignore'."
                )
        return {target.name: results[self.leaders.get(target.name, target.name)] for target in self.watched.values()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
