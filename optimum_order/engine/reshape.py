"""Cut one layer to the rows and columns that a reshaper keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optimum_order.backends.base import Cut, Reshaper
from optimum_order.errors import InvariantError, OrderError
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.models.units import Target


def cut(
    reshaper: Reshaper, target: Target, state: LayerState, cuts: Sequence[Cut]
) -> tuple[LayerState, StageRecord]:
    """Replace a layer's parameter, and its bias, by a smaller one.

    Args:
        reshaper: What decided.
        target: The layer, an `nn.Linear` of its own.
        state: The layer before.
        cuts: At most one for each axis.

    Returns:
        The layer after, and what was removed: the squared size of what is gone over that of all.

    Raises:
        OrderError: If the layer is not an `nn.Linear`, or its grid breaks.
        InvariantError: If the cuts do not fit the layer.
    """
    module = target.module
    if not isinstance(module, nn.Linear):
        raise OrderError(
            f"Stage '{reshaper.stage}' cannot make '{target.name}' smaller: only nn.Linear can be, "
            f"got {type(module).__name__}."
        )
    size = state.weight.float().square().sum().item()
    bias: Tensor | None = module.bias
    for one in cuts:
        _check(reshaper, target, one, state.weight.shape[one.axis])
        state = _sliced(reshaper, target, state, one)
        if one.axis == 0 and bias is not None:
            bias = bias[one.indices]
    with torch.inference_mode(False):  # its parameters stay ordinary ones
        module.weight = nn.Parameter(state.weight.clone(), requires_grad=False)
        if bias is not None and bias is not module.bias:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    module.out_features, module.in_features = state.weight.shape
    left = state.weight.float().square().sum().item()
    error = 1 - left / size if size else 0.0
    return state, StageRecord(str(reshaper.stage), error, "weights")


def _check(reshaper: Reshaper, target: Target, one: Cut, length: int) -> None:
    index = one.indices
    ordered = index.unique()
    fits = index.ndim == 1 and 0 < len(ordered) == len(index)
    if not fits or ordered[0] < 0 or ordered[-1] >= length:
        raise InvariantError(
            f"Stage '{reshaper.stage}': the cut of '{target.name}' along axis {one.axis} must name "
            f"1 to {length} of its {length} rows or columns, each once."
        )


def _sliced(reshaper: Reshaper, target: Target, state: LayerState, one: Cut) -> LayerState:
    index = one.indices.to(state.weight.device)
    grid = state.grid
    if grid is not None:
        everything = torch.arange(state.weight.shape[1 - one.axis])
        rows, columns = (index, everything) if one.axis == 0 else (everything, index)
        try:
            grid = grid.take(rows, columns)
        except ValueError as error:
            raise OrderError(
                f"Stage '{reshaper.stage}' breaks the grid of '{target.name}': {error}. "
                "Put it before the quantization."
            ) from error
    pruned = state.pruned
    return dataclasses.replace(
        state,
        weight=state.weight.index_select(one.axis, index),
        pruned=None if pruned is None else pruned.index_select(one.axis, index),
        grid=grid,
    )
