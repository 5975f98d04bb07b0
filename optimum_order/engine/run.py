"""One run: a model in memory and an order in, the states of its layers out. No search, no files, no Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_order.backends import Allocator, Backend, Measured, canonical, method
from optimum_order.calibration import precision
from optimum_order.calibration.walk import Crossing, Keeper, Visit, Visitor, walk
from optimum_order.engine.streamed import Streamed, refuse_infinite
from optimum_order.engine.workdir import Passage, WorkDir
from optimum_order.errors import DataError, OrderError, unknown
from optimum_order.layers.error import relative_error
from optimum_order.layers.packed import Packed, States, is_masked
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.models.lazy import trim
from optimum_order.models.units import Target, Unit
from optimum_order.order import Order, Stage

SCHEDULES = ("stage", "block")

Pass = dict[str, list[Backend]]
"""One walk over the model: what is done to each layer, by name, when the walk is there."""


@dataclasses.dataclass
class Result:
    """The layers after a run, and how they came to be."""

    states: MutableMapping[str, LayerState]
    records: dict[str, list[StageRecord]]
    stages: tuple[Stage, ...] = ()

    @property
    def order(self) -> Order:
        """The stages that were applied."""
        return Order(self.stages)

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Result:
        """The layers as they are in the model, before any stage."""
        states = {
            target.name: LayerState(target.read()) for unit in units for target in unit.targets
        }
        return cls(states, {name: [] for name in states})

    def write(self, units: Sequence[Unit]) -> None:
        """Put the layers' weights into the model."""
        for unit in units:
            for target in unit.targets:
                target.write(self.states[target.name].weight)


def check(order: Order, units: Sequence[Unit], schedule: str, *, calibrated: bool) -> Order:
    """The canonical order, or an error for anything that would fail later: nothing is run here.

    Raises:
        OrderError: A method, option or schedule that does not exist, or a layer whose shape an option does not fit.
        DataError: A stage needs calibration and there is none.
    """
    if schedule not in SCHEDULES:
        raise OrderError(unknown("schedule", schedule, SCHEDULES))
    order = canonical(order)
    for stage in order:
        chosen = method(stage)
        backends = (
            [method(s) for s in chosen.candidates()] if isinstance(chosen, Allocator) else [chosen]
        )
        refused = defaultdict(list)
        for target in (target for unit in units for target in unit.targets):
            if reason := backends[0].check_shape((target.view.shape[0], target.view.shape[1])):
                refused[reason].append(target.name)
        for reason, names in refused.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OrderError(
                f"Stage '{stage}' cannot compress {', '.join(names[:3])}{more}: {reason}."
            )
        if not calibrated and needs_data(stage):
            raise DataError(
                f"Stage '{stage}' needs calibration data and none was given. Pass calibration=... (a .txt, .jsonl or "
                ".parquet path, a Hub dataset, or 'builtin'), or use only magnitude, rtn and bitsandbytes."
            )
    return order


def needs_data(stage: Stage) -> bool:
    """Whether a stage looks at the layers' inputs."""
    chosen = method(stage)
    return isinstance(chosen, Allocator) or bool(chosen.needs)


