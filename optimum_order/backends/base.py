"""The kinds of methods, each a small base class with a name, options and one equation to write.

A step of a run calls `Method.run`, and the kind calls back the one verb of the engine that carries
it out, so that nobody asks a method for its class.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from optimum_order.errors import InvariantError, OrderError, unknown
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.order import Stage, matches

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel

    from optimum_order.models.architecture import Block, Layer, Roles

KINDS = ("prune", "quantize", "inputs", "allocate", "reshape", "transform", "recover", "adapt")
"""Values of `Method.kind`."""
COMPRESSING = ("prune", "quantize", "allocate")
"""Kinds of methods after which a layer is no longer what it was."""
IDLE = "no calibration token reached this layer"
"""In the notes of a layer that was compressed without data, by a method that uses data."""
NO_ZERO = "Prune first, quantize with zero=true, or prune with off_grid=true."
"""What helps where a layer is pruned on a grid without zero."""


def option(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], bool] = lambda value: True,
    allowed: str = "",
) -> Any:
    """Declare a field of a method's `Options`.

    Args:
        default: Value for a stage that leaves it out; `dataclasses.MISSING` makes it required.
        help: Its effect, in a few words.
        check: Returns whether a value of the right type is allowed.
        allowed: The allowed values, for the error message: "in [0, 1)".
    """
    metadata = {"help": help, "check": check, "allowed": allowed}
    return dataclasses.field(default=default, metadata=metadata)


def _matches(value: Any, annotation: Any) -> bool:
    """Return whether an option's value is of its type."""
    if isinstance(annotation, types.UnionType):
        return any(_matches(value, member) for member in typing.get_args(annotation))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(annotation) or annotation)


