"""The error of a changed layer, measured on its outputs where calibration gave its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics


def squared_error(delta: Tensor, statistics: Statistics) -> float:
    """Return `||X delta^T||^2 = tr(delta H delta^T)`, or its diagonal part without a Gram matrix.

    Args:
        delta: (out, in), the difference of two weights.
        statistics: The layer's inputs.
    """
    delta = delta.float()
    if Gram in statistics:
        products: Tensor = torch.linalg.vecdot(delta @ statistics[Gram], delta)
    else:
        products = delta.square() @ statistics[SquaredNorms]
    return products.sum(dtype=torch.float64).item()


def added_loss(delta: Tensor, gram: Tensor, sensitivity: Tensor) -> float:
    """Return `1/2 sum_r s_r (delta H delta^T)_rr`, the loss added to the second order.

    Args:
        delta: (out, in), the difference of two weights.
        gram: (in, in), `H` of the layer's inputs.
        sensitivity: (out,), the mean squared gradient of the loss by each output.

    Source: Hassibi & Stork 1993, with the Fisher information of the outputs as the Hessian.
    """
    delta = delta.float()
    rows: Tensor = torch.linalg.vecdot(delta @ gram, delta)
    return (rows.double() @ sensitivity.double()).item() / 2


def relative_error(
    before: Tensor, after: Tensor, statistics: Statistics | None
) -> tuple[float, str]:
    """Return the squared error over the squared size of a layer, and where both were measured.

    Args:
        before: (out, in), the weight before a change.
        after: (out, in), the weight after it.
        statistics: The layer's inputs, or None.

    Returns:
        The ratio, and "outputs" (`tr(dW H dW^T) / tr(W H W^T)`), "inputs" (the same with the
        diagonal of H) or "weights" (without statistics).
    """
    delta = after.float() - before.float()
    if statistics is None or statistics.tokens == 0 or SquaredNorms not in statistics:
        size = before.float().square().sum().item()
        error = delta.square().sum().item()
        measured_on = "weights"
    else:
        size = squared_error(before, statistics)
        error = squared_error(delta, statistics)
        measured_on = "outputs" if Gram in statistics else "inputs"
    return (error / size if size else 0.0), measured_on
