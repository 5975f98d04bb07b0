"""One run: a model in memory and an order in, the states of its layers out. No search, no files, no Hub."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_order.backends import Allocator, Backend, Measured, canonical, method
from optimum_order.calibration import precision
from optimum_order.calibration.walk import Crossing, Keeper, Visit, Visitor, walk
from optimum_order.errors import DataError, ModelError, OrderError, unknown
from optimum_order.layer import LayerState, StageRecord, Statistics
from optimum_order.order import Order, Stage
from optimum_order.targets import Target, Unit
from optimum_order.workdir import Passage, WorkDir

SCHEDULES = ("stage", "block")

Pass = dict[str, list[Backend]]
"""One walk over the model: what is done to each layer, by name, when the walk is there."""


@dataclasses.dataclass
class Result:
    """The layers after a run, and how they came to be."""

    states: dict[str, LayerState]
    records: dict[str, list[StageRecord]]
    stages: tuple[Stage, ...] = ()

    @property
    def order(self) -> Order:
        """The stages that were applied."""
        return Order(self.stages)

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Result:
        """The layers as they are in the model, before any stage."""
        states = {target.name: LayerState(target.read()) for unit in units for target in unit.targets}
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
        backends = [method(s) for s in chosen.candidates()] if isinstance(chosen, Allocator) else [chosen]
        refused = defaultdict(list)
        for target in (target for unit in units for target in unit.targets):
            if reason := backends[0].check_shape((target.view.shape[0], target.view.shape[1])):
                refused[reason].append(target.name)
        for reason, names in refused.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OrderError(f"Stage '{stage}' cannot compress {', '.join(names[:3])}{more}: {reason}.")
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
            schedule "stage" the end is bit for bit that of all stages in one run.
        work: Where to keep what is finished, unit by unit. What is there already is not done again; the end is bit for
            bit that of a run that was never cut off.
        dtype: That calibration multiplies in; by default what `precision.choose` takes.
        progress: Whether to show a bar on stderr.

    Raises:
        ModelError: If a weight is NaN or infinite, or the model cannot be walked.
        OutputError: If the work dir cannot be written, or is damaged.
    """
    targets = {target.name: target for unit in units for target in unit.targets}
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"'{name}' holds a weight that is NaN or infinite; compress a checkpoint whose weights are finite."
            )
    if start is None:
        start = Result.of(units)
    else:
        start.write(units)
    records = {name: list(found) for name, found in start.records.items()}
    result = Result(dict(start.states), records, (*start.stages, *order))
    names, numbers = [unit.name for unit in units], itertools.count()

    def kept() -> Passage | None:
        return None if work is None else work.passage(next(numbers), names)

    with tqdm(total=0, unit="block", disable=not progress) as bar:
        for group in _groups(order, schedule):
            if isinstance(group, Allocator):
                table = _measure(model, units, group, result.states, batches, bar, kept(), dtype)
                for chosen in group.allocate(table):
                    stages: Pass = {name: [_backend(stage)] for name, stage in chosen.items()}
                    _run_pass(model, units, stages, result, batches, bar, str(group.stage), kept(), dtype)
            else:
                label = " > ".join(str(backend.stage) for backend in group)
                _run_pass(model, units, dict.fromkeys(targets, group), result, batches, bar, label, kept(), dtype)
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
    assert isinstance(chosen, Backend)  # allocators allocate for backends; `check` has read every stage
    return chosen


def _run_pass(
    model: PreTrainedModel,
    units: Sequence[Unit],
    stages: Pass,
    result: Result,
    batches: Sequence,
    bar: tqdm,
    label: str,
    kept: Passage | None,
    dtype: torch.dtype | None,
) -> None:
    needs = {need for backends in stages.values() for backend in backends for need in backend.needs}
    # Only the units that this pass changes, and what lies before the last of them, need to be run.
    changed = [unit for unit in units if any(target.name in stages for target in unit.targets)]
    finished = _restore(kept, changed, result, model.device)
    bar.total += len(changed)
    bar.set_description(label)
    bar.update(len(finished))

    def treat(unit: Unit, statistics: dict[str, Statistics]) -> None:
        for target in unit.targets:
            for backend in stages.get(target.name, []):
                _apply(backend, target, statistics.get(target.name), result)
        bar.update()

    def keep(unit: Unit, crossing: Callable[[], Crossing | None] = lambda: None) -> None:
        names = [target.name for target in unit.targets]
        states, records = ({name: of[name] for name in names} for of in (result.states, result.records))
        kept.save(unit.name, "state", {"states": states, "records": records}, crossing)

    if len(finished) == len(changed):
        return
    if needs:
        _walk(model, changed, batches, lambda at: treat(at.unit, at.statistics), needs, finished, kept, keep, dtype)
        return
    for unit in changed:
        if unit.name not in finished:
            treat(unit, {})
            if kept is not None:
                keep(unit)


