"""Rewrite the weights of a model, and check that the model computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from optimum_order.backends.base import Transform
from optimum_order.data.samples import placed
from optimum_order.errors import DataError, InvariantError
from optimum_order.models.sizes import Sizes, renew_parameters, set_sizes


def transform(
    method: Transform, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> Sizes:
    """Carry a transform out, in float32.

    Args:
        method: The transform.
        model: Changed in place; its parameters are new ones, none of them shared.
        batches: Calibration inputs; the first is what the check runs on.

    Returns:
        The new values of config fields.

    Raises:
        DataError: If there is no batch to check on.
        InvariantError: If an output changed by more than the transform's tolerance.
    """
    if not batches:
        raise DataError(
            f"Stage '{method.stage}' is checked on a batch: pass calibration=... "
            "(--calibration): text, images or 'builtin'."
        )
    sizes = method.sizes(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    renew_parameters(model, torch.float32)
    before = _outputs(model, batches[0])
    rewrite(method, model, sizes)
    after = _outputs(model, batches[0])
    change = ((after - before).abs().max() / before.abs().max().clamp(min=1e-30)).item()
    if not change <= method.tolerance:
        raise InvariantError(
            f"Stage '{method.stage}' changed an output by {change:.2g} of the largest, "
            f"more than {method.tolerance:g}. This is a bug in the method, not in your input."
        )
    _round(model, dtypes)
    return sizes


def transform_again(method: Transform, model: PreTrainedModel, sizes: Sizes) -> None:
    """Do to a model what a transform did to one like it, bit for bit.

    Args:
        method: The transform.
        model: The model as it was before.
        sizes: What `transform` returned.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    renew_parameters(model, torch.float32)
    rewrite(method, model, sizes)
    _round(model, dtypes)


def rewrite(method: Transform, model: PreTrainedModel, sizes: Sizes) -> None:
    """Rewrite parameters that are in float32 and not shared."""
    with torch.inference_mode(False), torch.no_grad():
        method.transform(model)
    set_sizes(model, sizes)


def _round(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])


@torch.inference_mode()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of the model in float32: logits, or hidden states of an encoder."""
    output: Any = model(**placed(batch, model))
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).float()
