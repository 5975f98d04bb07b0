"""Distill the original model into the compressed one, on the masks and grids that it has.

Weights that were removed stay removed. A quantized layer learns behind its grid: the forward pass
rounds, the backward pass does not, so that codes change and scales do not.

Source: Hinton et al. 2015, arXiv 1503.02531 (distillation); Bengio et al. 2013, arXiv 1308.3432
(the straight-through estimator).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from optimum_order.backends.learning import (
    Learning,
    Student,
    batch_size_option,
    rate_option,
    steps_option,
)
from optimum_order.layers.state import LayerState

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """How long, and how fast."""

    steps: int = steps_option()
    rate: float = rate_option(1e-4)
    batch_size: int = batch_size_option()


class Distill(Learning):
    """Minimize the divergence of the model's predictions from those of the original."""

    name = "distill"
    summary = "learn from the original model, on the masks and grids that layers have"
    Options = DistillOptions
    options: DistillOptions

    def student(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ) -> Student:
        return _Weights(model, states, teacher)


class _Weights(Student):
    """Learns a weight in float32 behind the mask and the grid of each layer."""

    def __init__(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ):
        super().__init__(model, states, teacher)
        for name, state in self.states.items():
            self.learned[name] = nn.Parameter(state.weight.detach().float().clone())

    def _on_grid(self, name: str) -> Tensor:
        state = self.states[name]
        mask = state.mask
        weight = self.learned[name].detach().to(state.weight.dtype).masked_fill(mask, 0.0)
        if state.grid is not None:
            weight = state.grid.nearest(weight).masked_fill(mask, 0.0)
        return weight + 0.0  # no zero has a sign

    def effective(self, name: str) -> Tensor:
        latent = self.learned[name].masked_fill(self.states[name].mask, 0.0)
        return latent + (self._on_grid(name).float() - latent).detach()

    def after(self) -> dict[str, LayerState]:
        return {
            name: dataclasses.replace(state, weight=self._on_grid(name))
            for name, state in self.states.items()
        }
