"""Weights read when they are needed: a model stands empty, and is filled from its files a block at a time.

What transformers does to a checkpoint on loading, it does here: `planned` has it decide everything, names, dtypes,
fused experts and ties, on tensors that have a shape and no values. The values follow when somebody asks for them.
Files are read, not mapped: a map that may be written to counts as memory, whether or not it is used.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import str_to_torch_dtype

from optimum_order.errors import ModelError
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target, Unit

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3
"""In glibc's malloc.h."""
_NUMBERS = 2**24
"""Numbers compared at a time, to see whether two stored tensors are one."""


@dataclass(frozen=True)
class Source:
    """Stored tensors of which transformers makes one tensor of the model or, if it takes them apart, several.

    Args:
        keys: The stored names, each with the pattern that the converter knows it by.
        converter: What makes them into the model's; None where they only have another name.
        name: The tensor of the model, or the first of them.
        dtype: What the stored tensors are cast to.
        names: All tensors of the model that come of it.
    """

    keys: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    name: str
    dtype: torch.dtype
    names: tuple[str, ...]


@dataclass
class Plan:
    """Which stored tensors make which tensors of a model."""

    sources: list[Source] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    """The open file of each stored tensor."""

    def read(self, source: Source, model: PreTrainedModel) -> dict[str, Tensor]:
        """What comes of it, by name in the model, on the CPU.

        Raises:
            ModelError: If a file cannot be read.
        """
        return _convert(source, model, self.load)

    def load(self, key: str, dtype: torch.dtype) -> Tensor:
        try:
            return self.files[key].get_tensor(key).to(dtype)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"The weight '{key}' cannot be read: {error}. Get the checkpoint again."
            ) from error

    def empty(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The same without values."""
        stored = self.files[key].get_slice(key)
        if stored.get_dtype() not in str_to_torch_dtype:
            raise ModelError(
                f"The weight '{key}' is of type {stored.get_dtype()}, which torch does not have."
            )
        given = str_to_torch_dtype[stored.get_dtype()]
        return torch.empty(stored.get_shape(), dtype=dtype or given, device="meta")

    def equal(self, one: Source, other: Source) -> bool:
        """Whether two stored tensors are the same in the model, a few rows at a time."""
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


def _convert(source: Source, model: PreTrainedModel, load: Any) -> dict[str, Tensor]:
    if source.converter is None:
        return {source.name: load(source.keys[0][0], source.dtype)}
    converter = copy.deepcopy(source.converter)
    for key, pattern in source.keys:
        converter.add_tensor(source.name, key, pattern, cast(Any, partial(load, key, source.dtype)))
    found = converter.convert(source.name, model=model, config=model.config)
    return {name: made[0] if isinstance(made, list) else made for name, made in found.items()}


@contextmanager
def planned() -> Iterator[Plan]:
    """While active, `from_pretrained` makes a model of which every stored tensor is on the meta device.

    Everything else about the model is as it would be: its class, dtypes, ties, generation config, and the buffers that
    no checkpoint holds. Not for two threads at once.

    Raises:
        ModelError: From within `from_pretrained`, if the checkpoint is one of which the values could not follow.
    """
    plan, original = Plan(), PreTrainedModel._load_pretrained_model

    def load(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *others: Any,
        **more: Any,
    ) -> Any:
        if plan.files or others or more:
            raise ModelError(
                "Adapters cannot be loaded with low_memory. Merge them into the model first."
            )
        if model.is_remote_code():
            raise ModelError(
                f"{type(model).__name__} comes with code of its own, which low_memory cannot follow."
            )
        return _plan(plan, model, checkpoint_files, load_config), None

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
    try:
        yield plan
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)  # type: ignore[method-assign]


def _plan(plan: Plan, model: PreTrainedModel, files: Sequence[str] | None, config: Any) -> Any:
    """Have transformers load the checkpoint without values, and note which of it makes what."""
    for file in files or []:
        try:
            opened = safe_open(file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"'{file}' cannot be read: {error}. Get the checkpoint again."
            ) from error
        plan.files |= dict.fromkeys(opened.keys(), opened)
    sources = _sources(plan, model, copy.deepcopy(config.weight_mapping or []))
    stored = {key: plan.empty(key) for key in plan.files}
    info, _ = convert_and_load_state_dict_in_model(
        model, stored, dataclasses.replace(config, device_map={"": "meta"}), None
    )
    if info.mismatched_keys or info.conversion_errors:
        return info  # transformers says what is wrong
    state = model.state_dict()
    for source in sources:
        source = dataclasses.replace(source, dtype=state[source.name].dtype)
        made = _convert(source, model, plan.empty)
        plan.sources.append(
            dataclasses.replace(source, names=tuple(name for name in made if name in state))
        )
    if {name for source in plan.sources for name in source.names} != set(state) - info.missing_keys:
        raise ModelError(
            f"How transformers loads a checkpoint of {type(model).__name__} cannot be followed a block at a time: load "
            "it without low_memory."
        )
    _tie(plan, model, info)
    return info


def _sources(plan: Plan, model: PreTrainedModel, mapping: Sequence[Any]) -> list[Source]:
    """The stored tensors by what they become, as `convert_and_load_state_dict_in_model` goes through them."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    prefix, state = model.base_model_prefix, model.state_dict()
    found: dict[str, Source] = {}
    for key in sorted(plan.files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=state
            )
        if name not in state:
            continue  # transformers leaves it out too, and says so
        converter = by_pattern.get(pattern)
        source = found.setdefault(
            name, Source((), copy.deepcopy(converter), name, state[name].dtype, ())
        )
        if source.converter is not None or not source.keys:
            found[name] = dataclasses.replace(source, keys=(*source.keys, (key, pattern or key)))
    return list(found.values())


def _tie(plan: Plan, model: PreTrainedModel, info: Any) -> None:
    """Of two weights that are to be one and are both stored, keep one if they are equal, and both if they are not.

    That is what transformers does, but it has to look at their values.
    """
    by_name = {name: source for source in plan.sources for name in source.names}
    for target, source in list(model.all_tied_weights_keys.items()):
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
                model.all_tied_weights_keys.pop(target)


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names in the model: its `state_dict()`, each read when it is asked for.

    The `model` that comes with it has every buffer, and parameters on the meta device. `materialise` fills parameters
    with what the checkpoint holds, `release` empties them again. They stay the same objects, so that targets, units and
    ties remain what they are; whatever was written into them is lost.

    Args:
        model: What `from_pretrained` made inside `planned`.
        plan: What it noted.
        device: Where buffers are, and parameters when they are there.

    Attributes:
        model: The model, in evaluation mode.
        device: As above.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, device: torch.device | str = "cpu"):
        self.model = model
        self.device = torch.device(device)
        self._plan = plan
        self._names = list(model.state_dict())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        by_name = {name: (source, name) for source in plan.sources for name in source.names}
        loaded = {
            id(self._parameters[name]): by_name[name]
            for name in by_name
            if name in self._parameters
        }
        tied = {
            name: loaded[id(each)] for name, each in self._parameters.items() if id(each) in loaded
        }
        self._stored: dict[str, tuple[Source, str]] = by_name | tied
        """For each tensor that the checkpoint holds, what it comes of and what it is called there."""
        for name in self._names:
            if name in self._stored and name not in self._parameters:
                _set_buffer(model, name, self[name])
        for name, buffer in model.named_buffers():
            _set_buffer(model, name, buffer.to(self.device))
        for name in set(self._parameters) - set(
            self._stored
        ):  # which transformers has made by itself
            _swap(self._parameters[name], self._parameters[name].detach().to(self.device))

    def __getitem__(self, name: str) -> Tensor:
        """One tensor as the checkpoint has it, on the CPU, for the caller to keep.

        Raises:
            KeyError: If the model has none of that name.
            ModelError: If its file cannot be read.
        """
        if name not in self._stored:
            if name not in self._names:
                raise KeyError(name)
            return self.model.state_dict()[name].cpu()
        source, stored = self._stored[name]
        with torch.inference_mode(False), torch.no_grad():
            return self._checked(stored, self._plan.read(source, self.model)[stored])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def within(self, module: str) -> list[str]:
        """The names of the parameters in a module."""
        return [name for name in self._parameters if name.startswith(f"{module}.")]

    def outside(self, units: Iterable[Unit]) -> list[str]:
        """The names of the parameters in no unit, without those that only the output head has, which no walk reaches.

        Raises:
            ModelError: If a unit shares one with another, or with what is outside: it could not be emptied.
        """
        units = list(units)
        places: dict[int, set[str | None]] = {}
        owner = {name: unit.name for unit in units for name in self.within(unit.name)}
        for name, parameter in self._parameters.items():
            places.setdefault(id(parameter), set()).add(owner.get(name))
            if len(places[id(parameter)]) > 1:
                raise ModelError(
                    f"'{name}' is shared between blocks, or with what is outside them: drop low_memory."
                )
        head = self.model.get_output_embeddings()
        if head is None or any(unit.module is head for unit in units):
            return [name for name in self._parameters if name not in owner]
        alone = {id(parameter) for parameter in head.parameters()}
        alone -= {
            id(p)
            for module in self.model.modules()
            if module is not head
            for p in module._parameters.values()
        }
        return [
            name
            for name, each in self._parameters.items()
            if name not in owner and id(each) not in alone
        ]

    def materialise(self, names: Iterable[str]) -> None:
        """Fill parameters with the checkpoint's values, if they are empty. Buffers always are there.

        Raises:
            ModelError: If a file cannot be read.
        """
        wanted: dict[int, tuple[Source, list[str]]] = {}
        for name in self._emptied(names):
            if self._parameters[name].is_meta:
                source, stored = self._stored[name]
                wanted.setdefault(id(source), (source, []))[1].append(stored)
        with torch.inference_mode(False), torch.no_grad():
            for source, stored_names in wanted.values():
                made = self._plan.read(source, self.model)
                for stored in set(stored_names):
                    _swap(
                        self._parameters[stored],
                        self._checked(stored, made[stored]).to(self.device),
                    )

    def release(self, names: Iterable[str]) -> None:
        """Empty parameters; nothing may hold a view of them."""
        with torch.inference_mode(False), torch.no_grad():
            for name in self._emptied(names):
                if not self._parameters[name].is_meta:
                    _swap(
                        self._parameters[name],
                        torch.empty_like(self._parameters[name], device="meta"),
                    )

    def _emptied(self, names: Iterable[str]) -> list[str]:
        """Those of these that are parameters, and in the checkpoint."""
        return [name for name in names if name in self._stored and name in self._parameters]

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        expected = self.model.get_parameter_or_buffer(name)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ModelError(
                f"'{name}' was read as {tensor.dtype} {tuple(tensor.shape)}, the model has {expected.dtype} "
                f"{tuple(expected.shape)}: the checkpoint was changed meanwhile."
            )
        return tensor


