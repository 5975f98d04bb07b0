"""How fast this machine is, measured in a second or two: products, factorisations, plain reading and writing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SECONDS = 0.15
"""How long each rate is measured."""


@dataclass(frozen=True)
class Rates:
    """What is done in a second.

    Args:
        forward: Floating-point operations of matrix products in the model's dtype.
        products: The same in float32.
        factors: Floating-point operations of Cholesky factorisations.
        traffic: Bytes read and written by operators on whole tensors.
        hashing: Bytes put through sha256.
    """

    forward: float
    products: float
    factors: float
    traffic: float
    hashing: float


def measure(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Rates:
    """Time each on this device.

    Args:
        device: Where the model will run.
        dtype: The model's.
        rows: How many rows a product has.
        width: Inputs and outputs of a typical layer.
    """

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rows, width = min(rows, 4096), min(width, 2048)
    products = {}
    for each in {dtype, torch.float32}:
        x, w = (torch.randn(n, width, device=device).to(each) for n in (rows, width))
        products[each] = 2 * rows * width * width / _fastest(lambda x=x, w=w: torch.nn.functional.linear(x, w), sync)
    size = 768
    gram = torch.eye(size, device=device) + 0.01
    factors = size**3 / 3 / _fastest(lambda: torch.linalg.cholesky_ex(gram), sync)
    x = torch.randn(rows, 4 * width, device=device).to(dtype)
    traffic = 3 * x.nbytes / _fastest(lambda: torch.mul(x, x), sync)  # into new memory, as operators in a model do
    data = bytes(2**22)
    hashing = len(data) / _fastest(lambda: hashlib.sha256(data), lambda: None)
    return Rates(products[dtype], products[torch.float32], factors, traffic, hashing)


def _fastest(run: Callable[[], object], sync: Callable[[], None]) -> float:
    """Seconds of the fastest of several runs after the first, which may have to set something up."""
    run()
    sync()
    found = []
    end = time.perf_counter() + _SECONDS
    while len(found) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        sync()
        found.append(time.perf_counter() - begin)
    return min(found)
