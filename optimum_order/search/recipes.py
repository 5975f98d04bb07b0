"""Which recipe under a budget: of many by layers, of three by whole models.

1. Every recipe that is expected to fit is tried on a few layers: the error of their outputs, and
   their bytes in the format.
2. The most promising are carried out on the whole model, three at most, the best single method
   always among them. Their bytes are those of the files that they write, and their loss is
   measured on calibration samples that were held back.
3. The single method of the least loss is recommended, or a recipe of several methods if that is
   better, pair by pair, beyond the interval.

Where the loss is limited and not the bytes, the loss is taken to be a power of the layers' error,
fitted to the recipes carried out so far, and the recipe of the fewest bytes is sought that meets
the limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from optimum_order import formats
from optimum_order.calibration.folding import column_sources, find_folds
from optimum_order.calibration.sensitivity import single_samples
from optimum_order.engine import workdir
from optimum_order.engine.choices import Pause
from optimum_order.engine.runner import Batches, Runner
from optimum_order.errors import FormatError, OrderError, OutputError
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.files import size
from optimum_order.progress import Bar
from optimum_order.search.budget import Budget
from optimum_order.search.looks import look
from optimum_order.search.menu import (
    LEAST_RATE,
    MARGIN,
    RATED,
    Candidate,
    Menu,
    rate_of,
)
from optimum_order.search.selection import Attempt, Row, Selection, compared

MOST_ATTEMPTS = 3
LOOKED_AT = 8
"""Calibration samples that layers are looked at with."""
_LAYERS = 8
_SHOWN = 4
"""Recipes in the table that were not carried out."""
_CAUTION = 0.95
"""The part of the allowed loss that a recipe is chosen for, while there are attempts left."""
_LAST_CAUTION = 0.8
_SMALLER = 0.998
"""The part of what is allowed at which a rate that was too large is tried again."""
_LEFT = 0.02
"""The part of what is allowed that a rate may leave over; the first that leaves more is raised."""
_RATE_STEP = 0.05
_POWERS = (0.5, 2.5)
_USUAL_FACTOR = 3.0
"""The rise of the loss over the error of layers before anything is measured."""
_TINY = 1e-12
_ENOUGH = 0.01
"""Relative savings of bytes that no further compression is worth."""

Make = Callable[[Candidate, int], Attempt]
"""Carries a recipe out: the candidate, and its number from 0."""


@dataclasses.dataclass(frozen=True)
class Carrying:
    """How recipes are carried out.

    Args:
        pause: Where walks pause, as in `JointCompressor.compress`.
        work_dir: Finished blocks are kept beside this path, one folder for each compression; None
            keeps nothing.
        resume: Whether to go on from what is there.
    """

    pause: Pause = "auto"
    work_dir: Path | None = None
    resume: bool = False

    def folder(self, number: int) -> Path | None:
        """Return the work dir of a compression.

        Args:
            number: Which, from 0.
        """
        if self.work_dir is None:
            return None
        return self.work_dir.with_name(f"{self.work_dir.name}-{number + 1}")

    def resumes(self, number: int) -> bool:
        """Return whether a compression goes on from what is there.

        Args:
            number: Which, from 0.
        """
        folder = self.folder(number)
        return self.resume and folder is not None and folder.is_dir()

    def folders(self) -> list[Path]:
        """Return the work dirs that are there."""
        folders = (self.folder(number) for number in range(MOST_ATTEMPTS))
        return [folder for folder in folders if folder is not None and folder.is_dir()]

    def check(self) -> None:
        """Refuse work dirs that cannot be used.

        Raises:
            OutputError: If one is not ours or holds a run that nobody asked to resume, or if there
                is nothing to resume.
        """
        if self.resume and self.work_dir is None:
            raise OutputError("'resume' needs a 'work_dir'.")
        if self.resume and not self.folders():
            raise OutputError(
                f"There is no work dir '{self.folder(0)}', so nothing to resume: start without "
                "--resume."
            )
        for folder in self.folders():
            workdir.check(folder, resume=self.resume)


class Search:
    """A search for one model; refuses at once what no recipe can meet.

    Args:
        menu: The recipes.
        budget: The most that the result may take; None limits the loss alone.
        max_loss: The most that the loss may rise; None limits the bytes alone.
        progress: Whether to show bars on stderr.

    Raises:
        OrderError: If the budget is too small for any recipe, or nothing needs compressing.
        FormatError: If no recipe can be saved as demanded.
    """

    def __init__(
        self,
        menu: Menu,
        budget: Budget | None,
        max_loss: float | None = None,
        *,
        progress: bool = False,
    ):
        self.menu = menu
        self.budget = budget
        self.max_loss = max_loss
        self.progress = progress
        self._limit = math.inf if budget is None else self._bits(budget)
        self._begin = time.perf_counter()
        self._looked = 0
        """Layers that were compressed by themselves, once for each recipe."""
        self._check()

    def _bits(self, budget: Budget) -> float:
        """Return the bits of a compressed weight that a budget allows."""
        return budget.amount if budget.bits else self.menu.sizes.bits_at(budget.amount)

    def _check(self) -> None:
        sizes = self.menu.sizes
        least = self.menu.least()
        if least is None:
            demand = sizes.demand
            raise FormatError(
                "No recipe of a search can be saved "
                + (f"as '{demand.format}' " if demand.format != "auto" else "")
                + (f"for {demand.engine} " if demand.engine else "")
                + "with this model: leave '--format' or '--for' out, or give an order."
            )
        if self.budget is None:
            return
        whole = 8 * (sizes.dense - sizes.rest) / sizes.weights
        if self._limit >= whole:
            raise OrderError(
                f"The budget is {self.budget}, and the model takes {size(sizes.dense)} of "
                f"{whole:.3g} bits for each weight of its layers as it is: nothing needs "
                "compressing."
            )
        if self._limit < least.bits or not self._allows(least.bytes, least.bits):
            raise OrderError(
                f"No recipe is as small as {self.budget}: the smallest is '{least.order}' as "
                f"'{least.format}', which takes {size(least.bytes)} with {least.bits:.2f} bits for "
                f"each weight of the layers. {size(sizes.rest)} are not compressed"
                + (
                    ": embeddings=coded (--embeddings coded) compresses embeddings too."
                    if self.menu.whole is None
                    else "."
                )
            )

    def _allows(self, bytes_: int, bits: float) -> bool:
        """Return whether a size is within the budget."""
        if self.budget is None:
            return True
        return (bits if self.budget.bits else bytes_) <= self.budget.amount

    def candidates(self) -> list[Candidate]:
        """Return the recipes whose layers a survey tries; their sizes may be rough."""
        if self.max_loss is not None:
            return self.menu.curve()
        return self.menu.within(self._limit)

    def survey(self, runner: Runner, batches: Batches) -> list[Candidate]:
        """Return the recipes that fit, with the errors and bytes of some layers, the best first.

        Args:
            runner: The model.
            batches: A few calibration samples.
        """
        self.menu.columns = _can_fold(runner, batches)
        listed = self.candidates()
        codecs = formats.available()
        asked = {c.order: None if c.exact else codecs[c.format]() for c in listed}
        layers = sum(len(unit.targets) for unit in runner.units)
        with Bar(
            total=min(_LAYERS, layers), desc="look", unit="layer", disable=not self.progress
        ) as bar:
            looks = look(runner, batches, asked, _LAYERS, bar.update)
        seen = []
        self._looked = sum(look_.layers for look_ in looks.values())
        for candidate in listed:
            bits = looks[candidate.order].bits
            candidate = dataclasses.replace(candidate, error=looks[candidate.order].error)
            if self.menu.whole is not None and rate_of(candidate) is None:
                bits = None  # layers say nothing of an embedding that takes other bits
            if bits is not None:
                bytes_ = self.menu.sizes.bytes_at(bits)
                candidate = dataclasses.replace(candidate, bits=bits, bytes=bytes_)
                rate = rate_of(candidate)
                if rate is not None and self.max_loss is None:  # all that is allowed is spent
                    most = self._limit * (1 - MARGIN)
                    rate += most - bits
                    if candidate.order[-1].method == RATED:  # the whole model has that many bits
                        rate = min(rate, most)
                    candidate = self.menu.at_rate(candidate, rate)
            seen.append(candidate)
        return sorted(seen, key=lambda candidate: candidate.error)

    def run(self, seen: Sequence[Candidate], original: Tensor, make: Make) -> list[Attempt]:
        """Carry the most promising recipes out.

        Args:
            seen: From `survey`.
            original: M of the model before compression on the samples held back, (samples,).
            make: Carries a recipe out.
        """
        with Bar(
            total=MOST_ATTEMPTS, desc="search", unit="compression", disable=not self.progress
        ) as bar:

            def counted(candidate: Candidate, number: int) -> Attempt:
                bar.set_postfix_str(str(candidate.order))
                attempt = make(candidate, number)
                bar.update()
                return attempt

            if self.max_loss is None:
                return self._within_bytes(seen, counted)
            return self._within_loss(seen, original, counted)

    # The bytes are limited

    def _within_bytes(self, seen: Sequence[Candidate], make: Make) -> list[Attempt]:
        queue = agenda([c for c in seen if self._allows(c.bytes, c.bits)])
        if not queue:
            raise OrderError(
                f"No recipe that was looked at fits in {self.budget}. Allow a little more."
            )
        attempts: list[Attempt] = []
        larger: Candidate | None = None
        while queue and len(attempts) < MOST_ATTEMPTS:
            candidate = queue.pop(0)
            attempt = make(candidate, len(attempts))
            attempts.append(attempt)
            again = None
            if not self._allows(attempt.bytes, attempt.bits):
                # a rate that was raised too far has one below it that fits
                if candidate is not larger and self._may_win(attempt, attempts):
                    again = self._smaller(attempt)
            elif len(attempts) == 1:
                again = larger = self._larger(attempt)
            queue = [again, *queue] if again is not None else queue
        return attempts

    def _may_win(self, attempt: Attempt, attempts: Sequence[Attempt]) -> bool:
        """Return whether a recipe that is too large is better than all that fit.

        Else another compression is not worth it: with fewer bytes it would be no better.
        """
        loss = -float(attempt.performances.mean())
        fitting = (other for other in attempts if self._allows(other.bytes, other.bits))
        return all(loss < -float(other.performances.mean()) for other in fitting)

    def _smaller(self, attempt: Attempt) -> Candidate | None:
        """Return the recipe of an attempt that is too large with a rate that ought to fit."""
        rate = rate_of(attempt.candidate)
        if rate is None:
            return None
        part = self._limit / attempt.bits * _SMALLER
        smaller = self.menu.at_rate(attempt.candidate, max(rate * part, LEAST_RATE))
        return dataclasses.replace(smaller, error=attempt.candidate.error)

    def _larger(self, attempt: Attempt) -> Candidate | None:
        """Return the recipe of an attempt that leaves much over with a rate that takes it."""
        rate = rate_of(attempt.candidate)
        if rate is None or attempt.bits > self._limit * (1 - _LEFT):
            return None
        larger = self.menu.at_rate(
            attempt.candidate, rate + self._limit * (1 - MARGIN) - attempt.bits
        )
        if larger.order == attempt.candidate.order:  # the largest rate there is
            return None
        return dataclasses.replace(larger, error=attempt.candidate.error)

    # The loss is limited

    def _within_loss(
        self, seen: Sequence[Candidate], original: Tensor, make: Make
    ) -> list[Attempt]:
        assert self.max_loss is not None
        steps = [c for c in interpolated(self.menu, seen) if self._allows(c.bytes, c.bits)]
        if not steps:
            raise OrderError(f"No recipe that was looked at fits in {self.budget}.")
        attempts: list[Attempt] = []
        for number in range(MOST_ATTEMPTS):
            losses = [_rise(attempt, original) for attempt in attempts]
            met = [
                t.bytes for t, loss in zip(attempts, losses, strict=True) if loss <= self.max_loss
            ]
            last = number == MOST_ATTEMPTS - 1 and not met
            model = LossModel.fitted([a.candidate.error for a in attempts], losses, self.max_loss)
            target = self.max_loss * (_LAST_CAUTION if last else _CAUTION)
            fine = [c for c in steps if model.loss(c.error) <= target]
            chosen = min(fine, key=lambda c: c.bytes) if fine else min(steps, key=lambda c: c.error)
            if chosen.order in [attempt.candidate.order for attempt in attempts]:
                break
            if met and chosen.bytes > min(met) * (1 - _ENOUGH):
                break
            attempts.append(make(chosen, number))
        return attempts

    # The answer

    def selection(
        self, attempts: Sequence[Attempt], seen: Sequence[Candidate], original: Tensor, facts: Facts
    ) -> Selection:
        """Return the recommended recipe with its evidence.

        Args:
            attempts: From `run`.
            seen: From `survey`.
            original: M of the model before compression on the samples held back, (samples,).
            facts: What the loss was measured with.

        Raises:
            OrderError: If nothing that was carried out is as small as was asked for.
        """
        fitting = [attempt for attempt in attempts if self._allows(attempt.bytes, attempt.bits)]
        if not fitting:
            least = min(attempts, key=lambda attempt: attempt.bytes)
            raise OrderError(
                f"None of {len(attempts)} compressions fits in {self.budget}: "
                f"'{least.candidate.order}' takes {size(least.bytes)} with {least.bits:.3f} bits. "
                "Allow a little more."
            )
        if self.max_loss is None:
            winner = best_within_bytes(fitting)
            met = True
        else:
            winner = best_within_loss(fitting, original, self.max_loss)
            met = _rise(winner, original) <= self.max_loss
        others = sorted(
            (attempt for attempt in attempts if attempt is not winner),
            key=lambda t: _rise(t, original),
        )
        rows = [self._made(attempt, winner, original) for attempt in (winner, *others)]
        made = {attempt.candidate.order for attempt in attempts}
        unmade = [c for c in seen if c.order not in made and self._allows(c.bytes, c.bits)]
        if self.max_loss is None:
            rows += [_unmade(candidate) for candidate in unmade[:_SHOWN]]
        cost = {
            "compressions": len(attempts),
            "recipes": len(seen),
            "single_layers": self._looked,
            "seconds": round(time.perf_counter() - self._begin, 2),
        }
        return Selection(
            rows=tuple(rows),
            metric=facts.metric,
            samples=len(original),
            budget=None if self.budget is None else str(self.budget),
            max_loss=self.max_loss,
            met=met,
            reason=self._reason(rows, met, f"{len(original)} {facts.unit}s held back"),
            cost=cost,
            engine=self.menu.sizes.demand.engine,
            model=winner.model,
        )

    def _made(self, attempt: Attempt, winner: Attempt, original: Tensor) -> Row:
        loss, interval, difference = compared(winner, attempt, original)
        return Row(
            order=attempt.candidate.order,
            format=attempt.candidate.format,
            bytes=attempt.bytes,
            bits=attempt.bits,
            made=True,
            fits=self._allows(attempt.bytes, attempt.bits),
            loss=loss,
            interval=interval,
            difference=difference,
            error=attempt.candidate.error,
        )

    def _reason(self, rows: Sequence[Row], met: bool, evidence: str) -> str:
        """Return one sentence that says why the first row is recommended."""
        winner = rows[0]
        if self.max_loss is not None:
            return self._loss_reason(winner, met, evidence)
        others = [row for row in rows[1:] if row.made and row.fits]
        if not others:
            return f"'{winner.order}' is the only recipe that was carried out in these bytes."
        nearest = others[0]
        assert nearest.difference is not None
        gap = nearest.difference
        if gap.low > 0:
            return (
                f"'{winner.order}' is better than '{nearest.order}', the next, by {gap.mean:.4f} "
                f"({gap.low:.4f} to {gap.high:.4f}) on {evidence}."
            )
        return (
            f"no difference between '{winner.order}' and '{nearest.order}' that {evidence} would "
            f"show{'; one method does' if len(winner.order) < len(nearest.order) else ''}."
        )

    def _loss_reason(self, winner: Row, met: bool, evidence: str) -> str:
        """Return the same where the loss is limited."""
        assert winner.loss is not None
        assert self.max_loss is not None
        if met:
            return (
                f"'{winner.order}' takes the fewest bytes of those whose loss rises by no more "
                f"than {self.max_loss:g}: {winner.loss:.4f} on {evidence}."
            )
        where = "" if self.budget is None else f" in {self.budget}"
        return (
            f"the limit is not met{where}: the least rise is that of '{winner.order}', "
            f"{winner.loss:.4f} on {evidence}, and {self.max_loss:g} were allowed."
        )


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a loss was measured with.

    Args:
        metric: The name of the metric.
        unit: The word for one sample.
    """

    metric: str
    unit: str


