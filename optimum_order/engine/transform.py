"""Rewrite the weights of a model, and check that the model computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
    sizes = method.sizes(model)
    with _in_float32(model), check_function(method, model, batches):
        _rewrite(method, model, sizes)
    return sizes


@contextlib.contextmanager
def check_function(
    method: Transform, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[None]:
    """Check that the model computes the same after what is done inside.

    Args:
        method: The transform that does so.
        model: The model.
        batches: Calibration inputs; the first is what the check runs on.

    Raises:
        DataError: If there is no batch to check on.
        InvariantError: If an output changed by more than the transform's tolerance.
    """
    if not batches:
        raise DataError(
            f"Stage '{method.stage}' is checked on a batch: pass calibration=... "
            "(--calibration): text, images or 'builtin'."
        )
    before = _outputs(model, batches[0])
    yield
    after = _outputs(model, batches[0])
    change = ((after - before).abs().max() / before.abs().max().clamp(min=1e-30)).item()
    if not change <= method.tolerance:
        raise InvariantError(
            f"Stage '{method.stage}' changed an output by {change:.2g} of the largest, "
            f"more than {method.tolerance:g}. This is a bug in the method, not in your input."
        )


def transform_again(method: Transform, model: PreTrainedModel, sizes: Sizes) -> None:
    """Do to a model what a transform did to one like it, bit for bit.

    Args:
        method: The transform.
        model: The model as it was before.
        sizes: What `transform` returned.
    """
    with _in_float32(model):
        _rewrite(method, model, sizes)


def _rewrite(method: Transform, model: PreTrainedModel, sizes: Sizes) -> None:
    """Rewrite parameters that are in float32 and not shared."""
    with torch.inference_mode(False), torch.no_grad():
        method.transform(model)
    set_sizes(model, sizes)


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Give the model new parameters in float32, none of them shared; then round them again."""
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    renew_parameters(model, torch.float32)
    yield
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])


@torch.inference_mode()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of the model in float32: logits, or hidden states of an encoder."""
    output: Any = model(**placed(batch, model))
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).float()
