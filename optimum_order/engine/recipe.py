"""A recipe: an order whose stages were resolved to methods, once. Nobody else asks the registry."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from optimum_order import backends
from optimum_order.backends.base import (
    COMPRESSING,
    NO_ZERO,
    Engine,
    Method,
    Reshaper,
    Transform,
    needs_of,
)
from optimum_order.errors import DataError, OrderError, unknown
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target, Unit
from optimum_order.order import Order, Stage, Value
from optimum_order.registry import discover

SCHEDULES = ("stage", "block")
KEPT = "keep"
CODED = "coded"
ROUNDING = ("quantize", "allocate")
"""The kinds of stages that give layers a grid."""
EMBEDDINGS = (KEPT, "4", "6", "8", CODED)
"""What may become of embeddings where no stage names them."""


@functools.cache
def available() -> Mapping[str, type[Method]]:
    """Return every method class by name."""
    return discover(backends, Method, "optimum_order.backends")


def _layers(units: Sequence[Unit]) -> list[Target]:
    return [target for unit in units for target in unit.targets]


def method(stage: Stage) -> Method:
    """Return the method that a stage names, with its options read and checked.

    Raises:
        OrderError: If there is no such method, or an option is unknown, missing or not allowed.
    """
    if stage.method not in available():
        raise OrderError(unknown("method", stage.method, available()))
    return available()[stage.method](stage).bind(method)


def canonical(order: Order) -> Order:
    """Return the order with every stage in its one canonical form.

    Raises:
        OrderError: If a stage cannot be run.
    """
    return Recipe.of(order).order


def with_options(order: Order, options: Mapping[str, Value]) -> Order:
    """Return the canonical order with options where stages have them and leave them at a default.

    Args:
        order: The stages.
        options: Options by name; a stage whose method has no such option stays as it is.

    Raises:
        OrderError: If a stage cannot be run.
    """
    stages = []
    for stage in canonical(order):
        names = [field.name for field in dataclasses.fields(available()[stage.method].Options)]
        named = dict(stage.options) if stage.value is None else {names[0]: stage.value}
        added = {key: value for key, value in options.items() if key in names and key not in named}
        stages.append(stage.having(names[0], **added) if added else stage)
    return canonical(Order(stages))


def with_embedding(order: Order, choice: str, embedding: str) -> Order:
    """Return the canonical order with an embedding compressed too.

    Args:
        order: The stages.
        choice: A width in bits, for a stage of its own, or "coded": the last stage that meets a
            rate treats the embedding with all other layers.
        embedding: The name of the layer.

    Raises:
        OrderError: If a stage cannot be run, or none meets a rate.
    """
    stages = list(canonical(order))
    if choice != CODED:
        return canonical(Order([*stages, Stage("rtn", bits=int(choice), targets=embedding)]))
    for place, stage in reversed(list(enumerate(stages))):
        meets = method(stage)
        if any(field.name == "rate" for field in dataclasses.fields(meets.Options)):
            patterns = (*(meets.targets or ("*",)), embedding)
            stages[place] = stage.having(
                dataclasses.fields(meets.Options)[0].name, targets=patterns
            )
            return canonical(Order(stages))
    raise OrderError(
        f"Embeddings are coded by a stage that meets a rate, and '{order}' has none: add one such "
        "as 'ecsq:3', or give their bits (--embeddings 8)."
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """Methods that share one walk over the model, or one method that needs the whole model.

    Args:
        methods: In the order in which each layer gets them.
    """

    methods: tuple[Method, ...]

    @property
    def label(self) -> str:
        """The stages as text."""
        return " > ".join(str(method.stage) for method in self.methods)

    def parts(self, blocks: int) -> int:
        """Return how many parts its progress has: the rounds of its method, or the blocks.

        Args:
            blocks: Of the model.
        """
        return self.methods[0].rounds or blocks

    @property
    def run(self) -> Callable[[Engine], None]:
        """Has an engine carry the methods out: `step.run(engine)`."""
        return functools.partial(self.methods[0].run, joined=self.methods)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run does to a model, in order.

    Args:
        methods: One for each stage.
        schedule: "stage" walks the whole model once per stage, so that a stage sees what earlier
            stages made of every layer; "block" applies all stages to a block, on one capture of
            its inputs, before the run moves on.
    """

    methods: tuple[Method, ...]
    schedule: str = "stage"

    @classmethod
    def of(cls, order: Order, schedule: str = "stage") -> Recipe:
        """Resolve an order.

        Args:
            order: The stages.
            schedule: "stage" or "block".

        Raises:
            OrderError: If a method, an option or the schedule does not exist or is not allowed.
        """
        if schedule not in SCHEDULES:
            raise OrderError(unknown("schedule", schedule, SCHEDULES))
        return cls(tuple(method(stage) for stage in order), schedule)

    @functools.cached_property
    def order(self) -> Order:
        """The canonical order."""
        return Order(method.stage for method in self.methods)

    @property
    def named(self) -> list[str]:
        """The patterns of layers that stages name: an embedding is compressed where one does."""
        return [pattern for method in self.methods for pattern in method.targets]

    @property
    def compares(self) -> bool:
        """True if a method compares the layers' inputs with those before its stage."""
        return any(need.compares for need in needs_of(self.methods))

    @property
    def needs_data(self) -> bool:
        """Whether a method looks at the layers' inputs."""
        return any(method.needs_data for method in self.methods)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the run does one after the other."""
        steps: list[Step] = []
        for method in self.methods:
            if self.schedule == "block" and steps and method.joins and steps[-1].methods[-1].joins:
                steps[-1] = Step((*steps[-1].methods, method))
            else:
                steps.append(Step((method,)))
        return tuple(steps)

    def describe(self) -> list[dict[str, Any]]:
        """Return every stage with all of its options, for the manifest."""
        return [
            {
                "stage": str(method.stage),
                "method": method.name,
                "summary": method.summary,
                "options": method.resolved,
            }
            for method in self.methods
        ]

    def check(
        self,
        units: Sequence[Unit],
        *,
        calibrated: bool,
        after: Sequence[Sequence[Unit]] = (),
    ) -> None:
        """Refuse what would fail later; nothing is run.

        Args:
            units: The model's blocks.
            calibrated: Whether there is calibration data.
            after: The blocks after each stage that changes the model's modules, in turn.

        Raises:
            OrderError: If a layer's shape does not fit an option, a pattern matches no layer, or a
                stage cannot follow the stages before.
            DataError: If a stage needs calibration data and there is none.
        """
        layers = _layers(units)
        smaller = iter(after)
        for place, method in enumerate(self.methods):
            if method.kind == "reshape":
                layers = _layers(next(smaller, units))
                self._check_reshaper(cast(Reshaper, method), self.methods[:place], layers)
            else:
                if method.kind == "transform":
                    layers = _layers(next(smaller, units))
                self._check_layers(method, layers)
            undone = [m for m in self.methods[:place] if m.kind in _undone_by(method)]
            if undone:
                raise OrderError(
                    f"Stage '{method.stage}' rewrites weights and cannot follow "
                    f"'{undone[0].stage}': what was removed or rounded would not stay so. "
                    f"Put it first{_or_force(method)}."
                )
            self._check_zero(place, layers)
            self._check_adapter(place, layers)
            if not calibrated and method.needs_data:
                raise DataError(
                    f"Stage '{method.stage}' needs calibration data and none was given. Pass "
                    "calibration=... (--calibration): a .txt, .csv, .jsonl or .parquet path, a "
                    "Hub dataset, or 'builtin'; or use only magnitude, rtn and bitsandbytes."
                )

    def _check_reshaper(
        self,
        reshaper: Reshaper,
        before: Sequence[Method],
        layers: Sequence[Target],
    ) -> None:
        """Refuse a stage that undoes what stages before it promise.

        Args:
            reshaper: The stage.
            before: What comes before it.
            layers: The layers after it.
        """
        if not reshaper.slices:
            return
        for method in before:
            if getattr(method.options, "pattern", "none") != "none":
                raise OrderError(
                    f"Stage '{reshaper.stage}' takes single inputs away, so that the N:M groups of "
                    f"'{method.stage}' would be none. Put it first."
                )
            if method.kind == "quantize":  # a layer whose groups break is quantized again
                self._check_layers(method, layers)

    def _check_zero(self, place: int, layers: Sequence[Target]) -> None:
        """Refuse to prune a layer on a grid where zero may not be."""
        method = self.methods[place]
        if method.kind != "prune" or getattr(method.options, "off_grid", False):
            return
        # a transform that is forced gives up what stages before it made
        transforms = [at for at, m in enumerate(self.methods[:place]) if _starts_anew(m)]
        before = self.methods[max(transforms, default=0) : place]
        for layer in layers:
            if not method.covers(layer.name, layer.kind):
                continue
            earlier = [m for m in before if m.covers(layer.name, layer.kind)]
            quantizer = next((m for m in reversed(earlier) if m.kind in ROUNDING), None)
            pruned = any(m.kind == "prune" for m in earlier)
            if quantizer is not None and not quantizer.makes_zero and not pruned:
                raise OrderError(
                    f"Stage '{method.stage}' cannot follow '{quantizer.stage}': zero is not on its "
                    f"grid. {NO_ZERO}"
                )

    def _check_adapter(self, place: int, layers: Sequence[Target]) -> None:
        """Refuse what an adapter would no longer fit, and an adapter that has nothing to do.

        Args:
            place: Of the stage.
            layers: The layers at that stage.
        """
        method = self.methods[place]
        before = self.methods[:place]
        adapters = [m for m in before if m.kind == "adapt"]
        if adapters and method.kind != "adapt":
            raise OrderError(
                f"Stage '{method.stage}' cannot follow '{adapters[0].stage}': an adapter is made "
                "for the weights that a layer has. Put it before."
            )
        rounding = [m for m in before if m.kind == "inputs"]
        if method.kind == "adapt" and rounding:
            raise OrderError(
                f"Stage '{method.stage}' cannot follow '{rounding[0].stage}': an adapter reads its "
                "input as it is, and a layer whose inputs are rounded does not. Leave one out."
            )
        if not method.reads_original:
            return
        for layer in layers:
            if method.covers(layer.name, layer.kind):
                earlier = next((m for m in adapters if m.covers(layer.name, layer.kind)), None)
                if earlier is not None:
                    raise OrderError(
                        f"Stage '{method.stage}' cannot follow '{earlier.stage}': '{layer.name}' "
                        "has an adapter already. Leave one out, or give them other targets."
                    )
        compressing = [at for at, m in enumerate(before) if m.kind in COMPRESSING]
        if not compressing:
            raise OrderError(
                f"Stage '{method.stage}' makes up for what stages before it did to weights, and "
                "none pruned or quantized any: put it after such a stage."
            )
        rewriting = [m for m in before[compressing[0] :] if m.kind in ("reshape", "transform")]
        if rewriting:
            raise OrderError(
                f"Stage '{method.stage}' compares layers with what they were before "
                f"'{before[compressing[0]].stage}', and '{rewriting[0].stage}' rewrote them since. "
                f"Put '{rewriting[0].stage}' first."
            )

    def check_start(self, units: Sequence[Unit], states: Mapping[str, LayerState]) -> None:
        """Refuse what layers that a model begins with do not allow.

        Args:
            units: The blocks of the model.
            states: The layers that are compressed already.

        Raises:
            OrderError: If one would be pruned on a grid where zero is not, or a stage would undo
                what was pruned or rounded before.
        """
        targets = [target for unit in units for target in unit.targets]
        for method in self.methods:
            for name, state in states.items():
                if method.kind == "adapt" and state.inputs is not None:
                    raise OrderError(
                        f"Stage '{method.stage}' cannot give layers an adapter, which reads its "
                        f"input as it is: '{name}' rounds its inputs. Leave the stage out."
                    )
                done = {
                    "prune": state.pruned is not None,
                    "quantize": state.grid is not None,
                    "inputs": state.inputs is not None,
                }
                if any(done.get(kind) for kind in _undone_by(method)):
                    raise OrderError(
                        f"Stage '{method.stage}' rewrites weights, and '{name}' was compressed "
                        "before this run: what was removed or rounded would not stay so. Start "
                        f"from the original model{_or_force(method)}."
                    )
        without = [
            target
            for target in targets
            if target.name in states and not states[target.name].has_zero
        ]
        for method in self.methods:
            if method.kind == "prune" and not getattr(method.options, "off_grid", False):
                refused = [t.name for t in without if method.covers(t.name, t.kind)]
                if refused:
                    raise OrderError(
                        f"Stage '{method.stage}' cannot prune {len(refused)} of {len(targets)} "
                        f"layers, such as '{refused[0]}': zero lies between two values of the grid "
                        "that they have. Prune the others, with the stage's option targets, or "
                        "leave the grid with off_grid=true and quantize again."
                    )
            if method.kind == "quantize" or _starts_anew(method):  # other grids follow
                without = [t for t in without if not method.covers(t.name, t.kind)]

    def remarks(self, layers: Sequence[Target]) -> list[str]:
        """Return a sentence for each stage from which nothing is gained after the stages before.

        Such an order can be run: a study may want to know what it costs.

        Args:
            layers: The layers of the model.
        """
        covered = [
            {layer.name for layer in layers if method.covers(layer.name, layer.kind)}
            for method in self.methods
        ]
        remarks = []
        for place, method in enumerate(self.methods):
            # what was pruned meanwhile is a reason to round again
            first = place - 1 if method.kind == "quantize" else 0
            for number in range(max(first, 0), place):
                if covered[place] <= covered[number]:
                    remarks += _nothing_gained(self.methods[number], method)
        return remarks

    @staticmethod
    def _check_layers(method: Method, layers: Sequence[Target]) -> None:
        covered = [layer for layer in layers if method.covers(layer.name, layer.kind)]
        if not covered and not method.targets:
            kinds = ", ".join(sorted({layer.kind for layer in layers}))
            raise OrderError(
                f"Stage '{method.stage}' treats no layer of this model: its layers are of the kind "
                f"{kinds}. Leave the stage out."
            )
        if not covered:
            raise OrderError(
                f"Stage '{method.stage}': its targets match no layer. Layers are called, for "
                f"example, {', '.join(repr(layer.name) for layer in layers[:3])}."
            )
        refused = defaultdict(list)
        for layer in covered:
            out, inputs = layer.view.shape
            if reason := method.check_shape((out, inputs)):
                refused[reason].append(layer.name)
        for reason, names in refused.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OrderError(
                f"Stage '{method.stage}' cannot compress {', '.join(names[:3])}{more}: {reason}."
            )


def _nothing_gained(earlier: Method, later: Method) -> list[str]:
    """Return why a stage changes nothing for the better after another, as one sentence or none.

    Args:
        earlier: The first of two methods, for the same layers.
        later: The second.
    """
    before = earlier.resolved
    after = later.resolved
    options = before.keys() & after.keys()
    if (
        earlier.kind == later.kind == "prune"
        and {"sparsity", "pattern"} <= options
        and after["pattern"] in ("none", before["pattern"])
    ):
        if after["sparsity"] > before["sparsity"]:
            return []
        return [
            f"'{later.stage}' removes nothing after '{earlier.stage}': {before['sparsity']:.0%} of "
            "the weights are gone already, and they count. Give more, or leave the stage out."
        ]
    widths = [before.get("bits"), after.get("bits")]
    if earlier.kind == later.kind == "quantize" and all(isinstance(w, int) for w in widths):
        if after["bits"] < before["bits"]:
            return []
        return [
            f"'{later.stage}' gains nothing after '{earlier.stage}': the weights have values of "
            f"{before['bits']} bits already. Give fewer bits, or leave the stage out."
        ]
    return []


def _undone_by(method: Method) -> tuple[str, ...]:
    """Return the kinds of stages that a method must not follow."""
    if method.kind != "transform" or cast(Transform, method).forced:
        return ()
    return cast(Transform, method).undoes


def _starts_anew(method: Method) -> bool:
    """Return whether a method gives up zeros and grids of earlier stages."""
    return method.kind == "transform" and "prune" in cast(Transform, method).undoes


def _or_force(method: Method) -> str:
    """Return how a message goes on where a method can be forced."""
    forces = any(field.name == "force" for field in dataclasses.fields(method.options))
    return ", or give zeros and grids up with force=true" if forces else ""
