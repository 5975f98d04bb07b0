"""What all passes of a run share: the model, the layers so far, and parts that are kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_order.backends.base import Method
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.ranks import Ranks
from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine import snapshot
from optimum_order.engine.workdir import Passage, WorkDir
from optimum_order.layers.error import relative_error
from optimum_order.layers.packed import is_masked
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.models import precision
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage
from optimum_order.progress import Bar

if TYPE_CHECKING:
    from optimum_order.engine.run import Result, Subject


class BasePasses:
    """The model of a run under way; a subclass adds the verbs of one kind of methods.

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

    def _begin_blocks(
        self,
        names: Sequence[str],
        label: str,
        treated: Sequence[str] | None = None,
        rounds: int = 0,
    ) -> Passage | None:
        """Begin a pass.

        Args:
            names: Of all of its parts.
            label: For the progress.
            treated: The parts that something is done to; all by default.
            rounds: Rounds that a method goes through on top.
        """
        number = next(self._numbers)
        treated = names if treated is None else treated
        self.bar.total += len(treated) + rounds - self.expected
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

    def _begin(self, units: Sequence[Unit], label: str) -> Passage | None:
        names = [unit.name for unit in self.subject.units]
        return self._begin_blocks(names, label, [unit.name for unit in units])

    def _keep(
        self, passage: Passage, unit: str, kind: str, value: Any, *, keep: bool = False
    ) -> None:
        passage.save(unit, kind, value, keep=keep)
        if self.execution.streams and self.work is not None:
            self.work.wait()  # memory matters more than time
