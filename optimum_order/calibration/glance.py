"""The statistics of some layers from plain forwards, for callers that change no weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.calibration.capture import Capture
from optimum_order.data.samples import placed
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.models import hf, precision
from optimum_order.models.units import Target


def glance(
    model: PreTrainedModel,
    targets: Iterable[Target],
    batches: Sequence[dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Statistics]:
    """Gather the Gram matrix of each layer's inputs, all of them in memory at once.

    Args:
        model: In evaluation mode; it is run as it is.
        targets: The layers.
        batches: Keyword arguments of the model's forward.
        dtype: To multiply in, from `precision.choose`.

    Returns:
        The statistics by layer; zero tokens for a layer that was not reached.

    Raises:
        ModelError: If an input was NaN or infinite.
    """
    capture = Capture(targets, {Gram}, dtype)
    multiplying = precision.forwards(dtype, model.dtype, model.device)
    with torch.inference_mode(), hf.eager_experts(model), multiplying:
        for batch in batches:
            with capture:
                model(**placed(batch, model))
    return capture.statistics()
