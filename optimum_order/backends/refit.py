"""Refit the scales of layers and the gains of norms; codes and zeros stay, bit for bit.

A quantized layer keeps its codes, and each scale is multiplied by a factor that is learned. A layer
without a grid gets a factor for each row, so that what was removed stays removed. The gains of
norms are learned too. Scales and gains are rounded, as they are stored, in every forward pass.

Source: Hinton et al. 2015, arXiv 1503.02531 (distillation); Li et al. 2023, arXiv 2309.02784
(norms alone recover a part of what quantization loses).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_order.backends.base import option
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
class RefitOptions:
    """How long, how fast, and what."""

    steps: int = steps_option(60)
    rate: float = rate_option(2e-3)
    batch_size: int = batch_size_option()
    norms: bool = option(True, "learn the gains of norms too, where 'targets' names no layers")


class Refit(Learning):
    """Minimize the divergence of predictions by the scales of layers and the gains of norms."""

    name = "refit"
    summary = "learn scales and gains of norms from the original model; codes and zeros stay"
    Options = RefitOptions
    options: RefitOptions

    def learned(self, shape: tuple[int, int]) -> int:
        return shape[0]  # groups have a scale each, which is little too

    def student(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ) -> Student:
        norms = gains(model) if self.options.norms and not self.targets else {}
        free = {n: s for n, s in states.items() if s.grid is None or s.grid.scales is not None}
        return _Scales(model, free, teacher, norms)


def gains(model: nn.Module) -> dict[str, Tensor]:
    """Return the gains of the norms of a model by name: vectors that are called `weight`."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.rpartition(".")[2] == "weight"
    }


class _Scales(Student):
    """Learns the logarithm of a factor for each scale, and the gains of norms.

    Args:
        model: As in `Student`.
        states: Layers on a grid with free scales, or on none.
        teacher: As in `Student`.
        norms: The gains that learn, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: Mapping[str, LayerState],
        teacher: PreTrainedModel,
        norms: Mapping[str, Tensor],
    ):
        super().__init__(model, states, teacher)
        self._norms = norms
        self._codes: dict[str, Tensor] = {}
        for name, state in self.states.items():
            scales = None if state.grid is None else state.grid.scales
            if state.grid is not None:
                self._codes[name] = state.grid.quantize(state.weight)
            groups = 1 if scales is None else scales.shape[1]
            shape = (len(state.weight), groups)
            self.learned[name] = nn.Parameter(torch.zeros(shape, device=state.weight.device))
        for name, gain in norms.items():
            self.learned[name] = nn.Parameter(gain.float().clone())

    def _state(self, name: str) -> LayerState:
        """Return a layer with the scales that were learned."""
        state = self.states[name]
        factors = self.learned[name].detach().exp()  # (out, groups)
        if state.grid is None:
            weight = (state.weight.float() * factors).to(state.weight.dtype)
            return dataclasses.replace(state, weight=weight)
        assert state.grid.scales is not None  # see `Refit.student`
        if not self.learned[name].any():
            return state
        grid = state.grid.with_scales(state.grid.scales.float() * factors)
        weight = grid.dequantize(self._codes[name]).masked_fill(state.mask, 0.0)
        return dataclasses.replace(state, weight=weight, grid=grid)

    def effective(self, name: str) -> Tensor:
        state = self.states[name]
        factors = self.learned[name].exp()
        spread = factors.repeat_interleave(state.weight.shape[1] // factors.shape[1], dim=1)
        smooth = state.weight.float() * spread
        return smooth + (self._state(name).weight.float() - smooth).detach()

    def after(self) -> dict[str, LayerState]:
        return {name: self._state(name) for name in self.states}

    def others(self) -> dict[str, Tensor]:
        rounded = self.outside()
        learned = {name: self.learned[name] for name in self._norms}
        return {
            name: gain + (rounded[name].float() - gain).detach() for name, gain in learned.items()
        }

    def outside(self) -> dict[str, Tensor]:
        return {
            name: self.learned[name].detach().to(gain.dtype) for name, gain in self._norms.items()
        }
