"""Weights that are read when they are needed: a model on the meta device, filled a block at a time.

`planned` has transformers decide what it decides when it loads a checkpoint (names, dtypes, fused
experts, ties) on tensors without values. The values follow when `Weights` is asked for them. Files
are read, not mapped: a map that may be written to counts as memory, whether or not it is used.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.errors import ModelError
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target, Unit

logger = logging.getLogger(__name__)

_NUMBERS = 2**24
"""Numbers compared at a time, to see whether two stored tensors are equal."""


@dataclass(frozen=True)
class Source:
    """Stored tensors that transformers makes into one tensor of the model, or into several.

    Args:
        keys: The stored names, each with the pattern by which the converter knows it.
        converter: The conversion, or None where the tensors are only renamed.
        name: The tensor of the model, or the first of them.
        dtype: The dtype that the stored tensors are cast to.
        names: All tensors of the model that are made of the stored tensors.
    """

    keys: tuple[tuple[str, str], ...]
    converter: hf.WeightConverter | None
    name: str
    dtype: torch.dtype
    names: tuple[str, ...]


@dataclass
class Plan:
    """Which stored tensors make which tensors of a model."""

    sources: list[Source] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    """The open file of each stored tensor."""
    unloaded: tuple[str, ...] = ()
    """Stored tensors that transformers loads into nothing."""

    def read(self, source: Source, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the tensors that a source makes, by name in the model, on the CPU.

        Args:
            source: One of `sources`.
            model: The model.

        Raises:
            ModelError: If a file cannot be read.
        """
        return _convert(source, model, self.load)

    def load(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return one stored tensor.

        Args:
            key: The stored name.
            dtype: The dtype to cast the tensor to.

        Raises:
            ModelError: If the file cannot be read.
        """
        try:
            return cast(Tensor, self.files[key].get_tensor(key).to(dtype))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"The weight '{key}' cannot be read: {error}. Get the checkpoint again."
            ) from error

    def empty(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return one stored tensor without values.

        Args:
            key: The stored name.
            dtype: The dtype of the result; by default the stored one.

        Raises:
            ModelError: If torch has no such dtype.
        """
        return _empty(self.files[key], key, dtype)

    def equal(self, one: Source, other: Source) -> bool:
        """Return whether two stored tensors are the same in the model, some rows at a time."""
        first, second = (
            self.files[source.keys[0][0]].get_slice(source.keys[0][0]) for source in (one, other)
        )
        if one.converter or other.converter or first.get_shape() != second.get_shape():
            return False
        rows, *rest = first.get_shape()
        step = max(1, _NUMBERS // torch.Size(rest).numel())
        parts = (slice(at, min(at + step, rows)) for at in range(0, rows, step))
        return all(
            torch.equal(first[part].to(one.dtype), second[part].to(other.dtype)) for part in parts
        )


def _empty(file: Any, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a stored tensor without values, as `Plan.empty` does."""
    stored = file.get_slice(key)
    own = hf.stored_dtype(stored.get_dtype())
    if own is None:
        raise ModelError(
            f"The weight '{key}' is of type {stored.get_dtype()}, which torch does not have."
        )
    return torch.empty(stored.get_shape(), dtype=dtype or own, device="meta")


def _convert(
    source: Source, model: PreTrainedModel, load: Callable[[str, torch.dtype], Tensor]
) -> dict[str, Tensor]:
    if source.converter is None:
        return {source.name: load(source.keys[0][0], source.dtype)}
    tensors = ((key, pattern, partial(load, key, source.dtype)) for key, pattern in source.keys)
    return hf.convert(source.converter, source.name, tensors, model)


@contextmanager
def planned() -> Iterator[Plan]:
    """Have `from_pretrained` leave every stored tensor on the meta device, while active.

    Everything else about the model is as usual: its class, dtypes, ties, generation config, and the
    buffers that no checkpoint holds. Only this thread's calls do so.

    Raises:
        ModelError: From within `from_pretrained`, if the weights of the checkpoint cannot be read
            a block at a time.
    """
    plan = Plan()

    def load(model: PreTrainedModel, files: Sequence[str], config: Any, adapter: bool) -> Any:
        if plan.files or adapter:
            raise ModelError(
                "Adapters cannot be loaded with low_memory. Merge them into the model first."
            )
        if model.is_remote_code():
            raise ModelError(
                f"{type(model).__name__} comes with code of its own, which low_memory cannot "
                "follow."
            )
        return _plan(plan, model, files, config)

    with hf.weight_loader(load):
        yield plan


def _plan(plan: Plan, model: PreTrainedModel, files: Sequence[str], config: Any) -> Any:
    """Have transformers load without values, and note which stored tensor makes what."""
    for file in files:
        try:
            opened = safe_open(file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"'{file}' cannot be read: {error}. Get the checkpoint again."
            ) from error
        plan.files |= dict.fromkeys(opened.keys(), opened)
    names = hf.CheckpointNames(model, config)
    plan.unloaded = tuple(key for key in plan.files if names.destination(key) is None)
    sources = _sources(plan, model, names)
    info = hf.load_without_values(model, {key: plan.empty(key) for key in plan.files}, config)
    if info.mismatched_keys or info.conversion_errors:
        return info  # transformers says what is wrong
    state = model.state_dict()
    for source in sources:
        source = replace(source, dtype=state[source.name].dtype)
        made = _convert(source, model, plan.empty)
        plan.sources.append(replace(source, names=tuple(name for name in made if name in state)))
    if {name for source in plan.sources for name in source.names} != set(state) - info.missing_keys:
        raise ModelError(
            f"How transformers loads a checkpoint of {type(model).__name__} cannot be followed a "
            "block at a time: load it without low_memory."
        )
    _tie(plan, model, info)
    return info


def _sources(plan: Plan, model: PreTrainedModel, names: hf.CheckpointNames) -> list[Source]:
    """Group the stored tensors by the tensor they become, in the order of loading."""
    state = model.state_dict()
    sources: dict[str, Source] = {}
    for key in hf.sorted_keys(plan.files):
        destination = names.destination(key)
        if destination is None:
            continue  # transformers leaves the tensor out too, and says so
        name, pattern, converter = destination
        source = sources.setdefault(
            name, Source((), copy.deepcopy(converter), name, state[name].dtype, ())
        )
        if source.converter is not None or not source.keys:
            sources[name] = replace(source, keys=(*source.keys, (key, pattern)))
    return list(sources.values())


def _tie(plan: Plan, model: PreTrainedModel, info: Any) -> None:
    """Of two weights that are to be one and are both stored, keep one if equal, and both if not.

    transformers does the same, but it has to look at the values.
    """
    by_name = {name: source for source in plan.sources for name in source.names}
    ties = hf.ties(model)
    for target, source in list(ties.items()):
        if target in by_name and source in by_name:
            if plan.equal(by_name[target], by_name[source]):
                info.missing_keys.add(target)
                plan.sources.remove(by_name[target])
            else:
                logger.warning(
                    "'%s' and '%s' are one weight by the config and two in the checkpoint.",
                    target,
                    source,
                )
                ties.pop(target)


class Unloaded(Mapping[str, Tensor]):
    """The stored tensors that transformers loads into nothing, each read when it is asked for.

    Args:
        files: The open file of each tensor, by the stored name.
    """

    def __init__(self, files: Mapping[str, Any]):
        self._files = files

    def __getitem__(self, key: str) -> Tensor:
        """Return one stored tensor, bit for bit.

        Raises:
            KeyError: If there is none of that name.
            ModelError: If its file cannot be read.
        """
        opened = self._files[key]
        try:
            return cast(Tensor, opened.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"The weight '{key}' cannot be read: {error}. Get the checkpoint again."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names in the model: its `state_dict()`, read on demand.

    The `model` that comes with the weights has every buffer, and parameters on the meta device.
    `materialize` fills parameters with the values of the checkpoint, `release` empties them again.
    Parameters stay the same objects, so that targets, units and ties remain valid; values written
    into them are lost.

    Args:
        model: The model that `from_pretrained` made inside `planned`.
        plan: The plan that `planned` made.
        device: The device of buffers, and of parameters when they are filled.

    Attributes:
        model: The model, in evaluation mode.
        device: As above.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, device: torch.device | str = "cpu"):
        self.model = model
        self.device = torch.device(device)
        self._plan = plan
        self._layers: dict[str, list[Target]] = {}
        self._states: Mapping[str, LayerState] = {}
        self._names = list(model.state_dict())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        by_name = {name: (source, name) for source in plan.sources for name in source.names}
        loaded = {
            id(self._parameters[name]): by_name[name]
            for name in by_name
            if name in self._parameters
        }
        tied = {
            name: loaded[id(parameter)]
            for name, parameter in self._parameters.items()
            if id(parameter) in loaded
        }
        self._stored: dict[str, tuple[Source, str]] = by_name | tied
        """For each tensor that the checkpoint holds: its source, and its name there."""
        for name in self._names:
            if name in self._stored and name not in self._parameters:
                _set_buffer(model, name, self[name])
        for name, buffer in model.named_buffers():
            _set_buffer(model, name, buffer.to(self.device))
        for name in set(self._parameters) - set(self._stored):  # transformers made these itself
            _swap(self._parameters[name], self._parameters[name].detach().to(self.device))

    def overlaid(
        self, targets: Mapping[str, Target], states: Mapping[str, LayerState]
    ) -> Mapping[str, Tensor]:
        """Return the same tensors with the weights of compressed layers in them.

        Args:
            targets: Every layer that was compressed, by name.
            states: The state of each of those layers. States are read in the order of the model:
                those of one block, then those of the next.
        """
        overlaid = copy.copy(self)
        overlaid._states = states
        overlaid._layers = {}
        for target in targets.values():
            overlaid._layers.setdefault(target.parameter_name, []).append(target)
        return overlaid

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor on the CPU, for the caller to keep.

        Raises:
            KeyError: If the model has none of that name.
            ModelError: If its file cannot be read.
        """
        layers = self._layers.get(name)
        if layers is None:
            return self._read(name)
        parameter = layers[0].parameter
        tensor = (
            torch.empty(parameter.shape, dtype=parameter.dtype)
            if layers[0].whole
            else self._read(name)
        )
        for layer in layers:
            layer.matrix_of(tensor).copy_(self._states[layer.name].weight)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def within(self, module: str) -> list[str]:
        """Return the names of the parameters in a module."""
        return [name for name in self._parameters if name.startswith(f"{module}.")]

    def outside(self, units: Iterable[Unit]) -> list[str]:
        """Return the names of the parameters in no unit.

        Parameters that only the output head has are left out: no walk reaches the head.

        Raises:
            ModelError: If a unit shares a parameter with another, or with the rest of the model:
                the unit could not be emptied.
        """
        units = list(units)
        places: dict[int, set[str | None]] = {}
        owner = {name: unit.name for unit in units for name in self.within(unit.name)}
        for name, parameter in self._parameters.items():
            places.setdefault(id(parameter), set()).add(owner.get(name))
            if len(places[id(parameter)]) > 1:
                raise ModelError(
                    f"'{name}' is shared between blocks, or with what is outside them: drop "
                    "low_memory."
                )
        head: nn.Module | None = self.model.get_output_embeddings()
        if head is None or any(unit.module is head for unit in units):
            return [name for name in self._parameters if name not in owner]
        alone = {id(parameter) for parameter in head.parameters()}
        alone -= {
            id(parameter)
            for module in self.model.modules()
            if module is not head
            for parameter in module._parameters.values()
        }
        return [
            name
            for name, parameter in self._parameters.items()
            if name not in owner and id(parameter) not in alone
        ]

    def materialize(self, names: Iterable[str]) -> None:
        """Fill parameters with the checkpoint's values, if they are empty; buffers always are.

        Raises:
            ModelError: If a file cannot be read.
        """
        wanted: dict[int, tuple[Source, list[str]]] = {}
        for name in self._fillable(names):
            if self._parameters[name].is_meta:
                source, stored = self._stored[name]
                wanted.setdefault(id(source), (source, []))[1].append(stored)
        with torch.inference_mode(False), torch.no_grad():
            for source, stored_names in wanted.values():
                made = self._plan.read(source, self.model)
                for stored in set(stored_names):
                    tensor = self._checked(stored, made[stored])
                    _swap(self._parameters[stored], tensor.to(self.device))

    def release(self, names: Iterable[str]) -> None:
        """Empty parameters; nothing may hold a view of them."""
        with torch.inference_mode(False), torch.no_grad():
            for name in self._fillable(names):
                parameter = self._parameters[name]
                if not parameter.is_meta:
                    _swap(parameter, torch.empty_like(parameter, device="meta"))

    def _fillable(self, names: Iterable[str]) -> list[str]:
        """Return the names that are parameters, and in the checkpoint."""
        return [name for name in names if name in self._stored and name in self._parameters]

    def _read(self, name: str) -> Tensor:
        """Return one tensor as the checkpoint has it."""
        if name not in self._stored:
            if name not in self._names:
                raise KeyError(name)
            return cast(Tensor, self.model.state_dict()[name]).cpu()
        source, stored = self._stored[name]
        with torch.inference_mode(False), torch.no_grad():
            return self._checked(stored, self._plan.read(source, self.model)[stored])

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        expected = cast(Tensor, self.model.get_parameter_or_buffer(name))
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ModelError(
                f"'{name}' was read as {tensor.dtype} {tuple(tensor.shape)}, the model has "
                f"{expected.dtype} {tuple(expected.shape)}: the checkpoint was changed meanwhile."
            )
        return tensor


def embedding_parameters(model: PreTrainedModel) -> set[int]:
    """Return the `id` of each parameter of the input embeddings, which begin a forward."""
    embedding = None
    with suppress(NotImplementedError):  # raised by models of images
        embedding = model.get_input_embeddings()
    return set() if embedding is None else {id(parameter) for parameter in embedding.parameters()}


def _swap(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter other values, on another device; it remains the same object."""
    values = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, values)


def _set_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, own = name.rpartition(".")
    model.get_submodule(module)._buffers[own] = tensor
