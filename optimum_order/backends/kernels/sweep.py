"""One span of a sweep in one kernel: in a loop of PyTorch, a GPU mostly waits for launches.

The rows of W do not depend on each other. So each program takes a few rows through all columns of
the span, with the weights in registers. Arithmetic is that of the loop in `obs`: float32 with
correct rounding, no fused multiply-add, no TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_order.layers.grids.rounding import AffineRounder, shift_of

_ROWS = 16
"""Rows of W in one program. Few, so that a layer has a program for each processor of the GPU."""
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float32,  # holds every value already
}
_MIDDLE = tl.constexpr(1.5 * 2**23)
"""To add and subtract this number rounds to an integer, half to even, what is below 2^22."""


def fix_columns(
    block: Tensor,
    errors: Tensor,
    removed: Tensor,
    follow: Tensor,
    rounder: AffineRounder | None,
    first: int,
    stop: int,
) -> None:
    """Fix some columns of a block and correct the later ones, see `obs.fix_columns`.

    Args:
        block: (k, out) float32, contiguous.
        errors: (k, out) float32, contiguous.
        removed: (k, out) bool, contiguous.
        follow: (k, at least k) float32.
        rounder: Of the k columns; None leaves survivors as they are.
        first: The first column to fix.
        stop: The column after the last one to fix.
    """
    values = torch.float32
    rounding: tuple[Tensor | float | None, ...] = (None,) * 8
    if rounder is not None:
        values = rounder.dtype
        zone = rounder.dead_zone
        rounding = (
            rounder.step,
            rounder.divisor,
            rounder.zero,
            rounder.offset,
            float(rounder.low),
            float(rounder.high),
            zone,
            None if zone is None else shift_of(zone),
        )
    outputs = block.shape[1]
    with torch.cuda.device_of(block):  # Triton launches on the current device
        _fix_columns_kernel[(triton.cdiv(outputs, _ROWS),)](
            block,
            errors,
            removed.view(torch.uint8),
            follow[first:stop, first:stop].contiguous(),
            *rounding,
            outputs,
            first,
            count=stop - first,
            width=triton.next_power_of_2(stop - first),
            height=_ROWS,
            dtype=_DTYPES[values],
            enable_fp_fusion=False,  # a multiplication and an addition round twice, as in the loop
        )
    if stop < len(block):
        later = follow[first:stop, stop : len(block)]
        block[stop:].addmm_(later.T, errors[first:stop], alpha=-1)


@triton.jit(do_not_specialize=["first"])
def _fix_columns_kernel(
    block,
    errors,
    removed,
    follow,
    step,
    divisor,
    zero,
    offset,
    low,
    high,
    dead_zone,
    shift,
    outputs,
    first,
    count: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    dtype: tl.constexpr,
):
    """Fix count columns from `first` on for height rows of W.

    All matrices are (k, out), but `follow` is (count, count). width is the power of two from
    count on.
    """
    rows = tl.program_id(0) * height + tl.arange(0, height)
    inside = rows < outputs
    columns = tl.arange(0, width)
    weights = tl.load(  # (width, height)
        block + (first + columns)[:, None] * outputs + rows[None, :],
        mask=(columns < count)[:, None] & inside[None, :],
        other=0.0,
    )
    for i in range(count):
        places = (first + i) * outputs + rows
        # one number and zeros: the sum is exact
        weight = tl.sum(tl.where(columns[:, None] == i, weights, 0.0), axis=0)
        value = weight
        if step is not None:
            value = _nearest(
                weight,
                places,
                inside,
                step,
                divisor,
                zero,
                offset,
                low,
                high,
                dead_zone,
                shift,
                dtype,
            )
        gone = tl.load(removed + places, mask=inside, other=0) != 0
        value = tl.where(gone, 0.0, value)
        error = weight - value
        tl.store(block + places, value + 0.0, mask=inside)  # no -0.0
        tl.store(errors + places, error, mask=inside)
        later = (columns > i) & (columns < count)
        effect = tl.load(follow + i * count + columns, mask=later, other=0.0)
        weights -= effect[:, None] * error[None, :]


@triton.jit
def _nearest(
    weight,
    places,
    inside,
    step,
    divisor,
    zero,
    offset,
    low,
    high,
    dead_zone,
    shift,
    dtype: tl.constexpr,
):
    """Return the rounded weights of one column, as `AffineRounder` does, (height,)."""
    steps = tl.load(step + places, mask=inside, other=1.0)
    divisors = steps
    if divisor is not None:
        divisors = tl.load(divisor + places, mask=inside, other=1.0)
    codes = weight
    if offset is not None:
        offsets = tl.load(offset + places, mask=inside, other=0.0)
        codes += offsets
    codes = tl.div_rn(codes, divisors)
    if dead_zone is None:
        codes = (codes + _MIDDLE) - _MIDDLE
    else:
        size = tl.abs(codes)
        size = tl.where(size < dead_zone, 0.0, tl.floor(size + shift))
        codes = tl.where(codes < 0.0, -size, size)
    if zero is not None:
        zeros = tl.load(zero + places, mask=inside, other=0.0)
        low -= zeros
        high -= zeros
    codes = tl.where(codes < low, low, codes)  # NaN stays
    codes = tl.where(codes > high, high, codes)
    values = codes * steps
    if offset is not None:
        values -= offsets
    if dtype == tl.bfloat16:
        # by hand, because Triton's interpreter cuts
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        # the sum of a NaN's bits can overflow
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    elif dtype == tl.float16:
        values = values.to(tl.float16).to(tl.float32)
    return values
