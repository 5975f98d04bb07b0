"""Passes that prune and quantize: one walk over the blocks, with backends for each layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

from optimum_order.backends.base import Backend, Method, needs_of
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.walk import Visit
from optimum_order.engine import snapshot
from optimum_order.engine.passes.base import BasePasses
from optimum_order.engine.workdir import Passage
from optimum_order.layers.packed import Packed
from optimum_order.layers.statistics import Accumulator, Drift, Gram
from optimum_order.models.memory import trim
from optimum_order.models.units import Target, Unit


class Compressing(BasePasses):
    """Applies backends."""

    def apply(self, backends: Sequence[Backend]) -> None:
        """Apply backends to every layer that they cover, on one walk."""
        chosen = {
            target.name: [
                backend for backend in backends if backend.covers(target.name, target.kind)
            ]
            for unit in self.subject.units
            for target in unit.targets
        }
        self._compress(
            {name: mine for name, mine in chosen.items() if mine},
            " > ".join(str(backend.stage) for backend in backends),
        )

    def assign(self, backends: Mapping[str, Backend], allocator: Method) -> None:
        """Apply to each named layer the backend that a method chose, on one walk."""
        self._compress({name: [mine] for name, mine in backends.items()}, str(allocator.stage))

    def _compress(self, backends: Mapping[str, Sequence[Backend]], label: str) -> None:
        self._remember()
        methods = [backend for mine in backends.values() for backend in mine]
        needs = needs_of(methods)
        execution = self.execution
        if any(method.kind in ("inputs", "adapt") for method in methods):
            # a layer that is paused at is called already, and sees no new hook
            execution = dataclasses.replace(execution, pause="block")
        if execution.pause == "block":  # as a streamed model does, which is read only once
            needs = frozenset(need for need in needs if not need.compares)
        # Only the blocks that this pass changes, and what lies before the last of them, are run.
        units = [u for u in self.subject.units if any(t.name in backends for t in u.targets)]
        passage = self._begin(units, label)
        pending: dict[str, Callable[[], None]] = {}
        units = self._restore(passage, units, pending if Drift in needs else None)
        # A sweep's matrices are the largest there are, and what the forwards before them freed is
        # of other sizes.
        tight = self.execution.streams or Gram in needs
        with contextlib.closing(self._visits(units, needs, execution, pending)) as visits:
            for visit in visits:
                if tight:
                    trim()
                owners = self._deal(visit.targets, backends)
                for target in visit.targets:
                    if owners.get(target.name) != self.ranks.rank:
                        continue
                    for backend in backends[target.name]:
                        statistics = visit.statistics.get(target.name)
                        before = self._brought(self.result.states[target.name])
                        if backend.reads_original:
                            original = self._originals[target.name].to(before.weight.device)
                            before = dataclasses.replace(before, original=original)
                        after = backend.apply(before, statistics, where=target.name)
                        self._settle(target, (before, after), backend.stage, statistics)
                        if tight:
                            trim()
                self._exchange(visit.targets, owners)
                if visit.complete:
                    if passage is not None:
                        self._save(passage, visit.unit, keep=Drift in needs)
                    self.bar.update()
        for put_back in pending.values():  # where the walk went through none of them
            put_back()

    def _remember(self) -> None:
        """Keep the weights of layers that a later stage is to be compared with, once."""
        if self._originals or not self.comparing:
            return
        states = self.result.states if self.subject.before is None else self.subject.before
        for unit in self.subject.units:
            for target in unit.targets:
                if any(method.covers(target.name, target.kind) for method in self.comparing):
                    self._originals[target.name] = states[target.name].weight.clone()

    def _deal(
        self, targets: Sequence[Target], backends: Mapping[str, Sequence[Backend]]
    ) -> dict[str, int]:
        """Return which rank compresses each layer that has backends, by name."""
        costs = {}
        for target in targets:
            if mine := backends.get(target.name):
                out, inputs = target.view.shape
                # a sweep passes over the weights that remain for each column
                costs[target.name] = sum(
                    out * inputs * (inputs if Gram in backend.needs else 1) for backend in mine
                )
        return self.ranks.deal(costs)

    def _exchange(self, targets: Sequence[Target], owners: Mapping[str, int]) -> None:
        """Give all ranks the layers that one of them has compressed."""
        if self.ranks.size == 1:
            return
        for target in targets:
            owner = owners.get(target.name)
            if owner is None:
                continue
            message = None
            if owner == self.ranks.rank:
                compressed = {
                    "state": Packed.of(self.result.states[target.name]),
                    "records": self.result.records[target.name],
                    "masked": target.name in self._masked,
                }
                message = snapshot.flat(compressed)
            received = self.ranks.broadcast(message, owner)
            if message is None:
                layer = snapshot.restored(*received, str(self.home))
                state = layer["state"].state()
                target.put(state)
                self.put(target, state)
                self.result.records[target.name] = list(layer["records"])
                if not layer["masked"]:
                    self._masked.discard(target.name)
        self.ranks.wait()  # rank 0 now replaces files that others may still read

    def _visits(
        self,
        units: Sequence[Unit],
        needs: Collection[type[Accumulator]],
        execution: Execution,
        finished: Mapping[str, Callable[[], None]],
    ) -> Generator[Visit, None, None]:
        """Pause at some blocks; without a forward where nothing is needed of it."""
        if needs and units:
            with contextlib.closing(self._walk(units, needs, execution, finished)) as visits:
                yield from visits
            return
        for unit in units:
            with self.execution.resident(unit):
                yield Visit(unit, unit.targets, {}, {})

    def _restore(
        self,
        passage: Passage | None,
        units: Sequence[Unit],
        pending: dict[str, Callable[[], None]] | None = None,
    ) -> list[Unit]:
        """Put what a pass left of finished blocks into result and model; return the rest.

        Args:
            passage: The pass.
            units: Its blocks.
            pending: Where to put what changes the model, by block, instead of doing so now.
        """
        if passage is None:
            return list(units)
        for unit in units:
            if not passage.has(unit.name):
                continue
            stored = passage.load(unit.name, str(self.home))
            if stored is None:  # a later pass has left something since
                continue
            records = {name: list(records) for name, records in stored["records"].items()}
            self.result.records.update(records)
            packed: dict[str, Packed] = stored["states"]
            self._masked -= {name for name, state in packed.items() if state.weight is not None}
            if self.execution.streams:
                continue
            if pending is None:
                self._put_back(unit, packed)
            else:
                pending[unit.name] = functools.partial(self._put_back, unit, packed)
        self.ranks.wait()  # rank 0 will now replace what others have read
        return [unit for unit in units if not passage.has(unit.name)]

    def _put_back(self, unit: Unit, packed: Mapping[str, Packed]) -> None:
        """Put what a pass left of a finished block into result and model."""
        for target in unit.targets:
            state = packed[target.name].state(target.read())
            target.put(state)
            self.result.states[target.name] = (
                dataclasses.replace(state, weight=target.shared()) if self.shares else state
            )

    def _save(self, passage: Passage, unit: Unit, *, keep: bool) -> None:
        """Keep the states and records of a block.

        Args:
            passage: The pass.
            unit: The block.
            keep: Whether to keep what earlier passes left too, which a walk that compares needs.
        """
        names = [target.name for target in unit.targets]
        packed = {name: Packed.of(self.result.states[name]) for name in names}
        records = {name: list(self.result.records[name]) for name in names}
        masked = self._masked.intersection(names)

        def value() -> dict[str, Any]:
            states = {name: one.reduced(only_masked=name in masked) for name, one in packed.items()}
            return {"states": states, "records": records}

        self._keep(passage, unit.name, "state", value, keep=keep)
