"""Make a model smaller: what a reshaper decided is carried out here, and can be again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.backends.base import Cut, Method, Reshaper, Transform
from optimum_order.backends.channels import breaks
from optimum_order.engine import recipe as recipes
from optimum_order.engine.transform import transform_again
from optimum_order.errors import InvariantError, ModelError, OrderError
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.models.architecture import Block, Roles, require_roles
from optimum_order.models.sizes import (
    Sizes,
    keep_blocks,
    keep_experts,
    mismatch,
    replace_matrix,
    resized,
    set_sizes,
)
from optimum_order.models.units import Target, Unit
from optimum_order.order import Stage

Again = Callable[[LayerState, Tensor | None], LayerState]
"""Quantizes the weight of a state once more: of the layer and the columns that remain, or None."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What one stage did to the modules of a model, to be done again.

    Args:
        stage: The canonical stage.
        sizes: The new values of config fields.
        blocks: For each block that was cut, by name, what `cut_block` returned.
        removed: Blocks that were removed, counted from 0, the one that is missed least first.
        parameters: New values of parameters that are no layers, by name.
    """

    stage: str
    sizes: Sizes
    blocks: Mapping[str, Mapping[str, Any]]
    removed: tuple[int, ...] = ()
    parameters: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the change."""
        removed = {"removed": list(self.removed)} if self.removed else {}
        return {"stage": self.stage, "sizes": dict(self.sizes), **removed}


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model after a stage that makes it smaller, before anything is computed.

    Args:
        model: Without weights.
        units: Its blocks.
    """

    model: PreTrainedModel
    units: Sequence[Unit]


def roles_for(reshaper: Reshaper, model: PreTrainedModel) -> Roles:
    """Return the roles of the layers of a model that is to be made smaller.

    Args:
        reshaper: The method.
        model: The model, on any device.

    Raises:
        ModelError: If the roles are unknown.
    """
    try:
        return require_roles(model)
    except ModelError as error:
        raise ModelError(
            f"Stage '{reshaper.stage}' cannot make this model smaller. {error}"
        ) from error


def outlines(
    model: PreTrainedModel,
    methods: Sequence[Method],
    find: Callable[[PreTrainedModel], Sequence[Unit]],
    start: Mapping[str, LayerState] | None = None,
) -> list[Outline]:
    """Return the model after each stage that changes its modules, in turn. No weight is read.

    Args:
        model: The model before, on any device.
        methods: Of a recipe.
        find: Gives the blocks of a model.
        start: Layers that are compressed already.

    Raises:
        OrderError: If no config can hold what a stage asks for, or a grid breaks that no stage of
            the recipe made.
        ModelError: If the roles of the layers are unknown.
    """
    after = []
    for place, method in enumerate(methods):
        if method.kind == "transform":
            sizes = cast(Transform, method).sizes(model)
            model = resized(model, sizes) if sizes else model
            after.append(Outline(model, find(model)))
        if method.kind != "reshape":
            continue
        reshaper = cast(Reshaper, method)
        if reshaper.targets:
            raise OrderError(
                f"Stage '{reshaper.stage}' treats all blocks alike, since one field of the config "
                "holds their size: leave 'targets' out."
            )
        roles = roles_for(reshaper, model)
        sizes = reshaper.sizes(roles, model.config)
        if reshaper.slices:
            _refuse_broken(reshaper, roles, methods[:place], start or {})
        try:
            model = resized(model, sizes)
            require_roles(model)
        except ModelError as error:
            values = ", ".join(f"{name}={value}" for name, value in sizes.items())
            raise OrderError(
                f"Stage '{reshaper.stage}' would make a model with {values}, which its config "
                f"cannot hold: {str(error).rstrip('.')}. Choose another ratio."
            ) from error
        after.append(Outline(model, find(model)))
    return after


def _refuse_broken(
    reshaper: Reshaper,
    roles: Roles,
    before: Sequence[Method],
    start: Mapping[str, LayerState],
) -> None:
    """Refuse to break a grid that was there before the run: nothing says how it was made."""
    for layer in (layer for block in roles.blocks for layer in reshaper.reads(block)):
        state = start.get(layer.name)
        again = any(method.kind == "quantize" and method.covers(layer.name) for method in before)
        if state is None or state.grid is None or again:
            continue
        if breaks(state.grid, torch.arange(1, state.weight.shape[1])):
            raise OrderError(
                f"Stage '{reshaper.stage}' breaks the grid of '{layer.name}', whose columns share "
                "scales, and the layer was quantized before this run. Start from the original "
                "model, or quantize first, as in "
                f"'gptq:4 > {reshaper.stage}'."
            )


def cut(
    reshaper: Reshaper,
    target: Target,
    state: LayerState,
    cuts: Sequence[Cut],
    again: Again | None = None,
) -> tuple[LayerState, StageRecord]:
    """Replace a layer's parameter, and its bias, by a smaller one.

    Args:
        reshaper: What decided.
        target: The layer: all of its parameter.
        state: The layer before.
        cuts: At most one for each axis.
        again: Quantizes a layer whose grid breaks; None refuses such a cut.

    Returns:
        The layer after, and what was removed: the squared size of what is gone over that of all.

    Raises:
        OrderError: If the layer cannot be cut, or its grid breaks.
        InvariantError: If the cuts do not fit the layer.
    """
    if not target.whole or target.kind not in ("linear", "conv1d"):
        raise OrderError(
            f"Stage '{reshaper.stage}' cannot make '{target.name}' smaller: only nn.Linear and "
            f"Conv1D can be, got {type(target.module).__name__}."
        )
    before = state.weight.float()
    size = before.square().sum().item()
    for one in cuts:
        _check(reshaper, target, one, state.weight.shape[one.axis])
        state, before = _sliced(reshaper, target, state, one, again), _selected(before, one)
    _install(target, state, cuts)
    left = before.square().sum().item()
    error = 1 - left / size if size else 0.0
    state.check(f"{target.name}, stage '{reshaper.stage}'")
    return state, StageRecord(str(reshaper.stage), error, "weights")


def _selected(tensor: Tensor, one: Cut) -> Tensor:
    return tensor.index_select(one.axis, one.indices.to(tensor.device))


def _install(target: Target, state: LayerState, cuts: Sequence[Cut]) -> None:
    """Put a cut layer into its module."""
    bias: Tensor | None = getattr(target.module, "bias", None)
    rows = [one for one in cuts if one.axis == 0]
    for one in rows:
        bias = None if bias is None else _selected(bias.data, one)
    replace_matrix(target, state.weight, bias if rows else None)


def _check(reshaper: Reshaper, target: Target, one: Cut, length: int) -> None:
    index = one.indices
    ordered = index.unique()
    fits = index.ndim == 1 and 0 < len(ordered) == len(index)
    if not fits or ordered[0] < 0 or ordered[-1] >= length:
        raise InvariantError(
            f"Stage '{reshaper.stage}': the cut of '{target.name}' along axis {one.axis} must name "
            f"1 to {length} of its {length} rows or columns, each once."
        )


def _sliced(
    reshaper: Reshaper, target: Target, state: LayerState, one: Cut, again: Again | None
) -> LayerState:
    index = one.indices.to(state.weight.device)
    grid = state.grid
    broken: ValueError | None = None
    if grid is not None:
        everything = torch.arange(state.weight.shape[1 - one.axis])
        chosen = one.indices.cpu()  # which index tensors of any device
        rows, columns = (chosen, everything) if one.axis == 0 else (everything, chosen)
        try:
            grid = grid.take(rows, columns)
        except ValueError as error:
            grid = None
            broken = error
    pruned = state.pruned
    weight = state.weight.index_select(one.axis, index) if one.weight is None else one.weight
    sliced = dataclasses.replace(
        state,
        weight=weight,
        pruned=None if pruned is None else pruned.index_select(one.axis, index),
        grid=grid,
        notes=(*state.notes, *one.notes),
    )
    if broken is None:
        return sliced
    if again is None:
        raise OrderError(
            f"Stage '{reshaper.stage}' breaks the grid of '{target.name}': {broken}. "
            "Put it before the quantization."
        ) from broken
    return again(sliced, index if one.axis == 1 else None)


def cut_block(
    reshaper: Reshaper,
    model: PreTrainedModel,
    block: Block,
    layers: Mapping[str, tuple[LayerState, Again]],
    cuts: Sequence[Cut],
) -> dict[str, dict[str, Any]]:
    """Carry out the cuts of a block.

    Args:
        reshaper: What decided.
        model: The model.
        block: The roles of the layers of the block.
        layers: The layers of the block by name, with what quantizes each again.
        cuts: From the reshaper.

    Returns:
        For each layer that was cut, by name, its cuts, its state after as `Packed`, and the record.
        `recut` does the same again.
    """
    done: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(one.layer for one in cuts):
        mine = [one for one in cuts if one.layer == name]
        plain = [{"axis": one.axis, "indices": one.indices} for one in mine]
        if block.mixture is not None and name == block.mixture.router.name:
            keep_experts(model, block, mine[0].indices)
            done[name] = {"cuts": plain, "state": None, "record": None}
            continue
        state, again = layers[name]
        after, record = cut(reshaper, _target(model, block, name), state, mine, again)
        done[name] = {"cuts": plain, "state": Packed.of(after), "record": record}
    return done


def recut(model: PreTrainedModel, block: Block, done: Mapping[str, Mapping[str, Any]]) -> None:
    """Carry out the cuts of a block once more, from what `cut_block` returned."""
    for name, layer in done.items():
        cuts = [Cut(name, one["axis"], one["indices"]) for one in layer["cuts"]]
        if block.mixture is not None and name == block.mixture.router.name:
            keep_experts(model, block, cuts[0].indices)
            continue
        target = _target(model, block, name)
        if layer["state"] is not None:
            _install(target, layer["state"].state(), cuts)
            continue
        weight = target.read()
        for one in cuts:
            weight = _selected(weight, one)
        _install(target, LayerState(weight), cuts)


def _target(model: PreTrainedModel, block: Block, name: str) -> Target:
    return targets_in(model, block)[name]


def targets_in(model: PreTrainedModel, block: Block) -> dict[str, Target]:
    """Return the layers of a block that may be cut as a whole, by name."""
    layers = [*block.attention.readers, *block.attention.writers]
    if block.dense is not None:
        layers += [*block.dense.readers, *block.dense.writers]
    return {layer.name: layer.target(model) for layer in layers}


def redo(
    model: PreTrainedModel, units: Sequence[Unit], changes: Sequence[Change]
) -> Sequence[Unit]:
    """Do to a model what stages did to one like it; return its blocks.

    Args:
        model: The model as it was before these stages.
        units: Its blocks.
        changes: What the stages did.
    """
    for change in changes:
        again = recipes.method(Stage.parse(change.stage))
        if again.kind == "recover" or change.parameters:
            put_parameters(model, change.parameters)
            continue
        if again.kind == "transform":
            transform_again(cast(Transform, again), model, change.sizes)
            continue
        roles = require_roles(model)
        for block in roles.blocks:
            recut(model, block, change.blocks.get(block.name, {}))
        if change.removed:
            keep_blocks(model, roles, left(roles, change.removed))
            units, _ = renamed(units, roles, change.removed)
        units = present(units)
        set_sizes(model, change.sizes)
    return units


def put_parameters(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Give a model new parameters in place of some.

    Args:
        model: The model.
        values: Their values by name, in shape and dtype as before.
    """
    for name, value in values.items():
        old = model.get_parameter(name)
        module, _, attribute = name.rpartition(".")
        new = torch.nn.Parameter(value.to(old.device, copy=True), requires_grad=old.requires_grad)
        setattr(model.get_submodule(module), attribute, new)


