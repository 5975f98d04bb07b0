"""The passes of a run: each verb of the engine is one loop over the blocks of the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.backends.base import (
    Allocator,
    Backend,
    Equalizer,
    Measured,
    Method,
    Profile,
    Profiler,
    Recovery,
    Remover,
    Reshaper,
    Rewrite,
    Transform,
    needs_of,
)
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.folding import Fold, column_sources, find_folds, move
from optimum_order.calibration.ranks import Ranks
from optimum_order.calibration.removal import losses_without
from optimum_order.calibration.routed import expert_norms
from optimum_order.calibration.sensitivity import (
    added_losses,
    output_sensitivities,
    single_samples,
)
from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine import recipe as recipes
from optimum_order.engine import reshape as reshaping
from optimum_order.engine import snapshot
from optimum_order.engine.recover import recover
from optimum_order.engine.transform import check_function, transform
from optimum_order.engine.workdir import Passage, WorkDir
from optimum_order.errors import OrderError
from optimum_order.layers.error import added_loss, relative_error
from optimum_order.layers.packed import Packed, States, is_masked
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.layers.statistics import Accumulator, Drift, Gram, Statistics
from optimum_order.models import precision
from optimum_order.models.architecture import Block, Roles
from optimum_order.models.memory import trim
from optimum_order.models.sizes import Sizes, keep_blocks, resized, set_sizes
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage
from optimum_order.progress import Bar

if TYPE_CHECKING:
    from optimum_order.engine.run import Result, Subject

logger = logging.getLogger(__name__)

_LEARNED = "learned"
"""The only part of the pass of a recovery."""
_HELD_BACK = 4
"""Calibration samples, the last ones, on which weights are tried."""


class Passes:
    """Carries methods out on a model: the `Engine` of `backends.base`.

    Args:
        subject: The model and its calibration inputs.
        result: The layers so far; changed in place.
        execution: Where and how to compute.
        work: Where finished blocks are kept.
        bar: Shows the progress.
        shares: Whether the states' weights lie in the model's own memory.
    """

    def __init__(
        self,
        subject: Subject,
        result: Result,
        execution: Execution,
        *,
        work: WorkDir | None,
        bar: Bar,
        shares: bool,
    ):
        self.subject = subject
        self.result = result
        self.execution = execution
        self.work = work
        self.bar = bar
        self.shares = shares and not execution.streams
        self.ranks = execution.ranks
        self.home = torch.device(execution.residency.device or subject.model.device)
        """Where the model and its states are."""
        self.expected = 0
        """Blocks that the bar counts on for the step that begins."""
        self.comparing: Sequence[Method] = ()
        """The methods of the run that compare with the weights before stages compress them."""
        self._originals: dict[str, Tensor] = {}
        """These weights by the name of the layer."""
        self._numbers = itertools.count()
        self._masked = set(result.records)
        """Layers whose weights are those that the run began with but for what was pruned."""

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

    def _first(self, make: Callable[[], Any], device: str = "cpu") -> Any:
        """Have rank 0 do what cannot be shared, and return the result on all ranks.

        Args:
            make: Gives the result, as `snapshot.save` takes it.
            device: Where the tensors go on the other ranks.
        """
        if self.ranks.size == 1:
            return make()
        message = None
        value = None
        if self.ranks.rank == 0:
            value = make()
            message = snapshot.flat(value)
        received = self.ranks.broadcast(message, 0)
        return value if self.ranks.rank == 0 else snapshot.restored(*received, device)

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

    def _walk(
        self,
        units: Sequence[Unit],
        needs: Collection[type[Accumulator]],
        execution: Execution,
        finished: Mapping[str, Callable[[], None]] | None = None,
    ) -> Generator[Visit, None, None]:
        return walk(
            self.subject.model,
            self.subject.units,
            self.subject.batches,
            needs=needs,
            execution=execution,
            wanted=[unit.name for unit in units],
            finished=finished,
        )

    def _settle(
        self,
        target: Target,
        change: tuple[LayerState, LayerState],
        stage: Stage,
        statistics: Statistics | None,
    ) -> None:
        """Put a changed layer into the model and the result, and record how far it moved."""
        before, after = change
        # a figure of four digits for people
        with precision.products(torch.bfloat16, before.weight.device):
            error, measured_on = relative_error(before.weight, after.weight, statistics)
        if self.work is not None and not is_masked(before, after):
            self._masked.discard(target.name)
        target.put(after)
        self.put(target, after)
        record = StageRecord(str(stage), error, measured_on)
        self.result.records[target.name].append(record)

    def put(self, target: Target, state: LayerState) -> None:
        """Make a state, whose weight is in the model already, the layer's own."""
        if self.execution.device is not None:
            state = state.to(self.home)
        elif self.shares:
            state = dataclasses.replace(state, weight=target.shared())
        self.result.states[target.name] = state

    @property
    def _alone(self) -> Execution:
        """The execution of a walk that one process takes by itself."""
        return dataclasses.replace(self.execution, ranks=Ranks())

    def _brought(self, state: LayerState) -> LayerState:
        return state if self.execution.device is None else state.to(self.execution.device)

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

    def reshape(self, reshaper: Reshaper) -> None:
        """Make layers smaller, block by block, and the config with them."""
        model = self.subject.model
        roles = reshaping.roles_for(reshaper, model)
        sizes = reshaper.sizes(roles, model.config)
        stock = resized(model, sizes)
        blocks = {block.name: block for block in roles.blocks}
        passage = self._begin_blocks(list(blocks), str(reshaper.stage))
        done: dict[str, Mapping[str, Any]] = {}
        for block in roles.blocks:
            if passage is not None and passage.has(block.name):
                done[block.name] = passage.load(block.name, str(self.home))["layers"]
                reshaping.recut(model, block, done[block.name])
                self._adopt(block, done[block.name])
        self.ranks.wait()  # rank 0 will now add to the work dir
        units = [
            Unit(name, model.get_submodule(name), self._read_by(reshaper, block))
            for name, block in blocks.items()
        ]
        missing = [unit for unit in units if unit.name not in done]
        for visit in self._reshaping(reshaper, units, missing, blocks):
            block = blocks[visit.unit.name]
            cutting = functools.partial(self._cut, reshaper, block, visit.statistics)
            done[block.name] = self._first(cutting, str(self.home))
            if self.ranks.rank != 0:
                reshaping.recut(model, block, done[block.name])
            self._adopt(block, done[block.name])
            if passage is not None:
                self._keep(passage, block.name, "measured", {"layers": done[block.name]})
            self.bar.update()
        self._finish(reshaper, sizes, stock, blocks=done)

    def _cut(
        self, reshaper: Reshaper, block: Block, statistics: Mapping[str, Statistics]
    ) -> dict[str, dict[str, Any]]:
        """Make the layers of a block smaller; return what `reshaping.cut_block` does."""
        model = self.subject.model
        layers = {
            name: (self._state(name, target), self._again(reshaper, name, statistics))
            for name, target in reshaping.targets_in(model, block).items()
        }
        states = {name: state for name, (state, _) in layers.items()}
        cuts = reshaper.cuts(block, states, statistics)
        return reshaping.cut_block(reshaper, model, block, layers, cuts)

    def _reshaping(
        self,
        reshaper: Reshaper,
        units: Sequence[Unit],
        missing: Sequence[Unit],
        blocks: Mapping[str, Block],
    ) -> Iterator[Visit]:
        """Pause at the blocks that are to be cut."""
        if not reshaper.needs or not missing:
            for unit in missing:
                with self.execution.resident(unit):
                    yield Visit(unit, unit.targets, {}, {})
            return
        steps = walk(
            self.subject.model,
            units,
            self.subject.batches,
            needs=reshaper.needs,
            execution=dataclasses.replace(self.execution, pause="block"),
            wanted=[unit.name for unit in missing],
        )
        with contextlib.ExitStack() as stack:
            visits = stack.enter_context(contextlib.closing(steps))
            if not reshaper.weighs_experts:
                yield from visits
                return
            watched = [blocks[unit.name] for unit in missing]
            gathered = stack.enter_context(
                expert_norms(
                    self.subject.model,
                    watched,
                    self.ranks,
                    counts=bool(self.ranks.shard(self.subject.batches)),
                )
            )
            for visit in visits:
                routers = {b.mixture.router.name for b in [blocks[visit.unit.name]] if b.mixture}
                weighed = {name: gathered(name) for name in routers}
                yield dataclasses.replace(visit, statistics={**visit.statistics, **weighed})

    def _read_by(self, reshaper: Reshaper, block: Block) -> tuple[Target, ...]:
        """Return the layers of a block whose inputs a reshaper asks for; all if it names none."""
        model = self.subject.model
        layers = tuple(layer.target(model) for layer in reshaper.reads(block))
        return layers or tuple(reshaping.targets_in(model, block).values())

    def _state(self, name: str, target: Target) -> LayerState:
        """Return the state of a layer, of one that no stage treats as well."""
        if name in self.result.states:
            return self._brought(self.result.states[name])
        return self._brought(LayerState(target.read()))

    def _again(
        self, reshaper: Reshaper, name: str, statistics: Mapping[str, Statistics]
    ) -> reshaping.Again:
        """Return what quantizes a layer as it was quantized last, if its grid breaks."""

        def quantize(state: LayerState, columns: Tensor | None) -> LayerState:
            quantizer = self._quantizer(name)
            seen = statistics.get(name)
            if seen is not None:
                gram = None if columns is None else seen[Gram][columns][:, columns]
                seen = None if gram is None else Statistics(seen.tokens, {Gram: gram})
            if quantizer is None or (quantizer.needs and seen is None):
                raise OrderError(
                    f"Stage '{reshaper.stage}' breaks the grid of '{name}': its groups share "
                    "scales. Put it before the quantization."
                )
            note = f"{reshaper.stage}: its groups broke; quantized again by {quantizer.stage}"
            after = quantizer.apply(state, seen, where=name)
            return dataclasses.replace(after, notes=(*after.notes, note))

        return quantize

    def _quantizer(self, name: str) -> Backend | None:
        """Return what quantized a layer last in this run."""
        for record in reversed(self.result.records.get(name, ())):
            method = recipes.method(Stage.parse(record.stage))
            if method.kind == "quantize":
                return cast(Backend, method)
        return None

    def _adopt(self, block: Block, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Put what was done to the layers of a block into the result."""
        mine = {t.name: t for unit in self.subject.units for t in unit.targets}
        for name, layer in layers.items():
            if layer["state"] is not None and name in mine:
                self.put(mine[name], layer["state"].state())
                self.result.records[name].append(layer["record"])
                self._masked.discard(name)
        if block.mixture is not None and block.mixture.router.name in layers:
            (cut_,) = layers[block.mixture.router.name]["cuts"]
            self._renumber(block, cut_["indices"].tolist(), mine)

    def _renumber(self, block: Block, remaining: Sequence[int], mine: Mapping[str, Target]) -> None:
        """Give the experts that remain, by number, the names of the first ones."""
        prefixes = {
            target.parameter_name
            for name, target in mine.items()
            if target.expert is not None and name.startswith(f"{block.name}.")
        }
        names = {
            f"{prefix}.{old}": f"{prefix}.{new}"
            for prefix in prefixes
            for new, old in enumerate(remaining)
        }
        others = [name for name in self.result.states if name.rpartition(".")[0] not in prefixes]
        self._rename({name: name for name in others} | names)
        units = reshaping.present(self.subject.units)
        self.subject = dataclasses.replace(self.subject, units=units)
        for unit in units:
            for target in unit.targets:
                if target.parameter_name in prefixes and self.shares:
                    self.put(target, self.result.states[target.name])

    def _rename(self, names: Mapping[str, str]) -> None:
        """Give layers other names; those that have no new name are gone.

        Args:
            names: The new names by the old ones.
        """
        result = self.result
        result.states = States({new: result.states[old] for old, new in names.items()})
        result.records = {new: result.records[old] for old, new in names.items()}
        self._masked = {names[old] for old in self._masked if old in names}

    def shorten(self, remover: Remover) -> None:
        """Remove blocks, each time the one that is missed least."""
        model = self.subject.model
        roles = reshaping.roles_for(remover, model)
        remover.sizes(roles, model.config)  # refuses
        total = len(roles.blocks)
        steps = [str(step) for step in range(remover.count(total) - len(remover.forced))]
        passage = self._begin_blocks(steps, str(remover.stage))
        removed = list(self._first(lambda: self._missed_least(remover, roles, steps, passage)))
        sizes = remover.sizes_without(roles, model.config, removed)
        stock = resized(model, sizes)
        keep_blocks(model, roles, reshaping.left(roles, removed))
        units, names = reshaping.renamed(self.subject.units, roles, removed)
        self.subject = dataclasses.replace(self.subject, units=units)
        self._rename(names)
        self._finish(remover, sizes, stock, removed=removed)

    def _missed_least(
        self, remover: Remover, roles: Roles, steps: Sequence[str], passage: Passage | None
    ) -> list[int]:
        """Choose the blocks to remove, in this process alone."""
        total = len(roles.blocks)
        removed = list(remover.forced)
        samples = list(itertools.islice(single_samples(self.subject.batches), remover.samples))
        for step in steps:
            if passage is not None and passage.has(step):
                removed.append(passage.load(step)["block"])
                continue
            candidates = remover.candidates(total, removed)
            losses = losses_without(self.subject.model, roles, samples, removed, candidates)
            removed.append(min(candidates, key=lambda block: losses[block]))
            if passage is not None:
                self._keep(passage, step, "measured", {"block": removed[-1]})
            self.bar.update()
        return removed

    def _finish(
        self,
        reshaper: Reshaper,
        sizes: Sizes,
        stock: PreTrainedModel,
        *,
        blocks: Mapping[str, Mapping[str, Any]] | None = None,
        removed: Sequence[int] = (),
    ) -> None:
        """Write the new sizes into the config, check the model, and note what was done."""
        model = self.subject.model
        set_sizes(model, sizes)
        reshaping.check_stock(model, stock, str(reshaper.stage))
        mine = {target.name for unit in self.subject.units for target in unit.targets}
        plain = {
            name: {
                layer: parts | ({"state": None} if layer in mine else {})
                for layer, parts in layers.items()
            }
            for name, layers in (blocks or {}).items()
        }
        change = reshaping.Change(str(reshaper.stage), sizes, plain, tuple(removed))
        self.result.changes = (*self.result.changes, change)
        self.result.units = self.subject.units

    def _begin_blocks(
        self, names: Sequence[str], label: str, treated: Sequence[str] | None = None
    ) -> Passage | None:
        """Begin a pass.

        Args:
            names: Of all of its parts.
            label: For the progress.
            treated: The parts that something is done to; all by default.
        """
        number = next(self._numbers)
        treated = names if treated is None else treated
        self.bar.total += len(treated) - self.expected
        self.expected = 0
        self.bar.set_description(label)
        if self.work is None:
            return None
        self.work.wait()  # it may still read weights that this pass changes
        self.ranks.wait()  # all of them read what rank 0 has written
        passage = self.work.passage(number, names)
        self.ranks.wait()
        self.bar.update(sum(passage.has(name) for name in treated))
        return passage

    def transform(self, transform_: Transform) -> None:
        """Rewrite the model's weights, and check that its function is the same."""
        self._begin([], str(transform_.stage))
        for unit in self.subject.units:
            for target in unit.targets:
                target.plain()  # inputs' grids are given up with all others
        sizes = transform(transform_, self.subject.model, self.subject.batches)
        self.ranks.spread(self.subject.model.parameters())
        for unit in self.subject.units:
            for target in unit.targets:
                self.put(target, LayerState(target.read()))
                record = StageRecord(str(transform_.stage), 0.0, "outputs")
                self.result.records[target.name].append(record)
        change = reshaping.Change(str(transform_.stage), sizes, {})
        self.result.changes = (*self.result.changes, change)

    def equalize(self, equalizer: Equalizer) -> None:
        """Move powers of two between layers, and check that the model's function is the same."""
        model = self.subject.model
        sample = next(single_samples(self.subject.batches))
        folds = {
            fold.readers[0].name: fold
            for fold in find_folds(model, self.subject.units, sample)
            if all(equalizer.covers(target.name, target.kind) for target in fold.readers)
        }
        if not folds:
            raise OrderError(
                f"Stage '{equalizer.stage}': no norm and no layer of this model could take what "
                "columns of another are multiplied by. Leave the stage out."
            )
        exponents = self._exponents(equalizer, folds)
        gains = {id(gain) for fold in folds.values() for gain in fold.gains}
        beside = [
            name
            for name, parameter in model.named_parameters()
            if id(parameter) in gains or name in _biases(folds.values())
        ]
        with check_function(equalizer, model, self.subject.batches):
            for name, fold in folds.items():
                move(fold, exponents[name])
        changed = {target.name: target for fold in folds.values() for target in fold.layers}
        for name, target in changed.items():
            state = dataclasses.replace(self.result.states[name], weight=target.read())
            self.put(target, state)
            self.result.records[name].append(StageRecord(str(equalizer.stage), 0.0, "outputs"))
            self._masked.discard(name)
        parameters = {name: model.get_parameter(name).detach().clone() for name in beside}
        change = reshaping.Change(str(equalizer.stage), {}, {}, parameters=parameters)
        self.result.changes = (*self.result.changes, change)

    def _exponents(self, equalizer: Equalizer, folds: Mapping[str, Fold]) -> dict[str, Tensor]:
        """Return the exponents of the columns of each fold, on one walk.

        Args:
            equalizer: What chooses.
            folds: By the name of the first layer that reads the input.
        """
        units = [u for u in self.subject.units if any(t.name in folds for t in u.targets)]
        passage = self._begin(units, str(equalizer.stage))
        exponents: dict[str, Tensor] = {}
        for unit in units:
            if passage is not None and passage.has(unit.name):
                exponents.update(passage.load(unit.name))
        self.ranks.wait()  # rank 0 will now add to the work dir
        missing = [u for u in units if not any(t.name in exponents for t in u.targets)]
        execution = dataclasses.replace(self.execution, pause="block")
        if not missing:
            return exponents
        with contextlib.closing(self._walk(missing, equalizer.needs, execution)) as visits:
            for visit in visits:
                chosen = self._first(functools.partial(self._chosen, equalizer, folds, visit))
                if passage is not None:
                    self._keep(passage, visit.unit.name, "measured", chosen)
                exponents.update(chosen)
                self.bar.update()
        return exponents

    def _chosen(
        self, equalizer: Equalizer, folds: Mapping[str, Fold], visit: Visit
    ) -> dict[str, Tensor]:
        """Return the exponents of the columns of each fold of a block."""
        chosen = {}
        for target in visit.targets:
            if target.name in folds:
                fold = folds[target.name]
                states = [self._brought(self.result.states[t.name]) for t in fold.readers]
                statistics = visit.statistics[target.name]
                rows = fold.rows.to(states[0].weight.device)
                chosen[target.name] = equalizer.exponents(states, statistics, rows).cpu()
        return chosen

    def recover(self, recovery: Recovery) -> None:
        """Let a recovery change layers, and check that masks and grids are the same."""
        passage = self._begin_blocks([_LEARNED], str(recovery.stage), [])
        self.bar.total += recovery.rounds

        def report(text: str, rounds: int = 1) -> None:
            self.bar.set_postfix_str(text)
            self.bar.update(rounds)

        recovery.report = report
        targets = {t.name: t for unit in self.subject.units for t in unit.targets}
        learned = self._first(lambda: self._learned(recovery, passage), str(self.home))
        for name, packed in learned["states"].items():
            change = (self.result.states[name], packed.state())
            self._settle(targets[name], change, recovery.stage, None)
        if parameters := learned["parameters"]:
            reshaping.put_parameters(self.subject.model, parameters)
            settled = reshaping.Change(str(recovery.stage), {}, {}, parameters=parameters)
            self.result.changes = (*self.result.changes, settled)

    def _learned(self, recovery: Recovery, passage: Passage | None) -> dict[str, Any]:
        """Return the layers and other parameters that a recovery changes, in one process."""
        home = str(self.home)
        if passage is not None and passage.has(_LEARNED):
            recovery.report("", recovery.rounds)
            return dict(passage.load(_LEARNED, home))
        if passage is not None:
            recovery.stored = functools.partial(passage.unfinished, _LEARNED, home)
            recovery.store = functools.partial(passage.save_unfinished, _LEARNED)
        changes = recover(recovery, self.subject, self.result.states)
        states = {name: Packed.of(after) for name, _, after in changes}
        learned = {"states": states, "parameters": dict(recovery.parameters)}
        if passage is not None:
            passage.save(_LEARNED, "measured", learned)
        return learned

    def _begin(self, units: Sequence[Unit], label: str) -> Passage | None:
        names = [unit.name for unit in self.subject.units]
        return self._begin_blocks(names, label, [unit.name for unit in units])

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

    def _keep(
        self, passage: Passage, unit: str, kind: str, value: Any, *, keep: bool = False
    ) -> None:
        passage.save(unit, kind, value, keep=keep)
        if self.execution.streams and self.work is not None:
            self.work.wait()  # memory matters more than time


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


def _biases(folds: Iterable[Fold]) -> set[str]:
    """Return the names of biases that are multiplied with the rows of their layer."""
    writers = [fold.writer for fold in folds if fold.writer is not None]
    return {f"{writer.name}.bias" for writer in writers}


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
