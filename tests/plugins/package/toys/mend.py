"""Refit the scales of quantized rows in closed form, codes and zeros untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_order.backends import Recovery
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram


@dataclasses.dataclass(frozen=True)
class MendOptions:
    """No option of its own."""


class Mend(Recovery):
    """Multiply the scales of each row q by `f = (w H q^T) / (q H q^T)`, w the original's row.

    This f minimizes `||X w^T - f X q^T||` for the inputs X that the layer has now, `H = X^T X`.
    A layer whose shape is not the original's has no such rows, and is left as it is.
    """

    name = "mend"
    summary = "refit the scales of quantized rows to the original layer"
    Options = MendOptions

    def recover(
        self,
        model: nn.Module,
        states: Mapping[str, LayerState],
        batches: Sequence[Mapping[str, Tensor]],
        teacher: nn.Module,
    ) -> Mapping[str, LayerState]:
        original = {name: teacher.get_submodule(name).weight.detach() for name in states}
        quantized = {
            name: state
            for name, state in states.items()
            if isinstance(state.grid, UniformGrid)
            and state.weight.shape == original[name].shape
            and self.covers(name)
        }
        grams = _grams(model, list(quantized), batches)
        return {
            name: _mended(state, original[name], grams[name]) for name, state in quantized.items()
        }


def _mended(state: LayerState, original: Tensor, gram: Tensor) -> LayerState:
    """Return the layer with other scales.

    Args:
        state: On a `UniformGrid`.
        original: (out, in), the weight that the layer had once.
        gram: (in, in), of the layer's inputs.
    """
    grid = state.grid
    assert isinstance(grid, UniformGrid)
    products = state.weight.float() @ gram  # (out, in)
    size = (products * state.weight.float()).sum(1)  # (out,)
    factor = (products * original.float()).sum(1) / size
    factor = torch.where((size > 0) & (factor > 0), factor, 1.0)
    scale = (grid.scale.float() * factor[:, None]).to(grid.dtype)
    refitted = dataclasses.replace(grid, scale=scale)
    weight = refitted.dequantize(grid.quantize(state.weight))
    return dataclasses.replace(state, weight=weight, grid=refitted)


@torch.no_grad()
def _grams(
    model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the Gram matrix of the inputs of some layers, by name."""
    sums: dict[str, Gram] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        sums[name] = Gram(module.in_features, module.weight.device)

        def see(module: nn.Module, inputs: Any, gram: Gram = sums[name]) -> None:
            gram.update(inputs[0].flatten(0, -2))

        hooks.append(module.register_forward_pre_hook(see))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: gram.result() for name, gram in sums.items()}
