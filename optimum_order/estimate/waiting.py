"""The activations that wait in memory where a walk pauses at layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from optimum_order.errors import OptimumOrderError
from optimum_order.estimate.size import empty
from optimum_order.estimate.trace import trace
from optimum_order.models.source import Checkpoint, InMemory
from optimum_order.models.units import find_units


def in_flight(
    source: Checkpoint | InMemory,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
) -> int | None:
    """Return the bytes of activations of all batches in the block that holds most.

    Args:
        source: The model; no weight is read.
        batches: Calibration inputs, of which the shapes count.
        targets: As in `find_units`.
        ignore: As in `find_units`.

    Returns:
        The bytes, or None where the forward cannot be traced without numbers, or multiplies a
        layer more than once: such a model is calibrated block by block.
    """
    try:
        model = empty(source)
        units = find_units(model, targets, ignore)
        costs = trace(model, units, batches[0])
    except OptimumOrderError:
        return None
    reads = [name for cost in costs.values() for name in cost.reads]
    if len(reads) != len(set(reads)):
        return None
    most = max(cost.waiting + cost.working for cost in costs.values())
    sizes = [max(len(tensor) for tensor in batch.values()) for batch in batches]
    return int(most * sum(sizes) / sizes[0])
