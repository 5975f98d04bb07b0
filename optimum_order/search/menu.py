"""The recipes that a search considers, with the bytes of what they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from optimum_order import formats
from optimum_order.engine.recipe import canonical
from optimum_order.estimate.options import Option, Sizes
from optimum_order.order import Order, Stage

LEAST_RATE = 1.0
"""Bits of a weight below which no recipe is tried: whole rows become zero."""
_MOST_RATE = 8.0
MARGIN = 0.006
"""The part of what is allowed that is not spent: some layers foretell the bits of all to 0.5 %."""
RATED = "ecsq"
"""The method that meets a rate."""
_PRUNERS = ("wanda", "sparsegpt")
_SPARSITIES = (0.25, 0.5)
_WIDTHS = range(2, 9)
_GROUPS = (32, 64, 128, -1)
_MIXED_WIDTHS = (2, 3, 4, 6, 8)
_K_AVERAGES = (3.0, 4.0, 5.0, 6.0)
_PACKED_RATE = 3.2
"""The rate of integers that 4-bit kernels run: with more, too many are cut off at 7."""


@dataclass(frozen=True)
class Candidate:
    """A recipe, and what is expected of it.

    Args:
        order: Its stages, in canonical form.
        format: The name of the format to save the result in.
        bytes: Of all weight files, as estimated.
        bits: Of a weight of the compressed layers, as estimated, all side information counted.
        exact: Whether these are certain.
        error: Mean relative output error of some layers, each by itself; NaN if unknown.
    """

    order: Order
    format: str
    bytes: int
    bits: float
    exact: bool
    error: float = math.nan

    @property
    def is_single(self) -> bool:
        """Whether the recipe is one method alone."""
        return len(self.order) == 1

    @property
    def method(self) -> str:
        """The name of the last method."""
        return self.order[-1].method


@dataclass
class Menu:
    """Recipes for one model and one demand.

    Args:
        sizes: The sizes of results.
        columns: Whether the steps of columns may differ where stock formats need one scale a row.
        whole: Gives an order with what becomes of embeddings, where `sizes` counts these.
    """

    sizes: Sizes
    columns: bool = True
    whole: Callable[[Order], Order] | None = None
    _options: dict[Order, Option | None] = dataclasses.field(default_factory=dict)

    def least(self) -> Candidate | None:
        """Return the recipe of the fewest bytes; None if no format will do for any recipe."""
        small: list[Candidate | None] = []
        for width in _WIDTHS:
            small = [self._smallest(_quantized(width, group)) for group in _GROUPS]
            if any(small):
                break
        small += [self._smallest(order) for order in self._k_quants()[:1]]
        small += [self._with_rate((), LEAST_RATE, ()), self._packed()]
        return min(filter(None, small), key=lambda candidate: candidate.bits, default=None)

    def within(self, bits: float) -> list[Candidate]:
        """Return recipes that are expected to take so many bits of a compressed weight.

        The sizes of those that are not exact are rough, and some may be too large.

        Args:
            bits: The most.
        """
        listed = [*self._rated(bits), *self._fixed(bits), *self._mixed(bits), self._packed()]
        return [c for c in listed if c is not None and c.bits <= bits * (1.0 if c.exact else 1.1)]

    def curve(self) -> list[Candidate]:
        """Return recipes of one method from the fewest bits to the most."""
        rates = [self._with_rate((), rate, ()) for rate in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)]
        fixed = [
            self._smallest(_quantized(width, group))
            for width in _WIDTHS
            for group in dict.fromkeys((self._groups()[-1], -1))
        ]
        fixed += [self._smallest(order) for order in self._k_quants()]
        fixed += [self._mixed_k_quants(average) for average in _K_AVERAGES]
        return [c for c in (*rates, *fixed, self._packed()) if c is not None]

    def at_rate(self, candidate: Candidate, rate: float) -> Candidate:
        """Return a recipe with another rate; the bits are taken to change with the rate.

        Args:
            candidate: One whose `rate_of` is known.
            rate: In bits.
        """
        before = rate_of(candidate)
        assert before is not None
        rate = _floor(min(max(rate, LEAST_RATE), _MOST_RATE))
        stages = list(candidate.order)
        stages[_place(candidate.order)] = Stage(RATED, rate)
        bits = candidate.bits + rate - before
        return dataclasses.replace(
            candidate,
            order=canonical(Order(stages)),
            bits=bits,
            bytes=self.sizes.bytes_at(bits),
        )

    def _rated(self, bits: float) -> Iterator[Candidate | None]:
        """Yield entropy-coded integers alone, after a pruner, and before one."""
        rate = min(bits * (1 - MARGIN), _MOST_RATE)
        if rate < LEAST_RATE:
            return
        yield self._with_rate((), rate, ())
        for pruner in _pruners():
            yield self._with_rate((pruner,), rate, ())
        for sparsity in _SPARSITIES:
            # of n weights, those that stay share the bits of all
            more = min(rate / (1 - sparsity / 2), _MOST_RATE)
            yield self._with_rate((), more, (Stage(_PRUNERS[0], sparsity),))

    def _with_rate(
        self, before: tuple[Stage, ...], rate: float, after: tuple[Stage, ...]
    ) -> Candidate | None:
        """Return a recipe that has a rate; None where formats store integers in fixed widths."""
        rate = _floor(rate)
        order = canonical(Order((*before, Stage(RATED, rate), *after)))
        candidate = self._smallest(order)
        if candidate is None or not formats.available()[candidate.format].codes_rates:
            return None
        if after:
            return candidate
        # random weights say little of a rate that is met on the weights of the model
        return dataclasses.replace(candidate, bits=rate, bytes=self.sizes.bytes_at(rate))

    def _packed(self) -> Candidate | None:
        """Return integers for kernels of 4 bits, where formats store them in fixed widths."""
        stage = Stage(RATED, rate=_PACKED_RATE, max_code=7, columns=self.columns)
        candidate = self._smallest(Order([stage]))
        return candidate if candidate is not None and candidate.exact else None

    def _fixed(self, bits: float) -> Iterator[Candidate | None]:
        """Yield integers of one width, alone and after a pruner."""
        below = 2 if self.whole is None else 4  # embeddings in 8 bits take what layers spare
        near = [width for width in _WIDTHS if bits - below < width <= bits + 1] or [_WIDTHS[-1]]
        fitting = []
        for width in near:
            for group in _GROUPS:
                alone = self._smallest(_quantized(width, group))
                if alone is not None and alone.bits <= bits:
                    fitting.append(alone)
        # of one width the one with most scales
        for width in near:
            same = [c for c in fitting if dict(c.order[0].options).get("bits", width) == width]
            yield max(same, key=lambda c: c.bits, default=None)
        types = [c for c in map(self._smallest, self._k_quants()) if c and c.bits <= bits]
        yield max(types, key=lambda c: c.bits, default=None)
        if self.whole is not None or not any(map(_zeros_are_cheap, fitting)):
            return  # what some layers take says nothing of embeddings in other bits
        usual = self._groups()[-1]
        for pruner in _pruners():
            pruned = [self._smallest(Order((pruner, *_quantized(w, usual)))) for w in near]
            smaller = [
                c for c in pruned if c is not None and c.bits <= bits and _zeros_are_cheap(c)
            ]
            yield max(smaller, key=lambda c: c.bits, default=None)

    def _groups(self) -> list[int]:
        """Return the two largest groups that divide the inputs of every layer; -1 if none does."""
        fitting = [
            group
            for group in _GROUPS[:-1]
            if any(self._smallest(_quantized(width, group)) for width in (4, 8, 2))
        ]
        return fitting[-2:] or [-1]

    def _mixed(self, bits: float) -> Iterator[Candidate | None]:
        """Yield a width for each layer, as an average."""
        for group in self._groups():
            widths = [w for w in _MIXED_WIDTHS if self._smallest(_quantized(w, group)) is not None]
            if len(widths) < 2 or bits < widths[0]:
                continue
            average = min(bits, widths[-1])
            for _ in range(3):  # what scales add is seen in the first
                average = _floor(max(average, widths[0]))
                stage = Stage(
                    "mixed_precision", bits=average, group_size=group, widths=tuple(widths)
                )
                candidate = self._smallest(Order([stage]))
                if candidate is None or candidate.bits <= bits:
                    break
                average -= candidate.bits - bits + 0.001
            yield candidate
        yield self._mixed_k_quants(bits)

    def _k_quants(self) -> list[Order]:
        """Return recipes of one K-quant, the smallest first; none for a format without these."""
        demand = self.sizes.demand
        codec = formats.intended(demand.format, demand.engine)
        return [Order([Stage("gptq", kind)]) for kind in (codec.k_quants if codec else ())]

    def _mixed_k_quants(self, bits: float) -> Candidate | None:
        """Return a K-quant for each layer: llama.cpp fuses none, but holds experts in one type."""
        smallest = [self._smallest(order) for order in self._k_quants()[:1]]
        if not any(c is not None and c.bits <= bits for c in smallest):
            return None
        fuse = any(target.kind == "expert" for unit in self.sizes.units for target in unit.targets)
        average = _floor(min(bits, _MOST_RATE))
        codec = formats.intended(self.sizes.demand.format, self.sizes.demand.engine)
        assert codec is not None
        widths = (*codec.k_quants, 8)
        stage = Stage("mixed_precision", bits=average, fuse=fuse, widths=widths)
        return self._smallest(Order([stage]))

    def _smallest(self, order: Order) -> Candidate | None:
        """Return a recipe in the format that stores it in the fewest bytes."""
        order = canonical(order)
        if order not in self._options:
            self._options[order] = self.sizes.smallest(
                order if self.whole is None else self.whole(order)
            )
        best = self._options[order]
        if best is None:
            return None
        return Candidate(order, best.format, best.bytes, best.bits, best.exact)


def _floor(number: float) -> float:
    """Return a number with three digits, so that a recipe is short, never more than it was."""
    return math.floor(round(number * 1000, 6)) / 1000


def rate_of(candidate: Candidate) -> float | None:
    """Return the rate that a recipe has, or None."""
    place = _place(candidate.order)
    if place < 0 or candidate.exact:
        return None
    stage = candidate.order[place]
    value = stage.value if stage.value is not None else dict(stage.options)["rate"]
    assert isinstance(value, (int, float))
    return float(value)


def _place(order: Order) -> int:
    """Return the place of the stage that has a rate, or -1."""
    return next((place for place, stage in enumerate(order) if stage.method == RATED), -1)


def _pruners() -> list[Stage]:
    return [Stage(pruner, sparsity) for pruner in _PRUNERS for sparsity in _SPARSITIES]


def _quantized(width: int, group: int) -> Order:
    return Order([Stage("gptq", bits=width, group_size=group)])


def _zeros_are_cheap(candidate: Candidate) -> bool:
    """Return whether pruning saves bytes in the format of a candidate."""
    return formats.available()[candidate.format].zeros_are_cheap
