"""Where and how a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.calibration.ranks import Ranks
from optimum_order.layers.state import LayerState
from optimum_order.models import precision
from optimum_order.models.units import Unit

PAUSES = ("block", "group")
"""Where a walk may pause, see `Execution.pause`."""


class Residency(Protocol):
    """Which weights are in memory, and where activations wait."""

    @property
    def states(self) -> MutableMapping[str, LayerState] | None:
        """The states of all layers, if the model is empty but for the block that is resident."""

    @property
    def device(self) -> torch.device | None:
        """Where blocks are resident, if the model itself does not tell."""

    def resident(self, unit: Unit | None) -> contextlib.AbstractContextManager[None]:
        """Hold a block's weights in memory while the context is active.

        Args:
            unit: The block; None for all that is needed before and between blocks.
        """

    def rest(self, tensors: Iterable[Tensor]) -> None:
        """Note activations that wait until the next block is resident."""

    def wake(self, tensors: Iterable[Tensor]) -> None:
        """Note activations that were read for the last time."""


class InMemory:
    """All weights and activations are in memory, all the time."""

    states = None
    device = None

    def resident(self, unit: Unit | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rest(self, tensors: Iterable[Tensor]) -> None:
        pass

    def wake(self, tensors: Iterable[Tensor]) -> None:
        pass


@dataclass(frozen=True)
class Execution:
    """Where and how a run computes.

    Args:
        device: Where each block is brought while its layers are compressed; None leaves it where
            the model is.
        dtype: What calibration multiplies in; None for what `precision.choose` takes.
        pause: "block" runs each block twice per walk, once to see the inputs of its layers and
            once with the compressed weights. "group" pauses at the layers themselves: the layers
            that share an input are compressed before they are multiplied, so one forward does,
            later layers of a block see what earlier ones became, and the activations of all
            batches are in memory at once.
        residency: Which weights are in memory.
        progress: Whether to show a bar on stderr.
        ranks: The processes that share the samples and the layers.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    pause: str = "block"
    residency: Residency = field(default_factory=InMemory)
    progress: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def streams(self) -> bool:
        """Whether the model is empty but for the block that is resident."""
        return self.residency.states is not None

    def matmul_dtype(self, model: PreTrainedModel) -> torch.dtype:
        """Return the dtype that calibration multiplies in for a model."""
        if self.dtype is not None:
            return self.dtype
        return precision.choose("auto", model.dtype, self.device or model.device)

    @contextlib.contextmanager
    def resident(self, unit: Unit | None) -> Iterator[None]:
        """Hold a block's weights in memory, on the device of the run, while the context is active.

        Args:
            unit: The block; None for all that is needed before and between blocks.
        """
        with self.residency.resident(unit):
            if self.device is None or unit is None:
                yield
                return
            home = next(unit.module.parameters()).device
            with torch.inference_mode(False):  # its parameters stay ordinary ones
                unit.module.to(self.device)
            try:
                yield
            finally:
                with torch.inference_mode(False):
                    unit.module.to(home)
