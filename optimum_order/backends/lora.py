"""LoRA: adapters that learn the predictions of the original model; the weights stay, bit for bit.

A layer that has an adapter, as `eora` makes it, goes on from there; any other begins with B = 0, so
that it computes what it computed. A and B are rounded, as they are stored, in every forward pass.

Source: Hu et al. 2021, arXiv 2106.09685 (LoRA); Hinton et al. 2015, arXiv 1503.02531
(distillation); Li et al. 2023, arXiv 2310.08659 (a start that makes up for rounding, LoftQ).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_order.backends.base import option
from optimum_order.backends.eora import rank_option, why_no_rank
from optimum_order.backends.learning import (
    Learning,
    Student,
    batch_size_option,
    rate_option,
    steps_option,
)
from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """How long, how fast, and how large."""

    steps: int = steps_option()
    rank: int = rank_option()
    rate: float = rate_option(1e-3)
    batch_size: int = batch_size_option()
    seed: int = option(0, "of the random start of A", check=lambda v: v >= 0, allowed="0 or more")


class Lora(Learning):
    """Minimize the divergence of predictions by adapters beside the layers."""

    name = "lora"
    summary = "learn low-rank adapters from the original model; weights, masks and grids stay"
    kind = "adapt"
    Options = LoraOptions
    options: LoraOptions

    def covers(self, layer: str, kind: str = "linear") -> bool:
        return kind == "linear" and super().covers(layer, kind)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return why_no_rank(self.options.rank, shape)

    def tried(self, state: LayerState, statistics: Statistics | None = None) -> LayerState:
        if state.adapter is not None:
            return state
        rows, inputs = state.weight.shape
        a = state.weight.new_zeros(self.options.rank, inputs)
        b = state.weight.new_zeros(rows, self.options.rank)
        return dataclasses.replace(state, adapter=LowRank.rounded(a, b, state.weight.dtype))

    def learned(self, shape: tuple[int, int]) -> int:
        return self.options.rank * sum(shape)

    def student(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ) -> Student:
        from optimum_order.models.units import find_targets

        linear = {target.name for target in find_targets(model) if target.kind == "linear"}
        mine = {name: state for name, state in states.items() if name in linear}
        return _Adapters(model, mine, teacher, self.options)


class _Adapters(Student):
    """Learns A and B of each layer in float32.

    Args:
        model: As in `Student`.
        states: As in `Student`.
        teacher: As in `Student`.
        options: Of the method.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: Mapping[str, LayerState],
        teacher: PreTrainedModel,
        options: LoraOptions,
    ):
        from optimum_order.models.adapted import adapt

        super().__init__(model, states, teacher)
        for name in states:
            adapt(self.model.get_submodule(name), None)  # what it adds is in `effective`
        generator = torch.Generator().manual_seed(options.seed)
        for name, state in self.states.items():
            rows, inputs = state.weight.shape
            a, b = torch.empty(options.rank, inputs), torch.zeros(rows, options.rank)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # as PEFT does
            if state.adapter is not None:
                a, b = state.adapter.a.float(), state.adapter.b.float()
            for part, values in (("a", a), ("b", b)):
                self.learned[f"{name}.{part}"] = nn.Parameter(values.to(state.weight.device))

    def _adapter(self, name: str) -> LowRank:
        a, b = (self.learned[f"{name}.{part}"].detach() for part in "ab")
        return LowRank.rounded(a, b, self.states[name].weight.dtype)

    def effective(self, name: str) -> Tensor:
        adapter = self._adapter(name)
        stored = {"a": adapter.a, "b": adapter.b}
        a, b = (_as_stored(self.learned[f"{name}.{part}"], stored[part]) for part in "ab")
        return self.states[name].weight.float() + b @ a

    def after(self) -> dict[str, LayerState]:
        return {
            name: dataclasses.replace(state, adapter=self._adapter(name))
            for name, state in self.states.items()
        }


def _as_stored(learned: Tensor, stored: Tensor) -> Tensor:
    """Return the stored values, with gradients to what is learned as if nothing was rounded."""
    return learned + (stored.float() - learned).detach()
