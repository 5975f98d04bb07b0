"""What calibration learns about the inputs of one layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What calibration knows about the inputs `X` (tokens, in) of one layer.

    Args:
        tokens: How many rows `X` had; 0 for an expert that no token reached.
        squared_norms: (in,) float32, the sum over tokens of `x_j ** 2`.
        gram: (in, in) float32, `X^T X`; None unless a stage needed it.
    """

    tokens: int
    squared_norms: Tensor
    gram: Tensor | None = None
    _derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def derived(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of these statistics, made once for all layers that read the same input."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def isotropic(self) -> Statistics:
        """The statistics of white noise: all that can be assumed of inputs nobody has seen."""
        gram = (
            None
            if self.gram is None
            else torch.eye(len(self.squared_norms), device=self.gram.device)
        )
        return Statistics(tokens=0, squared_norms=torch.ones_like(self.squared_norms), gram=gram)

    def squared_error(self, delta: Tensor) -> float:
        """`||X delta^T||^2 = tr(delta H delta^T)`, or its diagonal part where there is no Gram matrix."""
        delta = delta.float()
        if self.gram is not None:
            return torch.linalg.vecdot(delta @ self.gram, delta).sum(dtype=torch.float64).item()
        return torch.sum(delta.square() @ self.squared_norms, dtype=torch.float64).item()