def run(
    model: PreTrainedModel,
    units: Sequence[Unit],
    order: Order,
    batches: Sequence[dict[str, Tensor]],
    *,
    schedule: str = "stage",
    start: Result | None = None,
    work: WorkDir | None = None,
    streamed: Streamed | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Result:
    """Apply every stage in turn; the model's weights end as the states' weights.

    Args:
        model: In evaluation mode; changed in place.
        units: What to compress, from `find_units(model)`.
        order: From `check`.
        batches: Calibration inputs; may be empty if no stage needs statistics.
        schedule: "stage" walks the whole model once per stage, so that a stage sees what all earlier stages made of
            every layer; "block" applies all stages to a block, on one capture of its inputs, before it moves on.
        start: What earlier stages left, if this run continues them; the model's layers are set to it. With the
            schedule "stage" the end is bit for bit that of all stages in one run. Without it, the weights of the
            states lie in the model's own memory where they can: there is one copy of them.
        work: Where to keep what is finished, unit by unit. What is there already is not done again; the end is bit for
            bit that of a run that was never cut off.
        streamed: What fills the model a unit at a time, and holds the states, if the model is larger than memory. It
            needs `work`, takes no `start`, and leaves the model empty.
        device: Where each unit is brought while its layers are compressed, all else staying where the model is; by
            default that is done there too.
        dtype: That calibration multiplies in; by default what `precision.choose` takes.
        progress: Whether to show a bar on stderr.

    Raises:
        ModelError: If a weight is NaN or infinite, or the model cannot be walked.
        OutputError: If the work dir cannot be written, or is damaged.
    """
    if streamed is not None:
        result = Result(
            streamed.states,
            {target.name: [] for unit in units for target in unit.targets},
            order.stages,
        )
    else:
        refuse_infinite(model.named_parameters())
        if start is None:
            states = {
                target.name: LayerState(target.shared())
                for unit in units
                for target in unit.targets
            }
            result = Result(States(states), {name: [] for name in states}, order.stages)
        else:
            start.write(units)
            records = {name: list(found) for name, found in start.records.items()}
            result = Result(States(start.states), records, (*start.stages, *order))
    with tqdm(total=0, unit="block", disable=not progress) as bar:
        passes = _Passes(
            model, units, batches, result, bar, work, streamed, device, dtype, start is None
        )
        for group in _groups(order, schedule):
            if isinstance(group, Allocator):
                for chosen in group.allocate(passes.measure(group)):
                    stages: Pass = {name: [_backend(stage)] for name, stage in chosen.items()}
                    passes.apply(stages, str(group.stage))
            else:
                label = " > ".join(str(backend.stage) for backend in group)
                passes.apply(dict.fromkeys(result.records, group), label)
    if work is not None:
        work.wait()
    return result


def _groups(order: Order, schedule: str) -> list[Allocator | list[Backend]]:
    """What is done in one walk: one stage, or as many as stand between two allocators, which need the whole model."""
    groups: list[Allocator | list[Backend]] = []
    for stage in order:
        chosen = method(stage)
        if isinstance(chosen, Allocator):
            groups.append(chosen)
        elif schedule == "block" and groups and isinstance(groups[-1], list):
            groups[-1].append(_backend(stage))
        else:
            groups.append([_backend(stage)])
    return groups


def _backend(stage: Stage) -> Backend:
    chosen = method(stage)
    assert isinstance(
        chosen, Backend
    )  # allocators allocate for backends; `check` has read every stage
    return chosen


@dataclasses.dataclass
class _Passes:
    """The passes of a run over its model, one after the other.

    Args:
        model, units, batches, work, streamed, device, dtype: As in `run`.
        result: What there is so far.
        bar: Shows it.
        shares: Whether the states' weights are to lie in the model's own memory.
    """

    model: PreTrainedModel
    units: Sequence[Unit]
    batches: Sequence[dict[str, Tensor]]
    result: Result
    bar: tqdm
    work: WorkDir | None
    streamed: Streamed | None
    device: torch.device | None
    dtype: torch.dtype | None
    shares: bool

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._masked = set(self.result.records)
        """Layers whose weights are those that the run began with but for what was pruned."""

    def apply(self, stages: Pass, label: str) -> None:
        """Do to each layer what a pass says."""
        needs = {
            need for backends in stages.values() for backend in backends for need in backend.needs
        }
        # Only the units that this pass changes, and what lies before the last of them, need to be run.
        changed = [
            unit for unit in self.units if any(target.name in stages for target in unit.targets)
        ]
        kept = self._begin(changed, label)
        finished = self._restore(kept, changed)

        # A sweep's matrices are the largest there are, and what the forwards before it freed is of other sizes.
        tight = self.streamed is not None or Gram in needs

        def treat(unit: Unit, statistics: dict[str, Statistics]) -> None:
            if tight:
                trim()
            for target in unit.targets:
                for backend in stages.get(target.name, []):
                    self._apply(backend, target, statistics.get(target.name))
                    if tight:
                        trim()
            self.bar.update()

        def keep(unit: Unit, crossing: Callable[[], Crossing | None] = lambda: None) -> None:
            names = [target.name for target in unit.targets]
            packed = {name: Packed.of(self.result.states[name]) for name in names}
            records, masked = (
                {name: self.result.records[name] for name in names},
                self._masked.intersection(names),
            )

            def value() -> dict[str, Any]:
                states = {
                    name: each.reduced(only_masked=name in masked) for name, each in packed.items()
                }
                return {"states": states, "records": records}

            self._save(kept, unit, "state", value, crossing)

        if needs:
            self._walk(
                changed, finished, lambda at: treat(at.unit, at.statistics), needs, kept, keep
            )
            return
        for unit in changed:
            if unit.name not in finished:
                with self._there(unit):
                    treat(unit, {})
                    if kept is not None:
                        keep(unit)

    def measure(self, allocator: Allocator) -> list[Measured]:
        """What each candidate would do to each group of layers, with the rest of the model as it is."""
        rows: dict[str, list[Measured]] = {}
        states = self.result.states
        backends = {stage: _backend(stage) for stage in allocator.candidates()}
        kept = self._begin(self.units, f"{allocator.stage}: measuring")
        for name in (finished := self._finished(kept, self.units)):
            rows[name] = [
                Measured(**row | {"stage": Stage.parse(row["stage"])}) for row in kept.load(name)
            ]

        def visit(at: Visit) -> None:
            groups: dict[str, list[Target]] = defaultdict(list)
            for target in at.unit.targets:
                alone = (
                    "experts"
                    if target.kind == "expert"
                    else at.leaders.get(target.name, target.name)
                )
                groups[alone if allocator.fused else target.name].append(target)
            before = at.outputs()
            rows[at.unit.name] = found = []
            for group in groups.values():
                names = tuple(target.name for target in group)
                as_is = {
                    t.name: dataclasses.replace(self._brought(states[t.name]), weight=t.read())
                    for t in group
                }
                weights = sum(state.weight.numel() for state in as_is.values())
                for stage, backend in backends.items():
                    for target in group:
                        after = backend.apply(
                            as_is[target.name], at.statistics[target.name], where=target.name
                        )
                        target.write(after.weight)
                    error = ((at.outputs() - before).square().sum() / before.square().sum()).item()
                    found.append(Measured(names, weights, stage, after.bits, error))
                for target in group:
                    target.write(as_is[target.name].weight)
            self.bar.update()

        def keep(unit: Unit, crossing: Callable[[], Crossing | None]) -> None:
            found = [dataclasses.asdict(row) | {"stage": str(row.stage)} for row in rows[unit.name]]
            self._save(kept, unit, "measured", found, crossing)

        needs = {need for backend in backends.values() for need in backend.needs}
        self._walk(self.units, finished, visit, needs, kept, keep)
        table: list[Measured] = []
        experts: dict[Stage, list[Measured]] = defaultdict(list)
        kinds = {target.name: target.kind for unit in self.units for target in unit.targets}
        for row in (row for unit in self.units for row in rows[unit.name]):
            expert = allocator.fused and kinds[row.layers[0]] == "expert"
            (experts[row.stage] if expert else table).append(row)
        for (
            stage,
            found,
        ) in experts.items():  # packed formats hold fused experts under one scheme only
            names = tuple(name for row in found for name in row.layers)
            weights, error = sum(row.weights for row in found), sum(row.error for row in found)
            table.append(Measured(names, weights, stage, found[0].bits, error))
        return table

    def _apply(self, backend: Backend, target: Target, statistics: Statistics | None) -> None:
        result = self.result
        before = self._brought(result.states[target.name])
        after = backend.apply(before, statistics, where=target.name)
        with precision.products(torch.bfloat16):  # a figure of four digits for people
            error, measured_on = relative_error(before.weight, after.weight, statistics)
        if self.work is not None and target.name in self._masked and not is_masked(before, after):
            self._masked.remove(target.name)
        target.write(after.weight)
        if self.device is not None:
            after = after.to(torch.device(self._home))
        elif self.shares and self.streamed is None:
            after = dataclasses.replace(after, weight=target.shared())
        result.states[target.name] = after
        result.records[target.name].append(StageRecord(str(backend.stage), error, measured_on))

    def _begin(self, units: Sequence[Unit], label: str) -> Passage | None:
        number = next(self._numbers)
        if self.work is not None:
            self.work.wait()  # it may still read weights that this pass changes
        kept = (
            None
            if self.work is None
            else self.work.passage(number, [unit.name for unit in self.units])
        )
        self.bar.total += len(units)
        self.bar.set_description(label)
        self.bar.update(len(self._finished(kept, units)))
        return kept

    def _finished(self, kept: Passage | None, units: Sequence[Unit]) -> list[str]:
        return [] if kept is None else kept.finished([unit.name for unit in units])

    def _restore(self, kept: Passage | None, units: Sequence[Unit]) -> list[str]:
        """Put what a pass left of its finished units into the result and the model, and name them."""
        finished = self._finished(kept, units)
        for unit in units:
            if unit.name in finished and (found := kept.load(unit.name, self._home)) is not None:
                self.result.records.update(
                    {name: list(records) for name, records in found["records"].items()}
                )
                packed: dict[str, Packed] = found["states"]
                self._masked -= {name for name, each in packed.items() if each.weight is not None}
                for target in [] if self.streamed else unit.targets:
                    state = packed[target.name].state(target.read())
                    target.write(state.weight)
                    shared = (
                        dataclasses.replace(state, weight=target.shared()) if self.shares else state
                    )
                    self.result.states[target.name] = shared
        return finished

    def _walk(
        self,
        units: Sequence[Unit],
        finished: Sequence[str],
        visit: Visitor,
        needs: Collection[str],
        kept: Passage | None,
        keep: Keeper,
    ) -> None:
        """Visit those of some units that are not finished."""
        if len(finished) == len(units):
            return
        wanted = {unit.name for unit in units} - set(finished)
        options: dict[str, Any] = {"there": self._there, "device": self.device}
        options |= {"finished": [unit.name for unit in self.units if unit.name not in wanted]}
        if kept is not None:
            options |= {"crossing": functools.partial(kept.crossing, self._home), "keep": keep}
        if self.streamed is not None:
            options |= {"spill": self.streamed.spill}
        walk(
            self.model,
            self.units,
            self.batches,
            visit,
            needs=needs,
            dtype=self.dtype,
            **options,
        )

    @property
    def _home(self) -> str:
        """Where the model is."""
        return str(self.model.device if self.streamed is None else self.streamed.weights.device)

    @contextlib.contextmanager
    def _there(self, unit: Unit | None) -> Iterator[None]:
        """While active, a unit has its weights, where it is to be compressed."""
        with contextlib.nullcontext() if self.streamed is None else self.streamed.there(unit):
            if self.device is None or unit is None:
                yield
                return
            with torch.inference_mode(False):  # its parameters are to be ordinary ones ever after
                unit.module.to(self.device)
            try:
                yield
            finally:
                with torch.inference_mode(False):
                    unit.module.to(self._home)

    def _brought(self, state: LayerState) -> LayerState:
        return state if self.device is None else state.to(self.device)

    def _save(
        self,
        kept: Passage,
        unit: Unit,
        kind: str,
        value: Any,
        crossing: Callable[[], Crossing | None],
    ) -> None:
        kept.save(unit.name, kind, value, crossing)
        if self.streamed is not None:  # memory matters more than time
            self.work.wait()