@dataclasses.dataclass(frozen=True)
class LossModel:
    """The rise of the loss as a power of the error of layers.

    Args:
        factor: log of the rise where the error is 1.
        power: The exponent.
    """

    factor: float
    power: float

    def loss(self, error: float) -> float:
        """Return the expected rise.

        Args:
            error: Mean relative output error of layers.
        """
        return math.exp(self.factor + self.power * math.log(max(error, _TINY)))

    @classmethod
    def fitted(cls, errors: Sequence[float], losses: Sequence[float], target: float) -> LossModel:
        """Return the model of what was measured, exact at the rise next to a target.

        Args:
            errors: Of the layers, one for each measurement; none gives a usual model.
            losses: The rises.
            target: The rise that matters.
        """
        if not errors:
            return cls(math.log(_USUAL_FACTOR), 1.0)
        # a rise may be negative by chance
        points = [
            (math.log(max(error, _TINY)), math.log(max(loss, target / 50)))
            for error, loss in zip(errors, losses, strict=True)
        ]
        points.sort(key=lambda point: abs(point[1] - math.log(target)))
        x, y = points[0]
        power = 1.0
        if len(points) > 1 and points[1][0] != x:
            slope = (points[1][1] - y) / (points[1][0] - x)
            power = min(max(slope, _POWERS[0]), _POWERS[1])
        return cls(y - power * x, power)


