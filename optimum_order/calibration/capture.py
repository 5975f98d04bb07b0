"""See which input meets which weight, without knowing any architecture.

A layer is recognized by the memory of its weight, at the moment torch multiplies the weight with
an input. So one mechanism serves `nn.Linear`, GPT-2's `Conv1D` and the single experts of a fused
parameter, and q/k/v or gate/up, which read the same tensor, share one accumulation.

A convolution is a product as well: of its filters (out, in * kh * kw) with the patch of the image
at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.calibration.ranks import Ranks
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.models.units import Target

PRODUCTS: dict[Callable[..., Any], tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}
"""Positions of the input and of the weight among the arguments of a product."""
_NAMES = {functional.linear: ("input", "weight")}
"""What the two are called where they are given by name."""
_LEFT = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)
"""Products whose left factor may be the weight, (out, in) times (..., in, tokens)."""
_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of a convolution in their order."""
_MOST_UNFOLDED = 2**24
"""Numbers in the patches that are held at once, unless a single image has more."""

_Sizes = int | Sequence[int]


@dataclass(frozen=True)
class Patches:
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
    def of(cls, weight: Tensor, stride: _Sizes, padding: _Sizes | str, dilation: _Sizes) -> Patches:
        """Read the arguments of `conv2d`.

        Args:
            weight: (out, in / groups, kh, kw).
            stride: One number, or one for each direction.
            padding: The same, or "same" or "valid".
            dilation: One number, or one for each direction.
        """
        kernel = (weight.shape[2], weight.shape[3])
        steps = _pair(dilation)
        if isinstance(padding, str):
            missing = [
                step * (size - 1) * (padding == "same")
                for step, size in zip(steps, kernel, strict=True)
            ]
            around = [(total // 2, total - total // 2) for total in missing]
        else:
            around = [(side, side) for side in _pair(padding)]
        return cls(kernel, _pair(stride), (*around[0], *around[1]), steps)

    def cut(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the patches at all positions, some images at a time.

        Args:
            images: (b, in, h, w).

        Yields:
            (n, in * kh * kw).
        """
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


def _same_layout(factor: Tensor, whole: Tensor) -> bool:
    """Return whether a factor that begins where a weight does is all of it, in this orientation.

    A part of a weight, or all experts of one parameter at once, meets an input of its own.
    """
    batch = zip(factor.shape[:-2], factor.stride()[:-2], strict=True)
    return (
        factor.shape[-2:] == whole.shape
        and factor.stride()[-2:] == whole.stride()
        and all(size == 1 or stride == 0 for size, stride in batch)
    )


def _pair(value: _Sizes) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@dataclass(frozen=True)
class Read:
    """One layer about to be multiplied with its input.

    Args:
        target: The layer.
        x: (..., in), or images (b, in, h, w).
        patches: How a convolution moves over the images; None for other layers.
    """

    target: Target
    x: Tensor
    patches: Patches | None = None

    def rows(self) -> Iterable[Tensor]:
        """Return the input as parts (..., in)."""
        return [self.x] if self.patches is None else self.patches.cut(self.x)

    def same_input(self, other: Read) -> bool:
        """Return whether another layer reads the same numbers in the same way."""
        a = self.x
        b = other.x
        same = a is b or (
            a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        )
        return same and self.patches == other.patches


class Watched:
    """Layers by the memory of their weights.

    Args:
        targets: The layers to recognize.
    """

    def __init__(self, targets: Iterable[Target]):
        self._by_address = {target.view.data_ptr(): target for target in targets}

    def reads(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Read]:
        """Return the layers that a call of a torch function multiplies, with their inputs.

        Args:
            function: Such as `functional.linear`.
            args: Its positional arguments.
            kwargs: Its arguments by name.
        """
        if function is functional.conv2d:
            return self._convolution(args, kwargs)
        places = PRODUCTS.get(function)
        if places is None:
            return []
        pair = [args[place] for place in places if place < len(args)]
        if len(pair) < 2:
            names = _NAMES.get(function, ())[len(pair) :]
            pair += [kwargs[name] for name in names if name in kwargs]
        if len(pair) < 2:
            return []
        x, weight = pair
        target = self._by_address.get(weight.data_ptr())
        if target is not None:
            whole = target.view if function is functional.linear else target.view.T
            return [Read(target, x)] if _same_layout(weight, whole) else []
        target = self._by_address.get(x.data_ptr()) if function in _LEFT else None
        if target is not None and _same_layout(x, target.view) and weight.ndim > 1:
            return [Read(target, weight.transpose(-1, -2))]
        return []

    def _convolution(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Read]:
        values = {**dict(zip(_CONV2D, args, strict=False)), **kwargs}
        images = values["input"]
        images = images if images.ndim == 4 else images[None]
        groups = values.get("groups", 1)
        pairs = zip(images.chunk(groups, dim=1), values["weight"].chunk(groups), strict=True)
        moves = [values.get("stride", 1), values.get("padding", 0), values.get("dilation", 1)]
        reads = []
        for channels, filters in pairs:
            target = self._by_address.get(filters.data_ptr())
            if target is not None:
                reads.append(Read(target, channels, Patches.of(filters, *moves)))
        return reads


class Capture(TorchFunctionMode):
    """While active, accumulates the inputs of layers.

    Args:
        targets: The layers.
        needs: The statistics to gather.
        dtype: What products may round the inputs to, see `Accumulation`.

    Attributes:
        leaders: For each layer seen, the first layer that read the same input.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        needs: Collection[type[Accumulator]],
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.targets = list(targets)
        self.needs = needs
        self.dtype = dtype
        self.leaders: dict[str, str] = {}
        self._watched = Watched(self.targets)
        self._accumulations: dict[str, Accumulation] = {}
        self._last: dict[str, Read] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for read in self._watched.reads(func, args, kwargs or {}):
            self._see(read)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        self._last.clear()  # held only so that an address cannot be reused while it is compared
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _see(self, read: Read) -> None:
        name = read.target.name
        if name not in self.leaders:
            sharing = (leader for leader, last in self._last.items() if last.same_input(read))
            self.leaders[name] = next(sharing, name)
        leader = self.leaders[name]
        if leader != name:
            if leader not in self._last or not self._last[leader].same_input(read):
                raise InvariantError(
                    f"'{name}' shared its input with '{leader}' in one batch and not in the next."
                )
            return
        if leader not in self._accumulations:
            self._accumulations[leader] = self._accumulation(read.target, read.x.device)
        for rows in read.rows():
            self._accumulations[leader].add(rows)
        self._last[leader] = read

    def _accumulation(self, target: Target, device: torch.device) -> Accumulation:
        return Accumulation(target.view.shape[1], self.needs, device, self.dtype)

    def share(self, ranks: Ranks) -> None:
        """Add what all other ranks have seen.

        Args:
            ranks: They have the same layers, of which each may have seen others.

        Raises:
            InvariantError: If layers share an input on one rank and not on another.
        """
        leaders: dict[str, str] = {}
        for seen in ranks.gather(self.leaders):
            for name, leader in seen.items():
                if leaders.setdefault(name, leader) != leader:
                    raise InvariantError(
                        f"'{name}' shared its input with '{leader}' in one process and not in "
                        "another."
                    )
        self.leaders = leaders
        for target in self.targets:
            if leaders.get(target.name) == target.name:
                if target.name not in self._accumulations:
                    sums = self._accumulation(target, target.view.device)
                    self._accumulations[target.name] = sums
                self._accumulations[target.name].share(ranks)

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of every layer by name; zero tokens for layers that were not seen.

        Raises:
            ModelError: If an input was NaN or infinite.
        """
        results = {leader: sums.result() for leader, sums in self._accumulations.items()}
        for target in self.targets:
            if target.name not in self.leaders:
                results[target.name] = self._accumulation(target, target.view.device).result()
        for name, statistics in results.items():
            refuse_infinite_inputs(name, statistics)
        return {
            target.name: results[self.leaders.get(target.name, target.name)]
            for target in self.targets
        }


def refuse_infinite_inputs(layer: str, statistics: Statistics) -> None:
    """Check that the statistics of a layer's inputs are finite.

    Args:
        layer: Its name.
        statistics: Of its inputs.

    Raises:
        ModelError: If an input was NaN or infinite.
    """
    for result in statistics.results.values():
        diagonal = result.diagonal() if result.ndim == 2 else result
        if not torch.isfinite(diagonal).all():
            raise ModelError(
                f"The inputs of '{layer}' are NaN or infinite on the calibration data, so nothing "
                "can be learned from them. Load the model with dtype='float32' (--dtype "
                "float32), or leave the layer out with 'ignore' (--ignore)."
            )
