"""Cost of a recovery that learns from the original model, from the shapes of a forward."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from optimum_order.backends.base import Recovery
from optimum_order.errors import OrderError
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.trace import UnitCost
from optimum_order.models.units import Target

_FLOAT = 4
"""Bytes of a number, whatever the model has: what learns is float32."""
_LOGITS_MOVED, _WEIGHTS_MOVED, _LEARNED_MOVED = 4, 16, 16
"""How often a step reads and writes its logits, the weights, and what it learns."""
_LOGITS, _WEIGHTS, _LEARNED = 6, 2, 6
"""Copies of the same that are in memory at once."""


class LearningCost(NamedTuple):
    """Cost of all steps of a recovery.

    Args:
        seconds: Of all of them.
        operations: Floating-point operations of the products.
        memory: Bytes, beside the model.
    """

    seconds: float
    operations: float
    memory: int


def learning_cost(
    method: Recovery,
    model: PreTrainedModel,
    targets: Collection[Target],
    costs: Mapping[str, UnitCost],
    speed: Rates,
    sizes: Sequence[int],
) -> LearningCost:
    """Return the cost of a recovery.

    Args:
        method: The recovery.
        model: On the meta device.
        targets: The layers of the model.
        costs: What each block takes for the first batch, from `trace`.
        speed: Of this machine.
        sizes: Samples of each batch.

    Raises:
        OrderError: If the method has no workload.
    """
    work = method.workload(sum(sizes))
    if work is None:
        raise OrderError(
            f"Stage '{method.stage}' cannot be estimated: the method {method.name} states no "
            "workload. Leave the stage out of the estimate, or run it."
        )
    batch = work.batch_size / sizes[0]  # of a step, as a part of what was traced
    runs, steps = work.forward / sizes[0], work.rounds * batch
    blocks = sum(cost.products for cost in costs.values())
    inner = sum(cost.traffic for cost in costs.values()) * _FLOAT / model.dtype.itemsize
    logits, head = _head(model, costs)
    shapes = [target.view.shape for target in targets if method.covers(target.name, target.kind)]
    weights = sum(map(math.prod, shapes))
    learned = sum(method.learned((rows, inputs)) for rows, inputs in shapes)
    # a backward pass takes two products for one, and one in the head, which does not learn
    operations = (runs + 2 * steps) * blocks + (runs + steps) * head
    moved = (runs + 2 * steps) * inner + (runs + 3 * steps) * _LOGITS_MOVED * _FLOAT * logits
    moved += work.rounds * _FLOAT * (_WEIGHTS_MOVED * weights + _LEARNED_MOVED * learned)
    numbers: float = 2 * model.num_parameters()  # the student and the original
    numbers += _WEIGHTS * weights + _LEARNED * learned
    working = max((cost.working for cost in costs.values()), default=0) / model.dtype.itemsize
    numbers += batch * (_LOGITS * logits + 2 * working)
    seconds = operations / speed.products + moved / speed.traffic
    return LearningCost(seconds, operations, int(_FLOAT * numbers))


def _head(model: PreTrainedModel, costs: Mapping[str, UnitCost]) -> tuple[int, float]:
    """Return the number and the operations of the logits of the traced batch; 0 without a head."""
    head = model.get_output_embeddings()
    if head is None:
        return 0, 0.0
    rows = max((read.rows for cost in costs.values() for read in cost.inputs), default=0)
    words, width = head.weight.shape
    return rows * words, 2.0 * rows * words * width
