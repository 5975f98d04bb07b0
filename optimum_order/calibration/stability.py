"""Whether a model's forward leaves its weights alone.

A few architectures change parameters in place while they run: RWKV divides some by powers of two.
Weights that were compressed, or are about to be, must not change so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import placed
from optimum_order.errors import ModelError
from optimum_order.models import hf
from optimum_order.models.rehearsal import rehearse

_TOKENS = 16
"""Tokens of a sequence that a forward needs to show what it does."""
_LONGEST_REASON = 300


@contextlib.contextmanager
def unchanged(model: PreTrainedModel, doing: str) -> Iterator[None]:
    """Refuse a model whose parameters change while the context is active.

    Args:
        model: The model. On the meta device, only changes in place can be seen.
        doing: What is done in the context, for the error: "a forward".

    Raises:
        ModelError: If a parameter has other bits, or was written to.
    """
    before = _marks(model)
    yield
    after = _marks(model)
    changed = sorted(name for name in before if before[name] != after.get(name))
    if changed:
        raise ModelError(
            f"{type(model).__name__} changes {len(changed)} of its own weights in {doing}, such as "
            f"'{changed[0]}': what would be calibrated and saved is not what was loaded. Use "
            "methods without data, such as magnitude, rtn or bitsandbytes, and measure the saved "
            "model."
        )


def check_forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Run a model on the first sample of a batch, and refuse it if its weights change.

    Args:
        model: In evaluation mode; may be an outline without weights.
        batch: The arguments of a forward, samples first.

    Raises:
        ModelError: If a parameter changes, or the forward fails.
    """
    tokens = {
        name
        for name, tensor in batch.items()
        if tensor.ndim == 2 and not tensor.is_floating_point()  # a sound is not cut short
    }
    lengths = {batch[name].shape[1] for name in tokens}
    few = slice(_TOKENS) if len(lengths) == 1 else slice(None)
    first = {
        name: tensor[:1, few] if name in tokens else tensor[:1] for name, tensor in batch.items()
    }
    with torch.no_grad(), unchanged(model, "its forward"):
        if model.device.type == "meta":
            rehearse(model, first)  # as far as a forward goes without values
        else:
            try:
                model(**placed(first, model), **hf.uncached(model))
            except Exception:  # some models take whole multiples of a length only
                _run_whole(model, {name: tensor[:1] for name, tensor in batch.items()})


def _run_whole(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> None:
    """Run a model on a sample of its calibration data, before all others.

    Raises:
        ModelError: If the forward raises any error.
    """
    try:
        model(**placed(sample, model), **hf.uncached(model))
    except Exception as error:
        names = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sample.items())
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST_REASON]
        raise ModelError(
            f"The forward of {type(model).__name__} fails on the calibration data ({names}): "
            f"{reason.rstrip('.')}. Give data that the model reads, or use methods without data: "
            "magnitude, rtn, bitsandbytes."
        ) from error


def _marks(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return for each parameter how often it was written to, and the sum of its bits."""
    return {
        name: (parameter._version, 0 if parameter.is_meta else _sum(parameter.detach()))
        for name, parameter in model.named_parameters()
    }


def _sum(tensor: Tensor) -> int:
    """Return the sum of all bytes, of eight at a time where there are eight: that is fast."""
    some = tensor.flatten().view(torch.uint8)
    if some.storage_offset() % 8:
        some = some.clone()  # eight bytes are read as one number only where they are aligned
    eights = len(some) // 8 * 8
    return int(some[:eights].view(torch.int64).sum()) + int(some[eights:].sum())
