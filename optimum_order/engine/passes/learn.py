"""Passes that learn from the original model."""

from __future__ import annotations

import functools
from typing import Any

from optimum_order.backends.base import Recovery
from optimum_order.engine import reshape as reshaping
from optimum_order.engine.passes.base import BasePasses
from optimum_order.engine.recover import recover
from optimum_order.engine.workdir import Passage
from optimum_order.layers.packed import Packed

_LEARNED = "learned"
"""The only part of the pass of a recovery."""


class Recovering(BasePasses):
    """Recovers what was lost."""

    def recover(self, recovery: Recovery) -> None:
        """Let a recovery change layers, and check that masks and grids are the same."""
        passage = self._begin_blocks([_LEARNED], str(recovery.stage), [], rounds=recovery.rounds)

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