def give_memory_back() -> None:
    """Have the C library give memory back to the system as it is freed, in this process from now on.

    glibc keeps blocks below 32 MB for later, in holes into which what comes next does not fit: a run whose tensors come
    and go block by block then grows with their number, though none of them is kept.
    """
    with suppress(AttributeError):  # other C libraries have no such setting
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)


def trim() -> None:
    """Have the C library give back what was freed: it keeps pieces of megabytes, in gaps where nothing else fits."""
    with suppress(OSError, AttributeError):  # only glibc does that, and can be asked not to
        ctypes.CDLL(None).malloc_trim(0)


def embedding_parameters(model: PreTrainedModel) -> set[int]:
    """The `id` of each parameter of the input embeddings, which only the beginning of a forward needs."""
    embedding = None
    with suppress(NotImplementedError):  # what models of images say
        embedding = model.get_input_embeddings()
    return set() if embedding is None else {id(parameter) for parameter in embedding.parameters()}


def _swap(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter other values, on another device, and leave it the object that it is."""
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def _set_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, own = name.rpartition(".")
    model.get_submodule(module)._buffers[own] = tensor


class Overlaid(Mapping[str, Tensor]):
    """The tensors of a model with the weights of its compressed layers in them, each put together when it is asked for.

    Args:
        tensors: What the model had before, such as `Weights`.
        targets: Every layer that was compressed, by name.
        states: What became of them, read as they are needed: those of one block, then those of another.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        states: Mapping[str, LayerState],
    ):
        self._tensors, self._states = tensors, states
        self._targets: dict[str, list[Target]] = {}
        for target in targets.values():
            self._targets.setdefault(target.parameter_name, []).append(target)

    def __getitem__(self, name: str) -> Tensor:
        targets = self._targets.get(name)
        if targets is None:
            return self._tensors[name]
        whole, parameter = targets[0].whole, targets[0].parameter
        tensor = (
            torch.empty(parameter.shape, dtype=parameter.dtype) if whole else self._tensors[name]
        )
        for target in targets:
            there = dataclasses.replace(target, parameter=nn.Parameter(tensor, requires_grad=False))
            there.write(self._states[target.name].weight)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
