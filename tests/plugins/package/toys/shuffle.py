"""Permute the channels of each MLP: another model of the same function."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from optimum_order.backends import Transform, option
from optimum_order.errors import OrderError


@dataclasses.dataclass(frozen=True)
class ShuffleOptions:
    """Which permutation."""

    seed: int = option(0, "seed of the permutation")


class Shuffle(Transform):
    """Permute the rows of gate and up, and the columns of down likewise."""

    name = "shuffle"
    summary = "permute the channels of the MLPs"
    Options = ShuffleOptions

    def transform(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.options.seed)
        mlps = [module for module in model.modules() if hasattr(module, "gate_proj")]
        if not mlps:
            raise OrderError(f"Stage '{self.stage}': the model has no gated MLP.")
        for mlp in mlps:
            order = torch.randperm(mlp.down_proj.in_features, generator=generator)
            mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[order]
            mlp.up_proj.weight.data = mlp.up_proj.weight.data[order]
            mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
