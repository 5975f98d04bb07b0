"""The speed of this machine, measured in a second: products, factorizations, reading, writing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from optimum_order.models import precision

_SECONDS = 0.15
"""How long each rate is measured."""
_SIZE = 768
"""Of the matrix that is factored."""


@dataclass(frozen=True)
class Rates:
    """What is done in a second.

    Args:
        forward: Floating-point operations of matrix products in a forward.
        gram: The same in sums of X^T X.
        products: The same in the methods, in float32.
        factors: Floating-point operations of Cholesky factorisations.
        traffic: Bytes read and written by operators on whole tensors.
        hashing: Bytes put through sha256.
    """

    forward: float
    gram: float
    products: float
    factors: float
    traffic: float
    hashing: float


def measure(
    device: torch.device, model_dtype: torch.dtype, dtype: torch.dtype, rows: int, width: int
) -> Rates:
    """Time each on this device.

    Args:
        device: Where the model will run.
        model_dtype: The model's.
        dtype: What calibration multiplies in.
        rows: How many rows a product has.
        width: Inputs and outputs of a typical layer.
    """
    rows, width = min(rows, 4096), min(width, 2048)
    with torch.inference_mode(), precision.forwards(dtype, model_dtype, device):
        forward = products(device, model_dtype, rows, width)
    x, sums = torch.randn(rows, width, device=device), torch.zeros(width, width, device=device)
    with precision.products(dtype, device):
        gram = 2 * rows * width**2 / _fastest(lambda: sums.addmm_(x.T, x), device)
    matrix = torch.eye(_SIZE, device=device) + 0.01
    factors = _SIZE**3 / 3 / _fastest(lambda: torch.linalg.cholesky_ex(matrix), device)
    x = torch.randn(rows, width, device=device).to(model_dtype)
    y = torch.empty_like(
        x
    )  # new memory comes at either of two prices, many times apart, and which is chance
    traffic = 2 * x.nbytes / _fastest(lambda: torch.sigmoid(x, out=y), device)
    data = bytes(2**22)
    hashing = len(data) / _fastest(lambda: hashlib.sha256(data), device)
    return Rates(
        forward, gram, products(device, torch.float32, rows, width), factors, traffic, hashing
    )


def products(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    """Floating-point operations in a second of products (rows, width) x (width, width)."""
    x, w = (torch.randn(count, width, device=device).to(dtype) for count in (rows, width))
    return 2 * rows * width * width / _fastest(lambda: functional.linear(x, w), device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs after the first, which sets up."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    end, times = time.perf_counter() + _SECONDS, [timed()]
    while time.perf_counter() < end:
        times.append(timed())
    return min(times)