def describe(annotation: Any) -> str:
    """Return the name of an option's type in a message: "a number or a word"."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(describe(member) for member in typing.get_args(annotation))
    names = {
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "a word",
        tuple: "a list",
    }
    return names.get(typing.get_origin(annotation) or annotation, str(annotation))


_TARGETS = option(
    None,
    "patterns of the layers that the stage treats, by default all but embeddings",
    check=lambda value: (
        isinstance(value, str)
        or (len(value) > 0 and all(isinstance(pattern, str) for pattern in value))
    ),
    allowed="a pattern of layer names such as *.q_proj, or a list of patterns",
)


class Method(ABC):
    """A method that a stage can name.

    A subclass is one file. It declares a frozen dataclass `Options`, each field made with
    `option`, whose first field is the main knob. Reading a stage into options, with every error
    a user can make, happens here. The option `targets` is added to every method.

    Args:
        stage: The stage as the user wrote it.

    Raises:
        OrderError: If an option is unknown, missing or not allowed.
    """

    name: ClassVar[str]
    """Its name in a stage."""
    summary: ClassVar[str]
    """Its effect, in one line for `optimum-order methods`."""
    kind: ClassVar[str]
    """One of `kinds`."""
    kinds: ClassVar[tuple[str, ...]] = KINDS
    """Values of `kind` that a class of this base may have."""
    Options: ClassVar[type[Any]]
    """Frozen dataclass of options; the first is the main knob."""
    needs: frozenset[type[Accumulator]] = frozenset()
    """The statistics of the layers' inputs that the method reads: accumulator classes."""
    measures: ClassVar[bool] = False
    """True if the method runs the model on calibration samples, whatever it `needs`."""
    joins: ClassVar[bool] = False
    """True if neighbors of this class in an order may share one walk (schedule "block")."""
    streams: ClassVar[bool] = True
    """False if the method needs the whole model in memory."""
    reads_original: ClassVar[bool] = False
    """True of a backend that is to be given the weight before any stage pruned or quantized it, in
    `LayerState.original`."""

    @property
    def rounds(self) -> int:
        """Rounds that the method goes through; 0 where it goes from block to block."""
        return 0

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        where = f"The method class {cls.__module__}.{cls.__qualname__}"
        named = "name" in vars(cls)
        kind = getattr(cls, "kind", None)
        if (named or kind is not None) and kind not in cls.kinds:
            raise TypeError(f"{where}: {unknown('kind', str(kind), cls.kinds)}")
        if not isinstance(cls.needs, frozenset) or not all(map(_is_accumulator, cls.needs)):
            raise TypeError(
                f"{where}: 'needs' must be a frozenset of accumulator classes such as "
                f"optimum_order.layers.statistics.Gram, got {cls.needs!r}."
            )
        if "Options" in vars(cls):
            cls.Options = _with_targets(cls.Options, where)
        elif named and not hasattr(cls, "Options"):
            raise TypeError(f"{where} must declare 'Options', a frozen dataclass.")

    def __init__(self, stage: Stage):
        self.options = self.validate(stage, self._read(stage))

    @classmethod
    def _read(cls, stage: Stage) -> Any:
        fields = {field.name: field for field in dataclasses.fields(cls.Options)}
        hints = typing.get_type_hints(cls.Options)
        values = dict(stage.options)
        if stage.value is not None:
            values[next(iter(fields))] = stage.value
        for key, value in values.items():
            if key not in fields:
                raise OrderError(f"Stage '{stage}': {unknown('option', key, fields)}")
            meta = fields[key].metadata
            if not _matches(value, hints[key]) or not meta["check"](value):
                wanted = meta["allowed"] or describe(hints[key])
                raise OrderError(
                    f"Stage '{stage}': '{key}' ({meta['help']}) must be {wanted}, got {value!r}."
                )
            if float in (hints[key], *typing.get_args(hints[key])) and isinstance(value, int):
                values[key] = float(value)
        patterns = values.get("targets")
        if isinstance(patterns, tuple) and len(patterns) == 1:
            values["targets"] = patterns[0]
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in values:
                meta = field.metadata
                raise OrderError(
                    f"Stage '{stage}' must give '{key}' ({meta['help']}): {meta['allowed']}."
                )
        return cls.Options(**values)

    @classmethod
    def validate(cls, stage: Stage, options: Any) -> Any:
        """Return the options in their one normal form.

        Args:
            stage: The stage as the user wrote it, for messages.
            options: An instance of `Options`, each value allowed by itself.

        Raises:
            OrderError: If the values do not fit together.
        """
        return options

    @property
    def stage(self) -> Stage:
        """The canonical stage: the main knob alone, or every option that is not at its default."""
        fields = dataclasses.fields(self.Options)
        values = {field.name: getattr(self.options, field.name) for field in fields}
        changed = {
            field.name: values[field.name]
            for field in fields
            if values[field.name] != field.default
        }
        knob = fields[0].name
        if set(changed) <= {knob}:
            return Stage(self.name, values[knob])
        return Stage(self.name, **changed)

    @property
    def fewest_samples(self) -> int:
        """Calibration samples without which the method does not run, where it needs data."""
        return 1

    def on_a_part(self, part: float) -> Stage:
        """Return the stage that stands for this one where orders are ranked on less data.

        Args:
            part: Of the calibration samples, in (0, 1].
        """
        return self.stage

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option with its value, for the manifest; `targets` only where the user gave it."""
        values = dataclasses.asdict(self.options)
        if values["targets"] is None:
            del values["targets"]
        return values

    @property
    def uses(self) -> frozenset[type[Accumulator]]:
        """Statistics that the method reads where a walk can gather them, beside its `needs`."""
        return frozenset()

    @property
    def weighs_outputs(self) -> bool:
        """True to be told how the loss depends on outputs, for which the run takes gradients."""
        return False

    @property
    def makes_zero(self) -> bool:
        """False if a layer that was not pruned before gets a grid where zero may not be."""
        return True

    @property
    def needs_data(self) -> bool:
        """True if the method looks at the layers' inputs, or runs the model."""
        return bool(self.needs) or self.measures

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the layers that the method treats; empty for all but embeddings."""
        patterns = self.options.targets
        if patterns is None:
            return ()
        return (patterns,) if isinstance(patterns, str) else patterns

    def covers(self, layer: str, kind: str = "linear") -> bool:
        """Return whether the method treats a layer.

        Args:
            layer: Its full name.
            kind: As `Target` has it; an embedding is treated only where `targets` names it.
        """
        patterns = self.targets
        if not patterns:
            return kind != "embedding"
        return any(matches(layer, pattern) for pattern in patterns)

    def bind(self, resolve: Callable[[Stage], Method]) -> Self:
        """Resolve the stages that this method names in turn; return the method.

        Args:
            resolve: Gives the method of a stage.
        """
        return self

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        """Return why a layer of this (out, in) shape cannot be treated, or None if it can."""
        return None

    @abstractmethod
    def run(self, engine: Engine, joined: Sequence[Any]) -> None:
        """Call the verb of the engine that carries this method out.

        Args:
            engine: The run.
            joined: This method and those that share its walk, in order.
        """


def _is_accumulator(need: object) -> bool:
    return inspect.isclass(need) and issubclass(need, Accumulator)


def _with_targets(options: type[Any], where: str) -> type[Any]:
    """Check a class of options, and return it with the option that every method has.

    Args:
        options: As an author declared it.
        where: Names the method's class in the message.

    Raises:
        TypeError: If it is no frozen dataclass whose fields were made with `option`.
    """
    parameters = getattr(options, "__dataclass_params__", None)
    if not inspect.isclass(options) or parameters is None or not parameters.frozen:
        raise TypeError(f"{where}: 'Options' must be a frozen dataclass, got {options!r}.")
    fields = dataclasses.fields(options)  # type: ignore[arg-type]  # checked above
    for field in fields:
        if not {"help", "check", "allowed"} <= set(field.metadata):
            raise TypeError(f"{where}: the option '{field.name}' must be made with option().")
    if any(field.name == "targets" for field in fields):
        return options
    return dataclasses.make_dataclass(
        options.__name__,
        [("targets", tuple[str, ...] | str | None, _TARGETS)],
        bases=(options,),
        frozen=True,
        namespace={"__module__": options.__module__, "__doc__": options.__doc__},
    )


class Backend(Method):
    """A method for one layer: the tensors of one layer in, the tensors of one layer out.

    A subclass says which statistics it `needs` and writes its equation in `compress`. Everything
    around the equation is checked here, before and after. A backend sees tensors only: never a
    module, a model, a path or a global. `kind` is "prune", "quantize", or, of a method that leaves
    weights alone, "inputs" if it gives inputs a grid and "adapt" if it gives layers an adapter.
    """

    kinds = ("prune", "quantize", "inputs", "adapt")
    joins = True

    @abstractmethod
    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        """Return the layer after the method.

        Args:
            state: The layer before; its tensors must not be changed in place.
            statistics: The statistics that the backend `needs`; empty if it needs none.
        """

    @torch.no_grad()
    def apply(
        self, state: LayerState, statistics: Statistics | None = None, *, where: str = "layer"
    ) -> LayerState:
        """Compress one layer and check every promise of `LayerState` on the result.

        A layer that no calibration token reached, such as an idle expert, is treated as if its
        inputs were white noise (H = I): Wanda then ranks by magnitude and GPTQ rounds to nearest.
        The state's notes say so.

        Args:
            state: The layer before.
            statistics: Its inputs; may be None if the backend needs nothing.
            where: Names the layer in messages.

        Raises:
            InvariantError: If a statistic that the backend needs is absent, or a promise is broken.
            OrderError: If the backend prunes, and zero is not on the layer's grid.
        """
        where = f"{where}, stage '{self.stage}'"
        off_grid = getattr(self.options, "off_grid", False)
        if self.kind == "prune" and not state.has_zero and not off_grid:
            raise OrderError(f"{where}: zero is not on the layer's grid. {NO_ZERO}")
        if statistics is None:
            statistics = Statistics(0, {})
        for need in self.needs:
            if need not in statistics:
                raise InvariantError(
                    f"{where}: the backend needs {need.__name__} and was not given it."
                )
        if self.reads_original and state.original is None:
            raise InvariantError(f"{where}: the backend was not given the original weight.")
        if self.needs and statistics.tokens == 0:
            statistics = statistics.isotropic()
            note = f"{self.stage}: {IDLE}; its inputs were taken as white noise"
            state = dataclasses.replace(state, notes=(*state.notes, note))
        result = self.compress(state, statistics)
        before, after = state.weight, result.weight
        if after.shape != before.shape or after.dtype != before.dtype:
            raise InvariantError(f"{where}: the backend changed the weight's shape or dtype.")
        if state.pruned is not None and (
            result.pruned is None or (state.pruned & ~result.pruned).any()
        ):
            raise InvariantError(f"{where}: the backend brought pruned weights back.")
        if state.grid is not None and result.grid is None and not off_grid:
            raise InvariantError(
                f"{where}: the backend dropped the quantization grid, and no 'off_grid' asked for "
                "that."
            )
        if self.kind == "adapt" and not torch.equal(before, after):
            raise InvariantError(f"{where}: the backend changed the weight beside its adapter.")
        result.check(where)
        return dataclasses.replace(result, original=None)

    def tried(self, state: LayerState, statistics: Statistics | None = None) -> LayerState:
        """Return a small layer of made-up values after the method, for an estimate.

        Args:
            state: The layer before.
            statistics: Its inputs, made up too.
        """
        return self.apply(state, statistics)

    def run(self, engine: Engine, joined: Sequence[Backend]) -> None:
        engine.apply(joined)


Profile = Mapping[str, Tensor]
"""What a method wants to remember of a layer that it has seen, by names of its own."""
Rewrite = Callable[[str, Tensor], Tensor]
"""A weight (out, in) to try in place of a layer's own, from the layer's name and weight."""


class Profiler(Backend):
    """A backend that looks at all layers before it treats the first.

    It divides among the layers what they have in common, such as a budget of bits. A subclass
    calls `Engine.profile` in `run`.
    """

    profiled: ClassVar[int] = 8
    """Calibration samples of which the statistics and gradients are taken for profiles."""

    @property
    def weighs_outputs(self) -> bool:
        """True to be given `sensitivity` and `sources`, for which the run takes gradients."""
        return True

    @abstractmethod
    def profile(
        self,
        state: LayerState,
        statistics: Statistics,
        *,
        sensitivity: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> Profile:
        """Return what is to be remembered of a layer.

        Args:
            state: The layer before.
            statistics: Of its inputs on some calibration samples.
            sensitivity: (samples, out) mean squared gradients of the loss by its outputs; None
                where the layer is no module of its own or the run takes no gradients.
            sources: (in,) int64, for each column the number of the norm's gain or of the row of
                another layer that makes the input and could take a power of two of the column.
                Columns with one number, of all layers together, have one source. None where
                nothing can.
        """


class Allocator(Method):
    """A method that decides across layers, such as mixed precision.

    The engine measures every candidate on every group of layers. `allocate` turns that table into
    one concrete stage per layer. The equation stays in the backends it allocates.
    """

    kind = "allocate"
    kinds = ("allocate",)
    measures = True
    backends: Mapping[Stage, Backend]
    """The candidates, resolved: set by `bind`."""

    @property
    @abstractmethod
    def fused(self) -> bool:
        """True if layers that read the same input are one group and get the same stage."""

    @abstractmethod
    def candidates(self) -> list[Stage]:
        """Return the stages a layer may be given."""

    @abstractmethod
    def allocate(self, table: list[Measured]) -> list[dict[str, Stage]]:
        """Choose.

        Args:
            table: One row per group and candidate.

        Returns:
            Walks over the model, each naming the stage of the layers it treats; every layer in
            exactly one.

        Raises:
            OrderError: If the budget cannot be met.
        """

    def bind(self, resolve: Callable[[Stage], Method]) -> Self:
        backends: dict[Stage, Backend] = {}
        for stage in self.candidates():
            backend = resolve(stage)
            if not isinstance(backend, Backend):
                raise OrderError(
                    f"Stage '{self.stage}' cannot allocate '{stage}': a candidate must prune or "
                    "quantize one layer by itself."
                )
            backends[stage] = backend
        self.backends = backends
        return self

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        reasons = (backend.check_shape(shape) for backend in self.backends.values())
        return next(filter(None, reasons), None)

    @property
    def makes_zero(self) -> bool:
        return all(backend.makes_zero for backend in self.backends.values())

    def run(self, engine: Engine, joined: Sequence[Allocator]) -> None:
        for stages in self.allocate(engine.measure(self)):
            engine.assign({name: self.backends[stage] for name, stage in stages.items()}, self)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The effect of one candidate on one group of layers.

    Args:
        layers: Their names.
        weights: Number of weights that they have together.
        stage: The candidate.
        bits: Width of one weight after it.
        stored_bits: The same with its part of the scales.
        error: Relative squared error of the output of the block they are in, all else unchanged;
            or what is added to the loss, in units that all groups share.
    """

    layers: tuple[str, ...]
    weights: int
    stage: Stage
    bits: int
    stored_bits: float
    error: float


