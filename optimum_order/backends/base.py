"""What a compression method is: a name, its options, what it must know about the inputs, and one equation."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from optimum_order.errors import InvariantError, OrderError, unknown
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.order import Stage


def option(
    default: Any, help: str, *, check: Callable[[Any], bool] = lambda value: True, allowed: str = ""
) -> Any:
    """A field of a backend's `Options`.

    Args:
        default: Its value when a stage does not give it; `dataclasses.MISSING` makes it required.
        help: What it does, in a few words.
        check: Whether a value of the right type is allowed.
        allowed: What is allowed, for the error message: "in [0, 1)".
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "check": check, "allowed": allowed}
    )


def _matches(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_matches(value, member) for member in typing.get_args(annotation))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join(describe(member) for member in typing.get_args(annotation))
    names = {
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "a word",
        tuple: "a list",
    }
    return names.get(annotation, str(annotation))


class Method(ABC):
    """Something a stage can name: a backend, or an allocator that picks a backend for each layer.

    A subclass is one file. It declares a frozen dataclass `Options`, each field made with `option`, whose first
    field is the main knob; reading a stage into them, with every error a user can make, is done here.
    """

    name: ClassVar[str]
    """What a stage calls it."""
    summary: ClassVar[str]
    """What it does, in one line for `optimum-order backends`."""
    Options: ClassVar[type]
    """Frozen dataclass of options; the first is the main knob."""

    def __init__(self, stage: Stage):
        self.options = self.validate(stage, self._read(stage))

    @classmethod
    def _read(cls, stage: Stage) -> Any:
        fields = {field.name: field for field in dataclasses.fields(cls.Options)}
        hints = typing.get_type_hints(cls.Options)
        given = dict(stage.options)
        if stage.value is not None:
            given[next(iter(fields))] = stage.value
        for key, value in given.items():
            if key not in fields:
                raise OrderError(f"Stage '{stage}': {unknown('option', key, fields)}")
            meta = fields[key].metadata
            if not _matches(value, hints[key]) or not meta["check"](value):
                wanted = meta["allowed"] or describe(hints[key])
                raise OrderError(
                    f"Stage '{stage}': '{key}' ({meta['help']}) must be {wanted}, got {value!r}."
                )
            if float in (hints[key], *typing.get_args(hints[key])) and isinstance(value, int):
                given[key] = float(value)
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in given:
                meta = field.metadata
                raise OrderError(
                    f"Stage '{stage}' must give '{key}' ({meta['help']}): {meta['allowed']}."
                )
        return cls.Options(**given)

    @classmethod
    def validate(cls, stage: Stage, options: Any) -> Any:
        """The options in their one normal form, or an OrderError where they do not fit together."""
        return options

    @property
    def stage(self) -> Stage:
        """The canonical stage: the main knob alone where all else is default, or every option that is not."""
        fields = dataclasses.fields(self.Options)
        values = {field.name: getattr(self.options, field.name) for field in fields}
        given = {
            field.name: values[field.name]
            for field in fields
            if values[field.name] != field.default
        }
        knob = fields[0].name
        return Stage(self.name, values[knob]) if set(given) <= {knob} else Stage(self.name, **given)

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option with its value, for the manifest."""
        return dataclasses.asdict(self.options)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of this (out, in) shape cannot be treated with these options, or None if it can."""
        return None


class Backend(Method):
    """One compression method: the tensors of one layer in, the tensors of one layer out.

    It says what statistics it `needs` and writes its equation in `compress`; everything around that is checked
    here, before and after. A backend sees tensors only: never a module, a model, a path or a global.
    """

    kind: ClassVar[str]
    """"prune" or "quantize"."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Subset of {"squared_norms", "gram"}: what `compress` reads from the statistics."""

    @abstractmethod
    def compress(self, state: LayerState, statistics: Statistics | None) -> LayerState:
        """The method itself.

        Args:
            state: The layer before; its tensors are not to be changed in place.
            statistics: What it `needs`; None only if it needs nothing.
        """

    @torch.no_grad()
    def apply(
        self, state: LayerState, statistics: Statistics | None = None, *, where: str = "layer"
    ) -> LayerState:
        """Compress one layer and check every promise of `LayerState` on the result.

        A layer that no calibration token reached, such as an idle expert, is treated as if its inputs were white
        noise (H = I): Wanda then ranks by magnitude and GPTQ rounds to nearest. The state's notes say so.

        Args:
            state: The layer before.
            statistics: Its inputs; may be None if the backend needs nothing.
            where: Names the layer in messages.

        Raises:
            InvariantError: If the backend was not given what it needs, or broke a promise.
        """
        where = f"{where}, stage '{self.stage}'"
        if self.needs and (
            statistics is None or ("gram" in self.needs and statistics.gram is None)
        ):
            raise InvariantError(
                f"{where}: the backend needs {sorted(self.needs)} and was not given them."
            )
        if self.needs and statistics is not None and statistics.tokens == 0:
            statistics = statistics.isotropic()
            note = f"{self.stage}: no calibration token reached this layer; its inputs were taken as white noise"
            state = dataclasses.replace(state, notes=(*state.notes, note))
        result = self.compress(state, statistics)
        if result.weight.shape != state.weight.shape or result.weight.dtype != state.weight.dtype:
            raise InvariantError(f"{where}: the backend changed the weight's shape or dtype.")
        if state.pruned is not None and (
            result.pruned is None or (state.pruned & ~result.pruned).any()
        ):
            raise InvariantError(f"{where}: the backend brought pruned weights back.")
        if (
            state.grid is not None
            and result.grid is None
            and not getattr(self.options, "off_grid", False)
        ):
            raise InvariantError(
                f"{where}: the backend dropped the quantisation grid, and no 'off_grid' asked it to."
            )
        result.check(where)
        return result


class Allocator(Method):
    """A method that decides across layers, such as mixed precision.

    The pipeline measures every candidate of every group of layers, `allocate` turns that table into one concrete
    stage per layer, and the per-layer maths stays in the backend it allocates for.
    """

    @property
    @abstractmethod
    def fused(self) -> bool:
        """Whether layers that read the same input are one group and get the same stage."""

    @abstractmethod
    def candidates(self) -> list[Stage]:
        """The stages a layer may be given."""

    @abstractmethod
    def allocate(self, table: list[Measured]) -> list[dict[str, Stage]]:
        """Choose.

        Args:
            table: One row per group and candidate.

        Returns:
            Passes over the model, each naming the stage of the layers it treats; every layer in exactly one.

        Raises:
            OrderError: If the budget cannot be met.
        """


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one candidate would do to one group of layers.

    Args:
        layers: Their names.
        weights: How many weights they have together.
        stage: The candidate.
        bits: Width of one weight after it.
        error: Relative squared error of the output of the block they are in, all else left as it was.
    """

    layers: tuple[str, ...]
    weights: int
    stage: Stage
    bits: int
    error: float
