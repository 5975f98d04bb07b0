"""Passes that look at the layers and change none: profiles, candidates, tables of errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from optimum_order.backends.base import (
    Allocator,
    Measured,
    Method,
    Profile,
    Profiler,
    Rewrite,
    needs_of,
)
from optimum_order.calibration.folding import column_sources, find_folds
from optimum_order.calibration.sensitivity import added_losses, output_sensitivities, single_samples
from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine.passes.base import BasePasses
from optimum_order.engine.workdir import Passage
from optimum_order.errors import OrderError
from optimum_order.layers.error import added_loss
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Accumulator, Gram
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage

logger = logging.getLogger(__name__)

_HELD_BACK = 4
"""Calibration samples, the last ones, on which weights are tried."""


class Looking(BasePasses):
    """Profiles layers and tries candidates."""

    def profile(self, profiler: Profiler) -> Mapping[str, Profile] | None:
        """Profile every layer that a method covers; None for a model that is streamed."""
        if self.execution.streams:
            logger.warning(
                "'%s': a model that is read block by block takes no gradients, so every layer gets "
                "the same rate.",
                profiler.stage,
            )
            return None
        units = [
            u for u in self.subject.units if any(profiler.covers(t.name, t.kind) for t in u.targets)
        ]
        passage = self._begin(units, f"{profiler.stage}: profiling")
        profiles: Mapping[str, Profile] = self._first(
            lambda: self._profiles(profiler, units, passage)
        )
        return profiles

    def _profiles(
        self, profiler: Profiler, units: Sequence[Unit], passage: Passage | None
    ) -> dict[str, Profile]:
        """Profile every layer of some blocks, in this process alone."""
        profiles: dict[str, Profile] = {}
        for unit in units:
            if passage is not None and passage.has(unit.name):
                profiles.update(passage.load(unit.name))
        missing = [u for u in units if not any(t.name in profiles for t in u.targets)]
        if not missing:
            return profiles
        samples = list(itertools.islice(single_samples(self.subject.batches), profiler.profiled))
        sensitivities: Mapping[str, Tensor] = {}
        sources: Mapping[str, Tensor] = {}
        if profiler.weighs_outputs:
            sensitivities = output_sensitivities(self.subject.model, units, samples)
            sources = column_sources(find_folds(self.subject.model, units, samples[0]))
        rows: dict[str, Profile] = {}
        walked = walk(
            self.subject.model,
            self.subject.units,
            samples,
            needs=profiler.needs,
            execution=self._alone,
            wanted=[unit.name for unit in missing],
        )
        with contextlib.closing(walked) as visits:
            for visit in visits:
                for target in visit.targets:
                    if profiler.covers(target.name, target.kind):
                        rows[target.name] = profiler.profile(
                            self._brought(self.result.states[target.name]),
                            visit.statistics[target.name],
                            sensitivity=sensitivities.get(target.name),
                            sources=sources.get(target.name),
                        )
                if visit.complete:
                    if passage is not None:
                        self._keep(passage, visit.unit.name, "measured", dict(rows))
                    profiles.update(rows)
                    rows.clear()
                    self.bar.update()
        return profiles

    def added_losses(self, method: Method, candidates: Sequence[Rewrite]) -> list[float]:
        """Return how far each candidate moves the model on samples that were held back."""
        units = self.subject.units
        passage = self._begin(units[:1], f"{method.stage}: choosing")
        losses = self._first(lambda: self._added_losses(candidates, passage))
        return list(losses)

    def _added_losses(self, candidates: Sequence[Rewrite], passage: Passage | None) -> list[float]:
        """Try candidates in this process alone."""
        units = self.subject.units
        if passage is not None and passage.has(units[0].name):
            return list(passage.load(units[0].name)["losses"])
        samples = single_samples(self.subject.batches, last=True)
        table = added_losses(
            self.subject.model, units, list(itertools.islice(samples, _HELD_BACK)), candidates
        )
        means = [sum(row) / len(row) for row in table]
        if passage is not None:
            self._keep(passage, units[0].name, "measured", {"losses": means})
        self.bar.update()
        return means

    def measure(self, allocator: Allocator) -> list[Measured]:
        """Measure every candidate on every group of layers, with the rest of the model as it is."""
        units = self.subject.units
        needs = needs_of([allocator, *allocator.backends.values()])
        passage = self._begin(units, f"{allocator.stage}: measuring")
        plain = self._first(lambda: self._measured(allocator, needs, passage))
        rows = {
            name: [Measured(**row | {"stage": Stage.parse(row["stage"])}) for row in table]
            for name, table in plain.items()
        }
        return _table(allocator, units, rows)

    def _measured(
        self,
        allocator: Allocator,
        needs: Collection[type[Accumulator]],
        passage: Passage | None,
    ) -> dict[str, Sequence[dict[str, Any]]]:
        """Measure the groups of each block, in this process alone: all see the same samples.

        Returns:
            Rows by block, as plain values.
        """
        units = self.subject.units
        rows: dict[str, Sequence[dict[str, Any]]] = {}
        for unit in units:
            if passage is not None and passage.has(unit.name):
                rows[unit.name] = passage.load(unit.name)
        missing = [unit for unit in units if unit.name not in rows]
        execution = dataclasses.replace(self._alone, pause="block")
        if missing:
            sensitivities = self._sensitivities() if allocator.weighs_outputs else None
            with contextlib.closing(self._walk(missing, needs, execution)) as visits:
                for visit in visits:
                    rows[visit.unit.name] = [
                        dataclasses.asdict(row) | {"stage": str(row.stage)}
                        for row in self._try(allocator, visit, sensitivities)
                    ]
                    if passage is not None:
                        self._keep(passage, visit.unit.name, "measured", rows[visit.unit.name])
                    self.bar.update()
        return rows

    def _sensitivities(self) -> dict[str, Tensor]:
        """Return the mean squared gradient of the loss by each output of each layer, (out,)."""
        samples = list(itertools.islice(single_samples(self.subject.batches), Profiler.profiled))
        rows = output_sensitivities(self.subject.model, self.subject.units, samples)
        return {name: gradients.mean(0) for name, gradients in rows.items()}

    def _try(
        self, allocator: Allocator, visit: Visit, sensitivities: Mapping[str, Tensor] | None
    ) -> Iterator[Measured]:
        """Try every candidate on every group of layers of a block; leave the block as it was.

        Args:
            allocator: Whose candidates they are.
            visit: The block.
            sensitivities: Of the loss, by each output; None to measure the output of the block.
        """
        groups: dict[str, list[Target]] = defaultdict(list)
        for target in visit.targets:
            if not allocator.covers(target.name, target.kind):
                continue
            alone = "experts" if target.kind == "expert" else visit.leaders[target.name]
            groups[alone if allocator.fused else target.name].append(target)
        if sensitivities is None:
            error_of = _block_error(visit)
        else:
            error_of = functools.partial(_added_loss, visit, sensitivities)
        for group in groups.values():
            states = {t.name: self._brought(self.result.states[t.name]) for t in group}
            states = {t.name: dataclasses.replace(states[t.name], weight=t.read()) for t in group}
            weights = sum(state.weight.numel() for state in states.values())
            for stage, backend in allocator.backends.items():
                stored = 0.0
                for target in group:
                    statistics = visit.statistics[target.name]
                    after = backend.apply(states[target.name], statistics, where=target.name)
                    target.write(after.weight)
                    stored += after.stored_bits * after.weight.numel()
                error = error_of(states)
                yield Measured(tuple(states), weights, stage, after.bits, stored / weights, error)
            for target in group:
                target.write(states[target.name].weight)


def _block_error(visit: Visit) -> Callable[[Mapping[str, LayerState]], float]:
    """Return a function that gives the relative squared error of the output of a block."""
    before = visit.outputs()
    size = before.square().sum()
    return lambda _: ((visit.outputs() - before).square().sum() / size).item()


def _added_loss(
    visit: Visit, sensitivities: Mapping[str, Tensor], states: Mapping[str, LayerState]
) -> float:
    """Return what layers that were changed add to the loss.

    Args:
        visit: Their block.
        sensitivities: Of the loss, by each output of each layer.
        states: The layers before, by name.

    Raises:
        OrderError: If the loss has no gradient by the outputs of one.
    """
    total = 0.0
    for target in visit.targets:
        if target.name not in states:
            continue
        if target.name not in sensitivities:
            raise OrderError(
                f"error=loss needs the gradient of the loss by the outputs of '{target.name}', an "
                f"{target.kind} layer that has none. Use error=block."
            )
        before = states[target.name].weight
        delta = target.read().to(before.device).float() - before.float()
        gram, sensitivity = visit.statistics[target.name][Gram], sensitivities[target.name]
        total += added_loss(delta, gram, sensitivity.to(delta.device))
    return total


def _table(
    allocator: Allocator, units: Sequence[Unit], rows: Mapping[str, Sequence[Measured]]
) -> list[Measured]:
    """Return all rows; those of all experts are one: packed formats hold one scheme for all."""
    kinds = {target.name: target.kind for unit in units for target in unit.targets}
    table: list[Measured] = []
    experts: dict[Stage, list[Measured]] = defaultdict(list)
    for row in itertools.chain.from_iterable(rows[unit.name] for unit in units):
        fused = allocator.fused and kinds[row.layers[0]] == "expert"
        (experts[row.stage] if fused else table).append(row)
    for stage, measured in experts.items():
        names = tuple(name for row in measured for name in row.layers)
        weights = sum(row.weights for row in measured)
        stored = sum(row.stored_bits * row.weights for row in measured) / weights
        error = sum(row.error for row in measured)
        table.append(Measured(names, weights, stage, measured[0].bits, stored, error))
    return table