@dataclasses.dataclass(frozen=True)
class Cut:
    """The rows or columns of one layer that remain.

    Args:
        layer: Its name. With the rows of a router the experts are cut.
        axis: 0 for outputs (rows of W), 1 for inputs (columns of W).
        indices: (k,) int64, the rows or columns that remain, in their new order.
        weight: What remains, refitted: (out, in) after the cut; None leaves the values alone. Of
            several cuts of a layer the last may have one.
        notes: What a reader of the result should know of the layer.
    """

    layer: str
    axis: int
    indices: Tensor
    weight: Tensor | None = None
    notes: tuple[str, ...] = ()


class Reshaper(Method):
    """A method that makes layers smaller: structured pruning.

    A barrier in a run: new, smaller blocks follow. `sizes` says what the config will be, before
    anything is computed, so that the result is a stock model.
    """

    kind = "reshape"
    streams = False
    kinds = ("reshape",)
    slices: ClassVar[bool] = True
    """True if layers lose rows or columns; False if layers go as a whole."""
    weighs_experts: ClassVar[bool] = False
    """True to be given `ExpertNorms` as the statistics of each router that the method reads."""

    @abstractmethod
    def sizes(self, roles: Roles, config: Any) -> dict[str, Any]:
        """Return the new values of config fields, by field.

        Args:
            roles: Of the layers of the model.
            config: Of the model; not to be changed.

        Raises:
            OrderError: If no config can hold what was asked for.
        """

    def reads(self, block: Block) -> tuple[Layer, ...]:
        """Return the layers of a block whose inputs the method needs the statistics of.

        Args:
            block: The roles of its layers.
        """
        return ()

    @abstractmethod
    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        """Choose the rows and columns of the layers of one block that remain.

        Args:
            block: The roles of its layers.
            states: Its layers by name.
            statistics: The inputs of the layers that the method `reads`, by name.

        Returns:
            The cuts; a layer may have one for each axis.
        """

    def run(self, engine: Engine, joined: Sequence[Reshaper]) -> None:
        engine.reshape(self)


