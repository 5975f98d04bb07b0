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


def transform(
    method: Transform, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Carry a transform out.

    Args:
        method: The transform.
        model: Changed in place.
        batches: Calibration inputs; the first is what the check runs on.

    Raises:
        DataError: If there is no batch to check on.
        InvariantError: If an output changed by more than the transform's tolerance.
    """
    if not batches:
        raise DataError(
            f"Stage '{method.stage}' is checked on a batch: pass calibration=... "
            "(text, images or 'builtin')."
        )
    before = _outputs(model, batches[0])
    with torch.inference_mode(False), torch.no_grad():
        method.transform(model)
    after = _outputs(model, batches[0])
    change = ((after - before).abs().max() / before.abs().max().clamp(min=1e-30)).item()
    if not change <= method.tolerance:
        raise InvariantError(
            f"Stage '{method.stage}' changed an output by {change:.2g} of the largest, "
            f"more than {method.tolerance:g}. This is a bug in the method, not in your input."
        )


@torch.inference_mode()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of the model in float32: logits, or hidden states of an encoder."""
    output: Any = model(**placed(batch, model))
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).float()
