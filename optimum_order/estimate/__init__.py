"""What a run would take, before it is run: time, memory and bytes on disk, with no weight read.

A forward is traced on the meta device (`trace`), the methods of the order are tried on small
layers of random weights (`laboratory`), the machine's speed is measured (`rates`), and formats are
asked for the shapes of what they would write (`size`). The rest is counting, here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import files
from optimum_order.backends import (
    Allocator,
    Backend,
    Equalizer,
    Measured,
    Method,
    Profiler,
    Recovery,
    Remover,
    Reshaper,
    Transform,
)
from optimum_order.backends.base import Rewrite, needs_of
from optimum_order.calibration.execution import Execution
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.reshape import Outline, roles_for
from optimum_order.errors import FormatError
from optimum_order.estimate import rates
from optimum_order.estimate.laboratory import Laboratory
from optimum_order.estimate.learning import learning_cost
from optimum_order.estimate.rates import Rates
from optimum_order.estimate.size import empty, stored
from optimum_order.estimate.trace import UnitCost, trace
from optimum_order.files import html_table
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Accumulator, Gram
from optimum_order.models.lazy import embedding_parameters
from optimum_order.models.memory import resident
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage

__all__ = ["Estimate", "Step", "empty", "estimate", "guessed"]

LIMIT = 2**30
"""Bytes of waiting activations beyond which low memory puts them on disk."""
_PROBES = 2
"""Batches on which an allocator sees a unit's outputs."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One walk over the model, or one stage that needs none.

    Args:
        stages: What is done in it, as canonical text.
        tokens: Calibration tokens, or positions of images, that it sees.
        seconds: Of all of it.
        memory: Bytes that the process has resident at most.
        low_memory: The same where the model is read a block at a time, and walks pause at blocks.
        bytes: Of the weight files if the model were saved after it.
        format: What they would be saved as.
        exact: Whether these bytes are the same whatever the weights are.
        forward: Floating-point operations of the products in its forwards.
        gram: Floating-point operations of its X^T X.
    """

    stages: str
    tokens: int
    seconds: float
    memory: int
    low_memory: int
    bytes: int
    format: str
    exact: bool
    forward: float
    gram: float

    def carrying(self, unloaded: int) -> Step:
        """Return the same step for a checkpoint with tensors that the model does not load.

        Args:
            unloaded: Bytes of these tensors; their place in the files is not counted.
        """
        if not unloaded:
            return self
        return dataclasses.replace(self, bytes=self.bytes + unloaded, exact=False)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Args:
        order: The canonical order.
        schedule: The schedule.
        pause: Where walks pause: "block" or "group".
        before: Bytes of the model's weight files.
        loading: Seconds before the first step: drawing the data, reading the model, its digest,
            loading the libraries that methods need.
        steps: In turn.
        rates: What this machine was measured to do.
    """

    order: str
    schedule: str
    pause: str
    before: int
    loading: float
    steps: tuple[Step, ...]
    rates: Rates

    @property
    def seconds(self) -> float:
        """Of compressing; measuring the model and saving it come on top."""
        return self.loading + sum(step.seconds for step in self.steps)

    @property
    def memory(self) -> int:
        """Bytes that the process has resident at most."""
        return max(step.memory for step in self.steps)

    @property
    def low_memory(self) -> int:
        """The same where the model is read a block at a time."""
        return max(step.low_memory for step in self.steps)

    @property
    def bytes(self) -> int:
        """Of the weight files of the result."""
        return self.steps[-1].bytes

    def __repr__(self) -> str:
        about = "" if self.steps[-1].exact else "about "
        return (
            f"Estimate({self.order!r}, {about}{files.size(self.bytes)} as {self.steps[-1].format}, "
            f"{self.seconds:.0f} s, {files.size(self.memory)} of memory)"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("order", self.order),
            ("format", self.steps[-1].format),
            ("weights on disk", f"{files.size(self.before)} → {files.size(self.bytes)}"),
            ("seconds", f"{self.seconds:.0f}"),
            ("peak memory", files.size(self.memory)),
            ("peak memory with low_memory", files.size(self.low_memory)),
        ]
        return html_table("Estimate", rows)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        last = self.steps[-1]
        total = {name: getattr(self, name) for name in ("seconds", "memory", "low_memory", "bytes")}
        return {
            "order": self.order,
            "schedule": self.schedule,
            "pause": self.pause,
            "format": last.format,
            "before": self.before,
            "loading": self.loading,
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "total": total
            | {"tokens": max(step.tokens for step in self.steps), "exact": last.exact},
            "rates": dataclasses.asdict(self.rates),
        }


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One pass of the pipeline.

    Args:
        label: What is done, as canonical text.
        stages: What each layer gets in it, in turn.
        tried: What each layer is only tried with, by an allocator.
        needs: What the methods must know about the inputs.
        reads: The layers whose inputs they are; None for all.
        runs: Forwards of a sample through the whole model that it takes on top.
        samples: How many samples it sees at most; None for all.
        learns: The recovery that it is, if it is one.
        after: The model after it, where it is smaller.
    """

    label: str
    stages: Mapping[str, tuple[Stage, ...]]
    tried: tuple[Stage, ...] = ()
    needs: frozenset[type[Accumulator]] = frozenset()
    reads: frozenset[str] | None = None
    runs: float = 0.0
    samples: int | None = None
    learns: Recovery | None = None
    after: Outline | None = None


def estimate(
    model: PreTrainedModel,
    units: Sequence[Unit],
    recipe: Recipe,
    batches: Sequence[Mapping[str, Tensor]],
    execution: Execution,
    *,
    format: str,
    beside: Mapping[str, Any] | None = None,
    after: Sequence[Outline] = (),
) -> Estimate:
    """Return what `engine.run.run` would take with these arguments, and the size of the result.

    Args:
        model: On the meta device, from `empty`.
        units: From `find_units(model)`.
        recipe: What the run does; checked.
        batches: Calibration inputs, of which the shapes count.
        execution: Where the run computes and where its walks pause.
        format: What the result is to be saved as, or "auto".
        beside: What is saved with the layers, as fields of `formats.Contents`.
        after: The model after each stage that makes it smaller.

    Raises:
        FormatError: If the result could not be saved in the format.
    """
    costs = trace(model, units, batches[0]) if batches else {}
    run = _Run(model, units, costs, batches, execution, beside or {})
    comparing = [method for method in recipe.methods if method.reads_original]
    run.originals = sum(
        target.view.nbytes
        for target in run.targets.values()
        if any(method.covers(target.name, target.kind) for method in comparing)
    )
    engine = _Walks(model, units, costs, run.laboratory, after)
    for part in recipe.steps:
        part.run(engine)
    walks = engine.walks
    steps = [run.step(walk, format, last=walk is walks[-1]) for walk in walks]
    speed = run.speed
    loading = run.laboratory.setup + run.weights * (1 / speed.hashing + 3 / speed.traffic)
    return Estimate(
        order=str(recipe.order),
        schedule=recipe.schedule,
        pause=execution.pause,
        before=run.weights,
        loading=loading,
        steps=tuple(steps),
        rates=speed,
    )


class _Run:
    """What has been done to each layer so far, and what the next walk adds.

    Args:
        model, units, batches, execution, beside: As `estimate` has them.
        costs: What each unit takes, from `trace`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        costs: Mapping[str, UnitCost],
        batches: Sequence[Mapping[str, Tensor]],
        execution: Execution,
        beside: Mapping[str, Any],
    ):
        self.beside = beside
        self.model, self.units, self.costs = model, units, costs
        self.resident = resident()  # before the libraries of the methods are loaded
        self.targets = {target.name: target for unit in units for target in unit.targets}
        self.groups = execution.pause == "group"
        rows = max((read.rows for cost in costs.values() for read in cost.inputs), default=1024)
        widths = sorted(target.view.shape[1] for target in self.targets.values())
        device, dtype = execution.device or torch.device("cpu"), execution.matmul_dtype(model)
        self.speed = rates.measure(device, model.dtype, dtype, rows, widths[len(widths) // 2])
        self.laboratory = Laboratory(list(self.targets.values()), device, self.speed)
        self._batch = batches[0] if batches else None
        self._sizes = sizes = [max(len(tensor) for tensor in batch.values()) for batch in batches]
        self.sample = 1 / sizes[0] if sizes else 0.0
        """The part of a batch that one sample is."""
        self.batches = sum(sizes) / sizes[0] if sizes else 0.0
        """How many, the last counted as the part of one that it is."""
        main = next(iter(batches[0].values())) if batches else None
        self.tokens = 0 if main is None else sum(sizes) * (main.shape[1] if main.ndim == 2 else 1)
        self.history: dict[str, tuple[Stage, ...]] = dict.fromkeys(self.targets, ())
        self.weights = sum(parameter.nbytes for parameter in model.parameters())
        self.applied: list[str] = []
        self.originals = 0
        """Bytes of weights that are kept for a stage to compare with."""

    def become(self, outline: Outline) -> None:
        """Go on with a smaller model."""
        self.model, self.units = outline.model, outline.units
        self.targets = {target.name: target for unit in self.units for target in unit.targets}
        self.history = {name: self.history.get(name, ()) for name in self.targets}
        if self._batch is not None:
            self.costs = trace(self.model, self.units, self._batch)

    def step(self, walk: _Walk, format: str, *, last: bool) -> Step:
        """Return the cost of a walk. Only the last has to leave what the format can hold."""
        seconds, forward, gram, waiting, flying = 0.0, 0.0, 0.0, 0, 0
        batches = self.batches
        if walk.samples is not None:
            batches = min(batches, walk.samples * self.sample)
        groups = self.groups and bool(walk.needs) and not walk.tried and not walk.after
        drifts = groups and any(need.compares for need in walk.needs)
        changed = [
            unit
            for unit in self.units
            if walk.tried
            or walk.after
            or walk.samples
            or any(target.name in walk.stages for target in unit.targets)
        ]
        working = 0
        for unit in changed:
            cost = self.costs[unit.name] if walk.needs or walk.tried or walk.runs else UnitCost()
            if walk.reads is not None:
                leaders = {cost.leaders.get(name, name) for name in walk.reads}
                widths = {self.targets[n].view.shape[1] for n in leaders if n in self.targets}
                cost = dataclasses.replace(
                    cost, inputs=[r for r in cost.inputs if r.width in widths]
                )
            runs = walk.runs * self.sample
            if walk.needs or walk.tried:
                runs += batches * (1 + drifts if groups or unit is changed[-1] else 2)
            grams = Gram in walk.needs
            seen = sum(2 * read.rows * read.width**2 for read in cost.inputs) * batches
            seen *= 1 + 2 * drifts  # no symmetry halves the second matrix
            traffic = sum(read.rows * read.width for read in cost.inputs) * 12 * batches
            if walk.tried:
                runs += min(_PROBES, batches) * (
                    1 + len(walk.tried) * len(set(cost.leaders.values()))
                )
            forward += runs * cost.products
            gram += seen if grams else 0.0
            seconds += runs * (
                cost.products / self.speed.forward + cost.traffic / self.speed.traffic
            )
            seconds += (seen if grams else 0.0) / self.speed.gram + traffic / self.speed.traffic
            waiting = max(waiting, int(cost.waiting * batches))
            flight = (cost.waiting + cost.working) * batches * (1 + drifts)
            flying = max(flying, int(flight))
            if walk.after and walk.needs:  # a factor, an inverse that is updated, and a refit
                solved = sum(6 * read.width**3 for read in cost.inputs)
                seconds += solved / self.speed.gram
            squares = sum(4 * read.width**2 for read in cost.inputs) * (grams + drifts)
            held = 0
            for target in unit.targets:
                rows, inputs = target.view.shape
                stages = walk.stages.get(target.name, ())
                tries = [(*self.history[target.name], stage) for stage in walk.tried]
                done = [
                    (*self.history[target.name], *stages[: count + 1])
                    for count in range(len(stages))
                ]
                for history in [*tries, *done]:
                    trial = self.laboratory.trial(history, inputs)
                    seconds += trial.takes(rows, inputs, self.speed)
                    held = max(held, trial.holds(rows, inputs))
                    if cost.leaders.get(target.name) in (target.name, None):
                        seconds += trial.shared * inputs**3 / self.speed.factors
                    seconds += drifts * 6 * rows * inputs**2 / self.speed.gram
                self.history[target.name] += stages
            working = max(working, squares + max(held, cost.working))
        active = (flying if groups else waiting) + working
        if walk.learns is not None:
            extra = learning_cost(
                walk.learns, self.model, self.targets.values(), self.costs, self.speed, self._sizes
            )
            seconds, forward = seconds + extra.seconds, forward + extra.operations
            active += extra.memory
        memory = self.resident + self.weights + self.originals + self._states() + active
        low_memory = self.resident + self._streamed() + min(waiting, LIMIT) + working
        if not walk.tried:
            self.applied.append(walk.label)
        if walk.after is not None or walk.learns is not None or self.originals:
            low_memory = memory  # the model is in memory as a whole
        if walk.after is not None:
            self.become(walk.after)
        layers, applied = self._samples(), " > ".join(self.applied)
        try:
            saved = stored(self.model, layers, format, applied, self.beside)
        except FormatError:
            if last:
                raise
            saved = stored(self.model, layers, "auto", applied, self.beside)
        tokens = self.tokens if walk.needs or walk.tried or walk.learns else 0
        if walk.samples is not None:
            tokens = round(tokens * batches / self.batches)
        return Step(
            walk.label,
            tokens,
            seconds,
            memory,
            low_memory,
            saved.bytes,
            saved.format,
            saved.exact,
            forward,
            gram,
        )

    def _streamed(self) -> int:
        """Bytes of the model that are there at most where it is read a block at a time."""
        inside = {id(parameter) for unit in self.units for parameter in unit.module.parameters()}
        head, first = self.model.get_output_embeddings(), embedding_parameters(self.model)
        last = set() if head is None else {id(parameter) for parameter in head.parameters()} - first
        outside = {
            id(parameter): parameter.nbytes
            for parameter in self.model.parameters()
            if id(parameter) not in inside | last
        }
        units = (
            # the block's weights, and the states of its layers before and after
            sum(parameter.nbytes for parameter in unit.module.parameters())
            + sum(2 * target.view.nbytes + target.view.numel() for target in unit.targets)
            for unit in self.units
        )
        rest = sum(size for key, size in outside.items() if key not in first)
        return rest + max(sum(outside.values()) - rest, *units)

    def _samples(self) -> dict[str, tuple[Target, LayerState]]:
        """Each layer with a small one that was treated like it."""
        return {
            name: (target, self.laboratory.state(self.history[name], target.view.shape[1]))
            for name, target in self.targets.items()
        }

    def _states(self) -> int:
        """Return the bytes of states: masks as bits, and weights outside the model's memory."""
        samples = self._samples().values()
        masks = (
            -(-target.view.numel() // 8) for target, state in samples if state.pruned is not None
        )
        copies = (
            target.view.nbytes
            for target in self.targets.values()
            if not target.view.is_contiguous()
        )
        return sum(masks) + sum(copies)


class _Walks:
    """Notes the walks of a recipe in place of running them: an `Engine` of `backends.base`.

    Args:
        model: The model.
        units: Its blocks.
        costs: What running each block takes.
        laboratory: Tries methods.
        after: The model after each stage that makes it smaller.

    Attributes:
        walks: In turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        costs: Mapping[str, UnitCost],
        laboratory: Laboratory,
        after: Sequence[Outline],
    ):
        self.walks: list[_Walk] = []
        self._model = model
        self._after = iter(after)
        self._units = units
        self._costs = costs
        self._laboratory = laboratory

    def apply(self, backends: Sequence[Backend]) -> None:
        """Note a walk of backends over every layer that they cover."""
        stages = {
            target.name: tuple(b.stage for b in backends if b.covers(target.name, target.kind))
            for unit in self._units
            for target in unit.targets
        }
        label = " > ".join(str(backend.stage) for backend in backends)
        covered = {name: mine for name, mine in stages.items() if mine}
        self.walks.append(_Walk(label, covered, needs=needs_of(backends)))

    def assign(self, backends: Mapping[str, Backend], allocator: Method) -> None:
        """Note a walk of the backends that an allocator chose."""
        stages = {name: (backend.stage,) for name, backend in backends.items()}
        needs = needs_of(backends.values())
        self.walks.append(_Walk(str(allocator.stage), stages, needs=needs))

    def measure(self, allocator: Allocator) -> list[Measured]:
        """Note the walk of an allocator, and guess the table."""
        tried = tuple(allocator.backends)
        needs = needs_of([allocator, *allocator.backends.values()])
        self.walks.append(_Walk(f"{allocator.stage}: measuring", {}, tried, needs))
        return list(guessed(allocator, self._units, self._costs, self._laboratory))

    def profile(self, profiler: Profiler) -> None:
        """Note a walk over some samples, and profile nothing."""
        # two forwards and a backward pass, which takes two for one
        runs = 4.0 * profiler.profiled if profiler.weighs_outputs else 0.0
        label = f"{profiler.stage}: profiling"
        samples = profiler.profiled
        self.walks.append(_Walk(label, {}, needs=profiler.needs, runs=runs, samples=samples))

    def added_losses(self, method: Method, candidates: Sequence[Rewrite]) -> list[float]:
        """Say the same of all."""
        return [0.0] * len(candidates)

    def reshape(self, reshaper: Reshaper) -> None:
        """Note a walk, and go on with the smaller model."""
        roles = roles_for(reshaper, self._model)
        layers = [layer.name for block in roles.blocks for layer in reshaper.reads(block)]
        self._become(_Walk(str(reshaper.stage), {}, needs=reshaper.needs, reads=frozenset(layers)))

    def shorten(self, remover: Remover) -> None:
        """Note the forwards without each block, and go on with the smaller model."""
        blocks = len(roles_for(remover, self._model).blocks)
        measured = remover.count(blocks) - len(remover.forced)
        # of two forwards one goes through what comes after the block that is left out alone
        runs = remover.samples * measured * (2 + (blocks - 2) / 2)
        self._become(_Walk(str(remover.stage), {}, runs=runs))

    def _become(self, walk: _Walk) -> None:
        outline = next(self._after)
        self.walks.append(dataclasses.replace(walk, after=outline))
        self._model, self._units = outline.model, outline.units

    def transform(self, transform: Transform) -> None:
        """Note the forwards before and after, and go on with the model that follows."""
        self._become(_Walk(str(transform.stage), {}, runs=2))

    def equalize(self, equalizer: Equalizer) -> None:
        """Note the walk that looks at the inputs, and go on with the same model."""
        self._become(_Walk(str(equalizer.stage), {}, needs=equalizer.needs))

    def recover(self, recovery: Recovery) -> None:
        """Note the steps that learn, and the adapters that layers have afterwards."""
        stages = {
            target.name: (recovery.stage,)
            for unit in self._units
            for target in unit.targets
            if recovery.kind == "adapt" and recovery.covers(target.name, target.kind)
        }
        self.walks.append(_Walk(str(recovery.stage), stages, learns=recovery))


def guessed(
    allocator: Allocator,
    units: Sequence[Unit],
    costs: Mapping[str, UnitCost],
    laboratory: Laboratory,
) -> Iterator[Measured]:
    """Guess an allocator's table: an error of 4^-bits for every weight.

    Args:
        allocator: The allocator.
        units: The model's blocks.
        costs: What running each block takes.
        laboratory: Tries methods.
    """
    groups: dict[str, list[Target]] = defaultdict(list)
    for unit in units:
        for target in unit.targets:
            alone = (
                "experts"
                if target.kind == "expert"
                else costs[unit.name].leaders.get(target.name, target.name)
            )
            groups[alone if allocator.fused else target.name].append(target)
    for group in groups.values():
        names, weights = (
            tuple(target.name for target in group),
            sum(target.view.numel() for target in group),
        )
        for stage in allocator.candidates():
            state = laboratory.state((stage,), group[0].view.shape[1])
            error = weights * 4.0**-state.stored_bits
            stored = sum(
                laboratory.state((stage,), target.view.shape[1]).stored_bits * target.view.numel()
                for target in group
            )
            yield Measured(names, weights, stage, state.bits, stored / weights, error)