class Remover(Reshaper):
    """A method that removes whole blocks, one after the other.

    The engine measures how far the model is from what it was without each block that may go, and
    removes the one that is missed least; then it measures again.
    """

    slices = False
    measures = True
    samples: ClassVar[int] = 4
    """Calibration samples on which the model is measured."""

    @property
    @abstractmethod
    def forced(self) -> tuple[int, ...]:
        """The blocks to remove, counted from 0, if nothing is to be measured."""

    @abstractmethod
    def count(self, blocks: int) -> int:
        """Return the number of blocks to remove of so many."""

    @abstractmethod
    def candidates(self, blocks: int, removed: Collection[int]) -> list[int]:
        """Return the blocks of which one may be removed next, counted from 0.

        Args:
            blocks: How many there were at first.
            removed: Those that are gone.
        """

    @staticmethod
    def sizes_without(roles: Roles, config: Any, removed: Collection[int]) -> dict[str, Any]:
        """Return the new values of config fields without some blocks, by field.

        Args:
            roles: Of the layers of the model.
            config: Of the model.
            removed: Blocks, counted from 0.
        """
        remaining = [index for index in range(len(roles.blocks)) if index not in removed]
        lists = {field: getattr(config, field, None) for field in roles.fields.per_block}
        return {roles.fields.blocks: len(remaining)} | {
            field: [values[index] for index in remaining]
            for field, values in lists.items()
            if values
        }

    def cuts(
        self,
        block: Block,
        states: Mapping[str, LayerState],
        statistics: Mapping[str, Statistics],
    ) -> list[Cut]:
        """Cut nothing: a block goes as a whole."""
        return []

    def run(self, engine: Engine, joined: Sequence[Reshaper]) -> None:
        engine.shorten(self)


