"""What a compressed model may take: bytes of its weight files, or bits of a compressed weight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from optimum_order.errors import OrderError
from optimum_order.files import size

_UNITS = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_BITS = ("bit", "bits")
_TEXT = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Budget:
    """The most that a model may take.

    Args:
        amount: Bytes, or bits.
        bits: Whether the amount is bits of a weight of the compressed layers, all side information
            counted, and not bytes of all weight files.
    """

    amount: float
    bits: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `60MB` or `2.5 bits`.

        Raises:
            OrderError: If the text is no positive amount of one of the units.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        unit = match[2].lower() if match else ""
        amount = float(match[1]) if match else math.nan
        if unit in _BITS and 0 < amount < math.inf:
            return cls(amount, bits=True)
        if unit in _UNITS and 1 <= amount * _UNITS[unit] < 2**63:
            return cls(float(math.floor(amount * _UNITS[unit])))
        raise OrderError(
            f"A budget is bytes of the weight files, such as 60MB or 1.5GiB, or bits for each "
            f"compressed weight, such as '2.5 bits', got {text!r}. Units: B, kB, MB, GB, KiB, MiB, "
            "GiB, bits."
        )

    def __str__(self) -> str:
        return f"{self.amount:.6g} bits" if self.bits else f"{size(self.amount)}"


def limits(
    budget: str | Budget | None, max_loss: float | None
) -> tuple[Budget | None, float | None]:
    """Return what limits a search, checked.

    Args:
        budget: The budget or its text, or None.
        max_loss: The most that the loss may rise, or None.

    Raises:
        OrderError: If both are None, the text cannot be read, or `max_loss` is not positive.
    """
    if budget is None and max_loss is None:
        raise OrderError(
            "A search needs a budget, such as 60MB or '2.5 bits' (--budget), or the most that the "
            "loss may rise, such as 0.03 (--max-loss)."
        )
    if max_loss is not None and not 0 < max_loss < math.inf:
        raise OrderError(
            f"'max_loss' is the most that the loss may rise and must be above 0, such as 0.03, got "
            f"{max_loss:g}."
        )
    return Budget.parse(budget) if isinstance(budget, str) else budget, max_loss
