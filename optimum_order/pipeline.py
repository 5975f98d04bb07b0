"""One run: a model in memory and an order in, the states of its layers out. No search, no files, no Hub."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_order.backends import Allocator, Backend, Measured, canonical, method
from optimum_order.calibration.walk import Visit, walk
from optimum_order.errors import DataError, ModelError, OrderError, unknown
from optimum_order.layer import LayerState, Statistics
from optimum_order.order import Order, Stage
from optimum_order.targets import Target, Unit

SCHEDULES = ("stage", "block")

Pass = dict[str, list[Backend]]
"""One walk over the model: what is done to each layer, by name, when the walk is there."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """What one stage did to one layer, for the manifest.

    Args:
        stage: The concrete stage, as canonical text.
        relative_error: Squared error it added over the squared size of what it found.
        measured_on: "outputs" (`tr(dW H dW^T) / tr(W H W^T)`), "inputs" (the same with H's diagonal) or "weights".
    """

    stage: str
    relative_error: float
    measured_on: str


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
        progress: Whether to show a bar on stderr.

    Raises:
        ModelError: If a weight is NaN or infinite, or the model cannot be walked.
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
    with tqdm(total=0, unit="block", disable=not progress) as bar:
        for group in _groups(order, schedule):
            if isinstance(group, Allocator):
                table = _measure(model, units, group, result.states, batches, bar)
                for chosen in group.allocate(table):
                    stages: Pass = {name: [_backend(stage)] for name, stage in chosen.items()}
                    _run_pass(model, units, stages, result, batches, bar, str(group.stage))
            else:
                label = " > ".join(str(backend.stage) for backend in group)
                _run_pass(model, units, dict.fromkeys(targets, group), result, batches, bar, label)
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
) -> None:
    needs = {need for backends in stages.values() for backend in backends for need in backend.needs}
    # Only the units that this pass changes, and what lies before the last of them, need to be run.
    changed = [unit for unit in units if any(target.name in stages for target in unit.targets)]
    bar.total += len(changed)
    bar.set_description(label)

    def treat(unit: Unit, statistics: dict[str, Statistics]) -> None:
        for target in unit.targets:
            for backend in stages.get(target.name, []):
                _apply(backend, target, statistics.get(target.name), result)
        bar.update()

    if needs:
        walk(model, changed, batches, lambda at: treat(at.unit, at.statistics), gram="gram" in needs)
    else:
        for unit in changed:
            treat(unit, {})


def _apply(backend: Backend, target: Target, statistics: Statistics | None, result: Result) -> None:
    before = result.states[target.name]
    after = backend.apply(before, statistics, where=target.name)
    target.write(after.weight)
    result.states[target.name] = after
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
) -> list[Measured]:
    """What each candidate of an allocator would do to each group of layers, with the rest of the model as it is."""
    table: list[Measured] = []
    experts: dict[Stage, list[Measured]] = defaultdict(list)
    backends = {stage: _backend(stage) for stage in allocator.candidates()}
    bar.total += len(units)
    bar.set_description(f"{allocator.stage}: measuring")

    def visit(at: Visit) -> None:
        groups: dict[str, list[Target]] = defaultdict(list)
        for target in at.unit.targets:
            alone = "experts" if target.kind == "expert" else at.leaders.get(target.name, target.name)
            groups[alone if allocator.fused else target.name].append(target)
        before = at.outputs()
        for group in groups.values():
            names = tuple(target.name for target in group)
            weights = sum(states[name].weight.numel() for name in names)
            for stage, backend in backends.items():
                for target in group:
                    after = backend.apply(states[target.name], at.statistics[target.name], where=target.name)
                    target.write(after.weight)
                error = ((at.outputs() - before).square().sum() / before.square().sum()).item()
                fused = experts[stage] if allocator.fused and group[0].kind == "expert" else table
                fused.append(Measured(names, weights, stage, after.bits, error))
            for target in group:
                target.write(states[target.name].weight)
        bar.update()

    needs = {need for backend in backends.values() for need in backend.needs}
    walk(model, units, batches, visit, gram="gram" in needs)
    for stage, rows in experts.items():  # packed formats hold fused experts under one scheme only
        names = tuple(name for row in rows for name in row.layers)
        weights, error = sum(row.weights for row in rows), sum(row.error for row in rows)
        table.append(Measured(names, weights, stage, rows[0].bits, error))
    return table
