"""Passes that make the model smaller: channels, heads and experts of blocks, or whole blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.backends.base import Backend, Remover, Reshaper
from optimum_order.calibration.removal import losses_without
from optimum_order.calibration.routed import expert_norms
from optimum_order.calibration.sensitivity import single_samples
from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine import recipe as recipes
from optimum_order.engine import reshape as reshaping
from optimum_order.engine.passes.base import BasePasses
from optimum_order.engine.workdir import Passage
from optimum_order.errors import OrderError
from optimum_order.layers.packed import States
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.models.architecture import Block, Roles
from optimum_order.models.sizes import Sizes, keep_blocks, resized, set_sizes
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage


class Cutting(BasePasses):
    """Cuts layers and removes blocks."""

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
