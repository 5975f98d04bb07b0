"""Accumulators gather statistics over tokens; `Statistics` holds the results for one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.errors import InvariantError

_REDUCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class Accumulator(ABC):
    """A sum over the tokens of one input that one or more layers read.

    A subclass is one file. It names in `merges` the tensors that hold its sums, so that sums over
    two halves of the tokens become the sum over all tokens, and processes can share the work.
    `optimum_order.testing.AccumulatorContract` tests a subclass.

    Args:
        inputs: Width of the input.
        device: Where the sums are resident.
    """

    implies: ClassVar[Mapping[type[Accumulator], Callable[[Any], Any]]] = {}
    """Statistics that follow from the result of this one, each with the function that gives them:
    they are not accumulated again."""
    compares: ClassVar[bool] = False
    """Whether tokens are added by `compare`, where a walk knows what they were before the stage."""

    merges: ClassVar[Mapping[str, Literal["sum", "max", "min"]]] = {}
    """The attributes that hold what was gathered, tensors of one shape whatever was seen, each with
    what makes of two of them that of all tokens, entry by entry."""

    def __init__(self, inputs: int, device: torch.device):
        self.inputs = inputs
        self.device = device

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (tokens, in), in any floating-point dtype.
        """

    def compare(self, rows: Tensor, before: Tensor) -> None:
        """Add tokens together with what they were before the stage.

        Only a class that `compares` needs this method; nobody else calls it.

        Args:
            rows: (tokens, in), in any floating-point dtype.
            before: (tokens, in), the same inputs in the model as it was before the stage.
        """
        raise NotImplementedError

    @torch.inference_mode()  # in which sums are taken; outside they are not writable in place
    def merge(self, other: Self) -> None:
        """Add the tokens that another accumulator of this class has seen."""
        for name, reduction in self.merges.items():
            mine: Tensor = getattr(self, name)
            mine.copy_(_REDUCTIONS[reduction](mine, getattr(other, name)))

    @abstractmethod
    def result(self) -> Any:
        """Return the statistic over all tokens so far: tensors, on `device`."""

    @classmethod
    @abstractmethod
    def isotropic(cls, result: Any) -> Any:
        """Return the statistic of white noise, `X = I`, in the shape of another result."""


@dataclass(frozen=True)
class Statistics:
    """The statistics that calibration gathered over the inputs `X` (tokens, in) of one layer.

    Args:
        tokens: Number of rows of `X`; 0 for an expert that no token reached.
        results: The result of each accumulator, by its class.
    """

    tokens: int
    results: Mapping[type[Accumulator], Any]
    _derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, rows: Tensor, needs: Iterable[type[Accumulator]]) -> Statistics:
        """Accumulate some rows.

        Args:
            rows: (tokens, in).
            needs: The statistics to gather.
        """
        results = {}
        for accumulator in needs:
            sums = accumulator(rows.shape[1], rows.device)
            sums.update(rows)
            results[accumulator] = sums.result()
        return cls(len(rows), results)

    def __contains__(self, statistic: type[Accumulator]) -> bool:
        return statistic in self.results or any(
            statistic in accumulator.implies for accumulator in self.results
        )

    def __getitem__(self, statistic: type[Accumulator]) -> Any:
        if statistic in self.results:
            return self.results[statistic]
        for accumulator, result in self.results.items():
            if statistic in accumulator.implies:
                if statistic not in self._derived:
                    self._derived[statistic] = accumulator.implies[statistic](result)
                return self._derived[statistic]
        gathered = ", ".join(accumulator.__name__ for accumulator in self.results)
        raise InvariantError(
            f"The statistic {statistic.__name__} was not gathered; gathered were "
            f"{gathered or 'none'}. Add {statistic.__name__} to the backend's 'needs'."
        )

    def derived(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return a value computed from these statistics, once for all layers that share them.

        Args:
            key: Names the value.
            compute: Gives the value.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def isotropic(self) -> Statistics:
        """Return the statistics of white noise, all that can be assumed of inputs never seen."""
        white = {
            accumulator: accumulator.isotropic(result)
            for accumulator, result in self.results.items()
        }
        return Statistics(0, white)
