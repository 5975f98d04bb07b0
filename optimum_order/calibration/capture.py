"""Seeing which input meets which weight, without knowing any architecture.

A layer is recognised by the memory its weight lies in, at the moment torch multiplies it with something. So one
mechanism serves `nn.Linear`, GPT-2's `Conv1D` and the single experts of a fused parameter, and q/k/v or gate/up,
which read the same tensor, share one accumulator without anyone saying so.

A convolution is a product as well: of its filters (out, in * kh * kw) with the patch of the image at each position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optimum_order.calibration.accumulate import Accumulator
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.statistics import Statistics
from optimum_order.models.units import Target

PRODUCTS = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}
"""Which positional arguments of a product are its input and its weight."""
_MOST_UNFOLDED = 2**24
"""Numbers in the patches that are held at once, unless a single image has more."""

_Sizes = int | Sequence[int]


@dataclass(frozen=True)
class _Patches:
    """How a convolution moves over an image, vertically and horizontally.

    Args:
        kernel: Rows and columns of a filter.
        stride: Steps between two positions.
        padding: Zeros before and after the rows, then before and after the columns.
        dilation: Steps between two inputs of a filter.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls, weight: Tensor, stride: _Sizes, padding: _Sizes | str, dilation: _Sizes
    ) -> _Patches:
        """From what `conv2d` takes, its weight (out, in / groups, kh, kw)."""
        kernel, steps = (weight.shape[2], weight.shape[3]), _pair(dilation)
        if isinstance(padding, str):  # "same" or "valid"
            missing = [
                step * (size - 1) * (padding == "same")
                for step, size in zip(steps, kernel, strict=True)
            ]
            around = [(total // 2, total - total // 2) for total in missing]
        else:
            around = [(side, side) for side in _pair(padding)]
        return cls(kernel, _pair(stride), (*around[0], *around[1]), steps)

    def cut(self, images: Tensor) -> Iterator[Tensor]:
        """The patches at all positions of images (b, in, h, w), some images at a time: (n, in * kh * kw)."""
        top, bottom, left, right = self.padding
        padded = functional.pad(images, (left, right, top, bottom))
        sizes = zip(padded.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = (
            (size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, step in sizes
        )
        numbers = images.shape[1] * self.kernel[0] * self.kernel[1] * rows * columns
        for part in padded.split(max(1, _MOST_UNFOLDED // max(1, numbers))):
            patches = functional.unfold(
                part, self.kernel, dilation=self.dilation, stride=self.stride
            )
            yield patches.transpose(1, 2).flatten(0, 1)


def _pair(value: _Sizes) -> tuple[int, int]:
    vertical, horizontal = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return vertical, horizontal


class Capture(TorchFunctionMode):
    """While active, accumulates the inputs of the targets that it watches.

    Args:
        targets: The layers to watch.
        gram: Whether to keep `X^T X` and not only its diagonal.
        dtype: In which it may be multiplied, see `Accumulator`.
    """

    def __init__(
        self, targets: Iterable[Target], *, gram: bool, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.gram, self.dtype = gram, dtype
        self.watched = {target.view.data_ptr(): target for target in targets}
        self.accumulators: dict[str, Accumulator] = {}
        self.leaders: dict[str, str] = {}
        """For each layer seen, the first layer that read the same input."""
        self._last: dict[str, tuple[Tensor, _Patches | None]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        places = PRODUCTS.get(func)
        if places and len(args) > places[1]:
            target = self.watched.get(args[places[1]].data_ptr())
            if target is not None:
                self._see(target, args[places[0]])
        elif func is functional.conv2d:
            self._see_convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _see_convolution(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        images = input if input.ndim == 4 else input[None]
        for channels, filters in zip(
            images.chunk(groups, dim=1), weight.chunk(groups), strict=True
        ):
            target = self.watched.get(filters.data_ptr())
            if target is not None:
                self._see(target, channels, _Patches.of(filters, stride, padding, dilation))

    def __exit__(self, *exception):
        self._last.clear()  # kept only so that an address cannot be reused while we compare it
        return super().__exit__(*exception)

    def _see(self, target: Target, x: Tensor, patches: _Patches | None = None) -> None:
        """Take in an input (..., in), or images (b, in, h, w) and how a convolution moves over them."""
        name = target.name
        if name not in self.leaders:
            shared = (leader for leader, last in self._last.items() if _same(last, (x, patches)))
            self.leaders[name] = next(shared, name)
        leader = self.leaders[name]
        if leader != name:
            if leader not in self._last or not _same(self._last[leader], (x, patches)):
                raise InvariantError(
                    f"'{name}' shared its input with '{leader}' in one batch and not in the next."
                )
            return
        if leader not in self.accumulators:
            inputs = target.view.shape[1]
            self.accumulators[leader] = Accumulator(
                inputs, gram=self.gram, device=x.device, dtype=self.dtype
            )
        for rows in [x] if patches is None else patches.cut(x):
            self.accumulators[leader].add(rows)
        self._last[leader] = x, patches

    def statistics(self) -> dict[str, Statistics]:
        """What is known about every watched layer, by name; zero tokens where none came by.

        Raises:
            ModelError: If an input was NaN or infinite.
        """
        results = {
            leader: accumulator.result() for leader, accumulator in self.accumulators.items()
        }
        for target in self.watched.values():
            if target.name not in self.leaders:
                inputs, device = target.view.shape[1], target.view.device
                results[target.name] = Accumulator(inputs, gram=self.gram, device=device).result()
        for name, statistics in results.items():
            if not torch.isfinite(statistics.squared_norms).all():
                raise ModelError(
                    f"The inputs of '{name}' are NaN or infinite on the calibration data, so nothing can be learnt "
                    "from them. Load the model with dtype='float32', or leave the layer out with 'ignore'."
                )
        return {
            target.name: results[self.leaders.get(target.name, target.name)]
            for target in self.watched.values()
        }


def _same(one: tuple[Tensor, _Patches | None], other: tuple[Tensor, _Patches | None]) -> bool:
    (a, how), (b, how_else) = one, other
    same = a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )
    return same and how == how_else