def _walk(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batches: Sequence,
    visit: Visitor,
    needs: Collection[str],
    finished: Collection[str],
    kept: Passage | None,
    keep: Keeper,
    dtype: torch.dtype | None,
) -> None:
    keeping: dict[str, Any] = {}
    if kept is not None:
        crossing = functools.partial(kept.crossing, str(model.device))
        keeping = {"finished": finished, "crossing": crossing, "keep": keep}
    walk(model, units, batches, visit, gram="gram" in needs, dtype=dtype, **keeping)


def _restore(kept: Passage | None, units: Sequence[Unit], result: Result, device: torch.device) -> list[str]:
    """Put what a pass left of its finished units into the result and the model, and name them."""
    if kept is None:
        return []
    finished = kept.finished([unit.name for unit in units])
    for unit in units:
        if unit.name in finished and (found := kept.load(unit.name, str(device))) is not None:
            result.states.update(found["states"])
            result.records.update({name: list(records) for name, records in found["records"].items()})
            for target in unit.targets:
                target.write(found["states"][target.name].weight)
    return finished


def _apply(backend: Backend, target: Target, statistics: Statistics | None, result: Result) -> None:
    before = result.states[target.name]
    after = backend.apply(before, statistics, where=target.name)
    target.write(after.weight)
    result.states[target.name] = after
    with precision.products(torch.bfloat16):  # a figure of four digits for people
        error, measured_on = relative_error(before.weight, after.weight, statistics)
    result.records[target.name].append(StageRecord(str(backend.stage), error, measured_on))


def relative_error(before: Tensor, after: Tensor, statistics: Statistics | None) -> tuple[float, str]:
    """Squared error over squared size, and in what: the layer's outputs if H is known, else the nearest to it.

    Args:
        before: (out, in).
        after: (out, in).
        statistics: The layer's inputs, or None.
    """
    delta = after.float() - before.float()
    if statistics is None or statistics.tokens == 0:
        size, error, measured_on = before.float().square().sum().item(), delta.square().sum().item(), "weights"
    else:
        size, error = statistics.squared_error(before), statistics.squared_error(delta)
        measured_on = "inputs" if statistics.gram is None else "outputs"
    return (error / size if size else 0.0), measured_on


def _measure(
    model: PreTrainedModel,
    units: Sequence[Unit],
    allocator: Allocator,
    states: dict[str, LayerState],
    batches: Sequence,
    bar: tqdm,
    kept: Passage | None,
    dtype: torch.dtype | None,
) -> list[Measured]:
    """What each candidate of an allocator would do to each group of layers, with the rest of the model as it is."""
    rows: dict[str, list[Measured]] = {}
    backends = {stage: _backend(stage) for stage in allocator.candidates()}
    finished = [] if kept is None else kept.finished([unit.name for unit in units])
    for name in finished:
        rows[name] = [Measured(**row | {"stage": Stage.parse(row["stage"])}) for row in kept.load(name)]
    bar.total += len(units)
    bar.set_description(f"{allocator.stage}: measuring")
    bar.update(len(finished))

    def visit(at: Visit) -> None:
        groups: dict[str, list[Target]] = defaultdict(list)
        for target in at.unit.targets:
            alone = "experts" if target.kind == "expert" else at.leaders.get(target.name, target.name)
            groups[alone if allocator.fused else target.name].append(target)
        before = at.outputs()
        rows[at.unit.name] = found = []
        for group in groups.values():
            names = tuple(target.name for target in group)
            weights = sum(states[name].weight.numel() for name in names)
            for stage, backend in backends.items():
                for target in group:
                    after = backend.apply(states[target.name], at.statistics[target.name], where=target.name)
                    target.write(after.weight)
                error = ((at.outputs() - before).square().sum() / before.square().sum()).item()
                found.append(Measured(names, weights, stage, after.bits, error))
            for target in group:
                target.write(states[target.name].weight)
        bar.update()

    def keep(unit: Unit, crossing: Callable[[], Crossing | None]) -> None:
        found = [dataclasses.asdict(row) | {"stage": str(row.stage)} for row in rows[unit.name]]
        kept.save(unit.name, "measured", found, crossing)

    needs = {need for backend in backends.values() for need in backend.needs}
    if len(finished) < len(units):
        _walk(model, units, batches, visit, needs, finished, kept, keep, dtype)
    table: list[Measured] = []
    experts: dict[Stage, list[Measured]] = defaultdict(list)
    fused = {target.name for unit in units for target in unit.targets if allocator.fused and target.kind == "expert"}
    for row in (row for unit in units for row in rows[unit.name]):
        (experts[row.stage] if row.layers[0] in fused else table).append(row)
    for stage, found in experts.items():  # packed formats hold fused experts under one scheme only
        names = tuple(name for row in found for name in row.layers)
        weights, error = sum(row.weights for row in found), sum(row.error for row in found)
        table.append(Measured(names, weights, stage, found[0].bits, error))
    return table
