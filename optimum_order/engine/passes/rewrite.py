"""Passes that rewrite weights and leave the function of the model as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping

from torch import Tensor

from optimum_order.backends.base import Equalizer, Transform
from optimum_order.calibration.folding import Fold, find_folds, move
from optimum_order.calibration.sensitivity import single_samples
from optimum_order.calibration.walk import Visit
from optimum_order.engine import reshape as reshaping
from optimum_order.engine.passes.base import BasePasses
from optimum_order.engine.transform import check_function, transform
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState, StageRecord


class Rewriting(BasePasses):
    """Rotates and equalizes."""

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


def _biases(folds: Iterable[Fold]) -> set[str]:
    """Return the names of biases that are multiplied with the rows of their layer."""
    writers = [fold.writer for fold in folds if fold.writer is not None]
    return {f"{writer.name}.bias" for writer in writers}
