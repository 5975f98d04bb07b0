"""One run: a model and a recipe in, the states of its layers out. No search, no Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.calibration.execution import Execution
from optimum_order.engine.passes import Passes
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.reshape import Change
from optimum_order.engine.streamed import refuse_infinite
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import ModelError, OrderError, OutputError
from optimum_order.layers.packed import States
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.models.units import Unit
from optimum_order.order import Order, Stage
from optimum_order.progress import Bar


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model of a run and what it is calibrated on.

    Args:
        model: In evaluation mode; a run changes it in place.
        units: What to compress, from `find_units(model)`.
        batches: Calibration inputs; may be empty if no method needs statistics.
        original: Gives the model as it was before any run, for methods that learn from it.
        before: The layers before a stage pruned or quantized them, by name, if the run goes on from
            such stages and a method compares with them.
    """

    model: PreTrainedModel
    units: Sequence[Unit]
    batches: Sequence[Mapping[str, Tensor]] = ()
    original: Callable[[], PreTrainedModel] | None = None
    before: Mapping[str, LayerState] | None = None


@dataclasses.dataclass
class Result:
    """The layers after a run, and how they came to be.

    Args:
        states: Each layer by name.
        records: What each stage did to each layer.
        stages: The stages that were applied.
        changes: What stages did to the modules of the model, first to last.
        units: The blocks of the model after the run.
    """

    states: MutableMapping[str, LayerState]
    records: dict[str, list[StageRecord]]
    stages: tuple[Stage, ...] = ()
    changes: tuple[Change, ...] = ()
    units: Sequence[Unit] = ()

    @property
    def order(self) -> Order:
        """The stages that were applied."""
        return Order(self.stages)

    @classmethod
    def of(cls, units: Sequence[Unit], states: Mapping[str, LayerState] | None = None) -> Result:
        """Return the layers as they are in the model, before any stage.

        Args:
            units: The blocks of the model.
            states: The layers that are compressed already, if any.

        Raises:
            ModelError: If one of these is no layer of the blocks.
        """
        targets = {target.name: target for unit in units for target in unit.targets}
        before = states or {}
        if others := set(before) - set(targets):
            raise ModelError(
                f"Layer '{min(others)}' is compressed already, and targets or ignore leave it "
                "out. Leave these out, and say of each stage what it is for, as in "
                "gptq(bits=4, targets=*.mlp.*)."
            )
        start = {
            name: before.get(name) or LayerState(target.read()) for name, target in targets.items()
        }
        return cls(start, {name: [] for name in start}, units=units)

    def write(self, units: Sequence[Unit]) -> None:
        """Put the layers into the model."""
        for unit in units:
            for target in unit.targets:
                target.put(self.states[target.name])


def run(
    subject: Subject,
    recipe: Recipe,
    execution: Execution,
    *,
    start: Result | None = None,
    work: WorkDir | None = None,
) -> Result:
    """Carry out every step in turn; the model's weights end as the states' weights.

    Args:
        subject: The model and its calibration inputs.
        recipe: What to do; checked.
        execution: Where and how to compute. A residency that streams needs `work`, takes no
            `start` and leaves the model empty.
        start: What earlier stages left, if this run continues them; the model's layers are set to
            it. With the schedule "stage" the end is bit for bit that of all stages in one run.
            Without it, the weights of the states lie in the model's own memory where they can.
        work: Where to keep what is finished, block by block. What is there already is not done
            again; the end is bit for bit that of a run that was never cut off.

    Raises:
        ModelError: If a weight is NaN or infinite, or the model cannot be walked.
        OutputError: If the work dir cannot be written, is damaged, or cannot hold a stage.
    """
    refuse(recipe, streams=execution.streams, processes=execution.ranks.size)
    result = _begin(subject, recipe, execution, start)
    blocks = len(subject.units)
    total = sum(step.parts(blocks) for step in recipe.steps)
    unit = "step" if any(method.rounds for method in recipe.methods) else "block"
    with Bar(total=total, unit=unit, disable=not execution.progress) as bar:
        engine = Passes(subject, result, execution, work=work, bar=bar, shares=start is None)
        engine.comparing = [method for method in recipe.methods if method.reads_original]
        for step in recipe.steps:
            engine.expected = step.parts(blocks)
            step.run(engine)
    if work is not None:
        work.wait()
    return result


def refuse(recipe: Recipe, *, streams: bool, processes: int = 1) -> None:
    """Refuse stages that a run cannot carry out in the way that is asked for.

    Args:
        recipe: What to do.
        streams: Whether the model is read block by block.
        processes: How many share the work.

    Raises:
        OrderError: If a method's statistics cannot be summed over processes.
        OutputError: If there is any other such stage.
    """
    for method in recipe.methods:
        unmerged = [need.__name__ for need in method.needs | method.uses if not need.merges]
        if processes > 1 and unmerged:
            raise OrderError(
                f"Stage '{method.stage}' cannot run in {processes} processes: the statistic "
                f"{unmerged[0]} does not say in 'merges' how its sums are added up. Run it in one."
            )
        if method.reads_original and streams:
            raise OutputError(
                f"Stage '{method.stage}' compares with the original weights, and a model that is "
                "read block by block does not hold them: leave out low_memory (--low-memory)."
            )
        if streams and not method.streams:
            raise OutputError(
                f"Stage '{method.stage}' needs a model that is in memory as a whole: leave out "
                "low_memory (--low-memory)."
            )
        if method.kind == "allocate" and method.weighs_outputs and streams:
            raise OutputError(
                f"Stage '{method.stage}' takes gradients, for which a model is in memory as a "
                "whole: leave out low_memory (--low-memory), or error=loss."
            )
        allocation = getattr(method.options, "allocation", "uniform")
        if allocation != "uniform" and streams:
            raise OutputError(
                f"Stage '{method.stage}' looks at all layers before it treats the first, and a "
                "model that is read block by block is read once for each stage: leave out "
                f"low_memory (--low-memory), or allocation={allocation}."
            )


def _begin(subject: Subject, recipe: Recipe, execution: Execution, start: Result | None) -> Result:
    stages = recipe.order.stages
    targets = [target for unit in subject.units for target in unit.targets]
    states = execution.residency.states
    if states is not None:
        return Result(states, {target.name: [] for target in targets}, stages, units=subject.units)
    refuse_infinite(subject.model.named_parameters())
    if start is None:
        for target in targets:
            target.plain()  # as the states say
        shared = {target.name: LayerState(target.shared()) for target in targets}
        records: dict[str, list[StageRecord]] = {target.name: [] for target in targets}
        return Result(States(shared), records, stages, units=subject.units)
    start.write(subject.units)
    records = {name: list(records) for name, records in start.records.items()}
    return Result(
        States(start.states), records, (*start.stages, *stages), start.changes, subject.units
    )
