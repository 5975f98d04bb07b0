"""Fitting samples to a model: what the forward takes beside them, how many at once, how long.

All of this is seen in a forward without weights (`models.rehearsal`), so that a model that cannot
read its calibration data is refused before anything is computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples, Windows, without_labels
from optimum_order.errors import DataError
from optimum_order.models import rehearsal
from optimum_order.models.rehearsal import Rehearsal, rehearse, takes

_MOST_ARGUMENTS = 6


def usable_length(model: PreTrainedModel, wanted: int) -> int:
    """Return the tokens, at most `wanted`, of the longest window that a model can read.

    Args:
        model: From `models.rehearsal.outline`.
        wanted: Tokens.
    """
    start = decoder_start(model)

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        return Windows(ids, "", decoder_start=start).tensors

    return rehearsal.usable_length(model, wanted, inputs)


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the token that begins the input of a model's decoder; None without encoder."""
    config = model.config
    if not config.is_encoder_decoder or "decoder_input_ids" not in takes(model):
        return None
    for settings in (config, getattr(model, "generation_config", None), config.get_text_config()):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(settings, name, None)
            if isinstance(token, int):
                return token
    return 0


def fitted(samples: Samples, model: PreTrainedModel) -> Samples:
    """Return samples with all that the forward of a model needs, in batches that it takes.

    Args:
        samples: The samples.
        model: From `models.rehearsal.outline`.

    Raises:
        DataError: If the model cannot read the samples.
    """
    samples.check(model)
    if isinstance(samples, Windows):
        samples = replace(samples, decoder_start=decoder_start(model))
    several = _run(samples, model, 2)
    if several.refusal is not None:
        single = _run(samples, model, 1)
        if single.refusal is None:  # such as a classifier that finds no end in a batch
            several = single
            samples = replace(samples, largest_batch=1)  # type: ignore[type-var]
    _refuse(samples, model, several)
    return samples


def _run(samples: Samples, model: PreTrainedModel, count: int) -> Rehearsal:
    """Rehearse some samples, first those with the largest ids."""
    tensors = without_labels(samples.tensors)
    rows = [
        int(tensor.reshape(len(tensor), -1).amax(1).argmax())
        for tensor in tensors.values()
        if not tensor.is_floating_point() and tensor.numel()
    ]
    rows = list(dict.fromkeys([*rows, *range(count)]))
    index = torch.tensor(rows[:count] if count == 1 else rows)
    few = samples.take(index[index < len(samples)])
    inputs = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in without_labels(few.tensors).items()
    }
    return rehearse(model, inputs)


def _refuse(samples: Samples, model: PreTrainedModel, run: Rehearsal) -> None:
    name = type(model).__name__
    inputs = " and ".join(f"'{argument}'" for argument in without_labels(samples.tensors))
    for overrun in run.overruns:
        raise DataError(
            f"{name} looks up row {overrun.index} of '{overrun.table}', which has {overrun.rows} "
            f"rows, for the {samples.unit}s of {samples.source}. Give shorter ones "
            "(--sequence-length), or data of the tokenizer that belongs to the model."
        )
    if run.refusal is not None:
        arguments = takes(model)
        more = ", ..." if len(arguments) > _MOST_ARGUMENTS else ""
        raise DataError(
            f"{name} cannot read {inputs} of {samples.source} alone ({run.refusal.rstrip('.')}). "
            f"Its forward takes {', '.join(arguments[:_MOST_ARGUMENTS])}{more}. Give these as "
            "tensors that its processor has made: calibration={'input_ids': ..., ...}, or a "
            ".safetensors file that holds them by name (--calibration inputs.safetensors); or use "
            "methods that need no data: magnitude, rtn, bitsandbytes."
        )