def agenda(seen: Sequence[Candidate]) -> list[Candidate]:
    """Return the recipes to carry out, in turn: the best single method is always the first.

    Then come the best single recipe of another method and the best recipe of several methods, the
    more promising first, and then all others.

    Args:
        seen: Recipes that fit.
    """
    ranked = sorted(seen, key=lambda candidate: candidate.error)
    singles = [candidate for candidate in ranked if candidate.is_single]
    first = singles[:1]
    another = [c for c in singles if first and c.method != first[0].method][:1]
    joint = [candidate for candidate in ranked if not candidate.is_single][:1]
    next_ = sorted([*another, *joint], key=lambda candidate: candidate.error)
    chosen = [*first, *next_]
    return [*chosen, *(candidate for candidate in ranked if candidate not in chosen)]


def best_within_bytes(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt to recommend: the best single method, unless another is surely better.

    Args:
        attempts: Those that fit, one or more.
    """
    ranked = sorted(attempts, key=lambda attempt: -float(attempt.performances.mean()))
    singles = [attempt for attempt in ranked if attempt.candidate.is_single]
    if not singles or ranked[0] is singles[0]:
        return ranked[0]
    gap = difference_over_draws((ranked[0].performances - singles[0].performances)[None])
    return ranked[0] if gap.low > 0 else singles[0]


def best_within_loss(attempts: Sequence[Attempt], original: Tensor, max_loss: float) -> Attempt:
    """Return the attempt of the fewest bytes that meets a limit, or else the one nearest to it.

    Args:
        attempts: Those that fit, one or more.
        original: M of the model before compression, (samples,).
        max_loss: The limit.
    """
    met = [attempt for attempt in attempts if _rise(attempt, original) <= max_loss]
    if met:
        return min(met, key=lambda attempt: attempt.bytes)
    return min(attempts, key=lambda attempt: _rise(attempt, original))


def interpolated(menu: Menu, seen: Sequence[Candidate]) -> list[Candidate]:
    """Return recipes with the rates between those that were looked at, and all others.

    The logarithm of the error of layers is taken to be a broken line in the rate.

    Args:
        menu: The recipes.
        seen: Single methods that were looked at.
    """
    rates = [(rate, c) for c in seen if (rate := rate_of(c)) is not None]
    rated = sorted(rates, key=lambda pair: pair[0])
    steps = [candidate for candidate in seen if rate_of(candidate) is None]
    for (low, below), (high, above) in itertools.pairwise(rated):
        count = round((high - low) / _RATE_STEP)
        for number in range(count):
            part = number / count
            logarithm = (1 - part) * math.log(max(below.error, _TINY))
            logarithm += part * math.log(max(above.error, _TINY))
            between = menu.at_rate(below, low + part * (high - low))
            steps.append(dataclasses.replace(between, error=math.exp(logarithm)))
    return [*steps, *(candidate for _, candidate in rated[-1:])]


def _can_fold(runner: Runner, batches: Batches) -> bool:
    """Return whether the steps of every layer's columns can move into what makes its input."""
    folds = find_folds(runner.model, runner.units, next(single_samples(batches)))
    readers = column_sources(folds)
    return all(target.name in readers for unit in runner.units for target in unit.targets)


def _rise(attempt: Attempt, original: Tensor) -> float:
    return float((original - attempt.performances).mean())


def _unmade(candidate: Candidate) -> Row:
    return Row(
        order=candidate.order,
        format=candidate.format,
        bytes=candidate.bytes,
        bits=candidate.bits,
        made=False,
        fits=True,
        loss=None,
        interval=None,
        difference=None,
        error=candidate.error,
    )