def left(roles: Roles, removed: Sequence[int]) -> list[int]:
    """Return the blocks that remain, counted from 0."""
    return [index for index in range(len(roles.blocks)) if index not in removed]


def renamed(
    units: Sequence[Unit], roles: Roles, removed: Sequence[int]
) -> tuple[Sequence[Unit], dict[str, str]]:
    """Return what is left of the blocks once some were removed, and the new names of layers.

    Args:
        units: The blocks.
        roles: Of the model before.
        removed: Blocks that were removed, counted from 0.

    Returns:
        The blocks, and the new name of each layer that is left, by the old one.
    """
    remaining = left(roles, removed)
    blocks = {roles.blocks[old].name: roles.blocks[new].name for new, old in enumerate(remaining)}
    gone = {roles.blocks[index].name for index in removed}
    names: dict[str, str] = {}
    after = []
    for unit in units:
        if unit.name in gone:
            continue
        name = blocks.get(unit.name, unit.name)
        targets = []
        for target in unit.targets:
            names[target.name] = name + target.name.removeprefix(unit.name)
            targets.append(dataclasses.replace(target, name=names[target.name]))
        after.append(Unit(name, unit.module, tuple(targets)))
    return after, names


def present(units: Sequence[Unit]) -> Sequence[Unit]:
    """Return the blocks without experts that are there no more."""
    return [
        dataclasses.replace(
            unit,
            targets=tuple(
                target
                for target in unit.targets
                if target.expert is None or target.expert < len(target.parameter)
            ),
        )
        for unit in units
    ]


def check_stock(model: PreTrainedModel, stock: PreTrainedModel, stage: str) -> None:
    """Check that a model which was made smaller is the one that its config makes.

    Args:
        model: The model.
        stock: What its class makes of the config.
        stage: The stage, for the message.

    Raises:
        InvariantError: If a parameter has another shape than its class makes.
    """
    problem = mismatch(model, stock)
    if problem is not None:
        raise InvariantError(
            f"Stage '{stage}' left a model that does not load: {problem}. This is a bug in the "
            "method, not in your input."
        )
