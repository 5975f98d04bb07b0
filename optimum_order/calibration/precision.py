"""How exactly calibration multiplies.

Matrix products are nearly all the work of a calibration. A processor with units for bfloat16
multiplies several times faster in bfloat16 than in float32. The inputs of a float32 model's
products are then rounded to bfloat16, as mixed-precision training does; sums stay float32. What
calibration learns, sums over thousands of tokens, hardly changes. Only calibration does so: a
metric measures the model as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optimum_order.errors import DataError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply in.

    Args:
        name: "float32", "bfloat16", or "auto" for bfloat16 where the processor has units for it
            and the model's own dtype is not as short.
        dtype: The model's.
        device: The model's.

    Raises:
        DataError: If there is no such choice.
    """
    if name != "auto":
        if name not in DTYPES:
            raise DataError(unknown("calibration_dtype", name, ["auto", *DTYPES]))
        return DTYPES[name]
    if dtype == torch.bfloat16 or (dtype == torch.float32 and has_units(device)):
        return torch.bfloat16
    return torch.float32


def has_units(device: torch.device) -> bool:
    """Return whether a processor multiplies bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Nothing public says so.
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def forwards(
    dtype: torch.dtype, model_dtype: torch.dtype, device: torch.device, *, cache: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """Have a float32 model multiply in another dtype while the context is active.

    Args:
        dtype: The other dtype.
        model_dtype: The model's.
        device: The model's.
        cache: Whether to cast each weight once: weights must not change meanwhile then.
    """
    if dtype == model_dtype or model_dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)


def restored(output: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a module's output among `forwards` in the dtype that the rest of the model expects.

    Args:
        output: A tensor, or a tuple or list of tensors and other values.
        dtype: The model's.
        device: The model's.
    """
    if not torch.is_autocast_enabled(device.type):
        return output
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    if type(output) in (tuple, list):
        return type(output)(restored(part, dtype, device) for part in output)
    return output


@contextlib.contextmanager
def products(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices round their inputs, where the processor has units for it.

    Args:
        dtype: bfloat16, or another dtype that changes nothing.
    """
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
