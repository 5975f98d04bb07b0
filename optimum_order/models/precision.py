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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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
    """Have a model multiply as fast as its processor can while the context is active.

    A float32 model multiplies in another dtype. A bfloat16 model on a processor without units for
    bfloat16 has its products computed in float32: torch's own kernels are several times slower
    there. The sums are float32 in both, and the results are rounded to bfloat16, as everywhere.

    Args:
        dtype: The other dtype.
        model_dtype: The model's.
        device: The model's.
        cache: Whether to cast each weight once: weights must not change meanwhile then.
    """
    if model_dtype == torch.bfloat16 and device.type == "cpu" and not has_units(device):
        return _InFloat32()  # type: ignore[no-untyped-call]  # of torch
    if dtype == model_dtype or model_dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.linear.default,
    _aten.matmul.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten.scaled_dot_product_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
"""What `_InFloat32` computes. Under inference mode composite operators arrive whole."""


class _InFloat32(TorchDispatchMode):
    """Computes products of bfloat16 tensors in float32, and rounds the results to bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func not in _PRODUCTS or all(tensor.dtype != torch.bfloat16 for tensor in tensors):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return result.bfloat16()
        # attention also gives the logarithms of its sums, which are float32 everywhere
        return type(result)(
            part.bfloat16() if isinstance(part, Tensor) and part.ndim == 4 else part
            for part in result
        )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


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


def sums_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """Return what sums of products of float32 matrices really multiply on a device.

    Args:
        dtype: What calibration multiplies in, from `choose`.
        device: Where the sums are.

    Returns:
        "float32"; "bfloat16", where a processor has units for it; "tfloat32" on a CUDA device,
        where torch rounds no further.
    """
    if dtype != torch.bfloat16:
        return "float32"
    if device.type == "cuda":
        return "tfloat32"
    return "bfloat16" if has_units(device) else "float32"


def describe(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Return what a manifest says: what a calibration multiplies in, and its sums of products.

    Args:
        dtype: From `choose`.
        device: Where calibration runs.
    """
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "sums": sums_dtype(dtype, device),
    }


@contextlib.contextmanager
def products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices round their inputs, where that is faster on a device.

    The setting of torch is enough for CUDA devices and for processors with units for matrices
    (AMX). It changes nothing on processors that multiply bfloat16 in vectors only (AVX512-BF16),
    so there the matrices are cast.

    Args:
        dtype: bfloat16, or another dtype that changes nothing.
        device: Where the matrices are.
    """
    used = sums_dtype(dtype, device)
    if used == "float32":
        yield
    elif used == "bfloat16" and not _has_matrix_units():
        with _InBfloat16():  # type: ignore[no-untyped-call]  # of torch
            yield
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _has_matrix_units() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())  # nothing public says so


class _InBfloat16(TorchDispatchMode):
    """Multiplies float32 matrices as bfloat16 and adds the products to float32 sums.

    Each product is summed in float32 and rounded to bfloat16 once, as torch has no kernel for CPUs
    that returns the sums: 0.1 % of an entry, which differs from batch to batch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SUMS and all(tensor.dtype == torch.float32 for tensor in args):
            *sums, a, b = args
            product = (a.bfloat16() @ b.bfloat16()).float()
            if not sums:
                return product
            if func == _aten.addmm_.default and not kwargs:
                return sums[0].add_(product)
        return func(*args, **kwargs)


_SUMS = {_aten.mm.default, _aten.addmm_.default}
"""What accumulators and errors of layers are computed with."""