class Transform(Method):
    """A method that rewrites weights and preserves the model's function, such as a rotation.

    The function is checked on the first batch of calibration inputs.
    """

    kind = "transform"
    streams = False
    kinds = ("transform",)
    needs_data = True
    tolerance: ClassVar[float] = 1e-3
    """Largest change of a logit on a batch, relative to the largest logit, in float32."""
    undoes: ClassVar[tuple[str, ...]] = ("prune", "quantize", "allocate", "inputs")
    """Kinds of earlier stages whose zeros or grids would be lost by it."""

    @property
    def forced(self) -> bool:
        """True to follow stages whose zeros and grids are lost by it."""
        return False

    def sizes(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the new values of config fields, by field. Nothing is computed.

        Args:
            model: The model before; it may be empty.

        Raises:
            OrderError: If the model cannot be rewritten.
        """
        return {}

    @abstractmethod
    def transform(self, model: PreTrainedModel) -> None:
        """Rewrite the parameters of the model in place, in float32.

        No two modules share a parameter.
        """

    def run(self, engine: Engine, joined: Sequence[Transform]) -> None:
        engine.transform(self)


class Equalizer(Transform):
    """A method that moves powers of two from columns of layers into whatever makes their inputs.

    A norm that multiplies by a gain, or a layer whose rows become the columns, takes the inverse of
    what a column gets. The model computes the same bits in float32 and bfloat16, and zeros stay.
    """

    undoes = ("quantize", "allocate", "inputs")

    @abstractmethod
    def exponents(
        self, readers: Sequence[LayerState], statistics: Statistics, rows: Tensor
    ) -> Tensor:
        """Return the exponent of the power of two that each column is multiplied by, (in,) int8.

        Args:
            readers: The layers of one input.
            statistics: Of that input.
            rows: (in,) int64, what makes each column. Columns with one number get one exponent.
        """

    def transform(self, model: PreTrainedModel) -> None:
        """Rewrite nothing: the engine moves the powers."""

    def run(self, engine: Engine, joined: Sequence[Transform]) -> None:
        engine.equalize(self)


class Workload(NamedTuple):
    """Steps of a recovery, and the samples that they take through a model.

    Args:
        rounds: Steps that learn.
        batch_size: Samples of a step.
        forward: Samples that go forward through the model or the original, steps included.
    """

    rounds: int
    batch_size: int
    forward: int


class Recovery(Method):
    """A method that regains accuracy on the masks that layers have, such as distillation.

    A quantized layer keeps its codes, and may get other scales; or its grid, and other codes. A
    method of the kind "adapt" leaves the weights alone and gives layers an adapter.
    """

    kind = "recover"
    kinds = ("recover", "adapt")
    streams = False
    needs_data = True
    report: Report = staticmethod(lambda text, rounds=1: None)
    """To be called after each round with a few words for the progress, or with the number of rounds
    that a run before has done; set by the engine."""
    stored: Callable[[], Mapping[str, Any] | None] = staticmethod(lambda: None)
    """Returns what `store` was given last in a run that was cut off, or None; set by the engine."""
    store: Callable[[Callable[[], Mapping[str, Any]]], None] = staticmethod(lambda value: None)
    """To be called after each round with a function that gives all that is needed to go on from
    there: tensors and plain values, in mappings and sequences. It is called now and then, and the
    tensors are on the disk when `store` returns. Set by the engine."""
    parameters: Mapping[str, Tensor] = types.MappingProxyType({})
    """New values of parameters that are no layers, such as gains of norms, by name; set by
    `recover`."""

    def workload(self, samples: int) -> Workload | None:
        """Return the steps and samples that `estimate` counts, or None to be left out of estimates.

        Args:
            samples: Number of calibration samples.
        """
        return None

    def learned(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are learned in a layer, for `estimate`.

        Args:
            shape: (out, in) of the layer.
        """
        return math.prod(shape)

    def tried(self, state: LayerState, statistics: Statistics | None = None) -> LayerState:
        """Return a layer as it will be, of which shapes and dtypes count; nothing is learned.

        Args:
            state: The layer before; one that the method covers.
            statistics: Not read.
        """
        return state

    @abstractmethod
    def recover(
        self,
        model: PreTrainedModel,
        states: Mapping[str, LayerState],
        batches: Sequence[Mapping[str, Tensor]],
        teacher: PreTrainedModel,
    ) -> Mapping[str, LayerState]:
        """Return the layers that changed, by name, each with its mask, and its codes or its grid.

        Args:
            model: The model after all earlier stages; must not be changed.
            states: Every compressed layer by name.
            batches: Calibration inputs, keyword arguments of a forward.
            teacher: The original model, a copy of its own; after a transform or a reshaper its
                layers differ from the model's in order or shape.
        """

    def run(self, engine: Engine, joined: Sequence[Recovery]) -> None:
        engine.recover(self)


class Report(Protocol):
    """Shows how far a recovery is."""

    def __call__(self, text: str, rounds: int = 1) -> None:
        """Show a few words, and some rounds more as done."""


class Engine(Protocol):
    """The run that carries methods out, one verb for each kind."""

    def apply(self, backends: Sequence[Backend]) -> None:
        """Apply backends to every layer that they cover, on one walk."""

    def assign(self, backends: Mapping[str, Backend], allocator: Method) -> None:
        """Apply to each named layer the backend that a method chose, on one walk.

        Args:
            backends: The backend of each layer, by the layer's name.
            allocator: The method that chose.
        """

    def profile(self, profiler: Profiler) -> Mapping[str, Profile] | None:
        """Profile every layer that a method covers; None if the run cannot look ahead."""

    def added_losses(self, method: Method, candidates: Sequence[Rewrite]) -> list[float]:
        """Return how far each candidate moves the model on samples that were held back.

        Args:
            method: The method that asks.
            candidates: Each gives the weight of every layer.

        Returns:
            The loss over that of the model as it is, the mean of some calibration samples.
        """

    def measure(self, allocator: Allocator) -> list[Measured]:
        """Measure every candidate of an allocator on every group of layers."""

    def reshape(self, reshaper: Reshaper) -> None:
        """Make layers smaller."""

    def shorten(self, remover: Remover) -> None:
        """Remove blocks."""

    def transform(self, transform: Transform) -> None:
        """Rewrite the model's weights, and check that its function is the same."""

    def equalize(self, equalizer: Equalizer) -> None:
        """Move powers of two between layers, and check that the model's function is the same."""

    def recover(self, recovery: Recovery) -> None:
        """Let a recovery change layers, and check that masks and grids are the same."""


def needs_of(methods: Iterable[Method]) -> frozenset[type[Accumulator]]:
    """Return all statistics that some methods need or use."""
    return frozenset(need for method in methods for need in method.needs | method.uses)
