"""Which parameters of a model are compressed, and each of them seen as a matrix (out, in).

A model is a sequence of units: the blocks of its outermost `nn.ModuleList`s, and any layer outside them that the
user asked for by name. A unit's targets are the `nn.Linear`s, GPT-2 `Conv1D`s, single experts of fused 3-D expert
parameters and `nn.Conv2d`s inside it, a grouped convolution being one target for each of its groups. Embeddings,
stems, the output head, norms and routers are left alone by default.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_order.errors import ModelError

logger = logging.getLogger(__name__)

_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """One layer to compress.

    Args:
        name: `model.layers.0.self_attn.q_proj`; an expert is `model.layers.0.mlp.experts.down_proj.3`, a group of a
            convolution `encoder.stages.0.layers.1.convolution.weight.3`.
        kind: "linear", "conv1d", "conv2d" or "expert".
        parameter: The tensor that holds the weight: (out, in), (in, out) for a Conv1D, (experts, out, in) or
            (experts, in, out) for experts, (out, in, kh, kw) for a convolution.
        transposed: Whether the parameter stores (in, out).
        expert: Which slice of the parameter, or None if it is all of it.
        rows: Which filters of the parameter a group of a convolution has, or None if it has all.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    transposed: bool = False
    expert: int | None = None
    rows: range | None = None

    @property
    def whole(self) -> bool:
        """Whether the layer is all that its parameter holds."""
        return self.expert is None and self.rows is None

    @property
    def parameter_name(self) -> str:
        """What the parameter is called in the model."""
        return f"{self.name}.weight" if self.whole else self.name.rpartition(".")[0]

    @property
    def view(self) -> Tensor:
        """The weight as (out, in), or (out, in * kh * kw) for a convolution, sharing memory with the model."""
        tensor = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        if self.rows is not None:
            tensor = tensor[self.rows.start : self.rows.stop]
        return tensor.T if self.transposed else tensor.view(len(tensor), -1)

    def read(self) -> Tensor:
        """A contiguous copy of the weight, (out, in)."""
        return self.view.clone(memory_format=torch.contiguous_format)

    def shared(self) -> Tensor:
        """The weight (out, in) in the model's own memory if it lies there row by row, else a copy."""
        view = self.view
        return view if view.is_contiguous() else self.read()

    def write(self, weight: Tensor) -> None:
        """Put a weight (out, in) back into the model."""
        self.view.copy_(weight)


@dataclass(frozen=True)
class Unit:
    """A block that runs as a whole between two points of calibration, with its targets in definition order."""

    name: str
    module: nn.Module
    targets: tuple[Target, ...]


def find_units(
    model: nn.Module, targets: Iterable[str] | None = None, ignore: Iterable[str] | None = None
) -> list[Unit]:
    """The units of a model, in definition order.

    Args:
        model: Any transformers model, its weights dense.
        targets: Patterns of the layers to compress: a shell pattern on the full name (`*.q_proj`), or a regular
            expression after `re:`. By default every layer inside the blocks that is not a router.
        ignore: Patterns of layers to leave alone, which win.

    Raises:
        ModelError: If nothing is left to compress, a pattern matches nothing or cannot be read, or a target is tied
            to another weight.
    """
    targets, ignore = list(targets or []), list(ignore or [])
    layers = find_targets(model)
    blocks = _blocks(model)

    def inside(name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in blocks)

    for pattern in [*targets, *ignore]:
        if not any(_matches(target.name, [pattern]) for target in layers):
            raise ModelError(
                f"The pattern '{pattern}' matches no layer of {type(model).__name__}. Its layers are called, for "
                f"example, {', '.join(repr(t.name) for t in layers[:3]) or 'nothing that can be compressed'}."
            )
    chosen = []
    for target in layers:
        router = not _ROUTERS.isdisjoint(target.name.split("."))
        wanted = _matches(target.name, targets) if targets else inside(target.name) and not router
        if wanted and not _matches(target.name, ignore):
            chosen.append(target)
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no layer to compress. What can be compressed are nn.Linear, nn.Conv2d, GPT-2 "
            f"Conv1D and fused expert weights inside the model's blocks; it has {len(blocks)} blocks"
            + (
                f", and targets={targets}, ignore={ignore} leave none."
                if targets or ignore
                else "."
            )
        )
    _refuse_tied(model, chosen)
    _warn_of_dense(model, {id(target.parameter) for target in layers}, inside)
    units = []
    for name, module in blocks.items():
        within = tuple(target for target in chosen if target.name.startswith(f"{name}."))
        if within:
            units.append(Unit(name, module, within))
    outside: dict[str, list[Target]] = {}
    for target in chosen:
        if not inside(target.name):
            # the groups of one convolution run together
            outside.setdefault(
                target.name.rsplit(".", 0 if target.rows is None else 2)[0], []
            ).append(target)
    return units + [
        Unit(name, model.get_submodule(name), tuple(found)) for name, found in outside.items()
    ]


def find_targets(model: nn.Module) -> list[Target]:
    """Every layer of a model that could be compressed, in definition order."""
    return [
        target for name, module in model.named_modules() for target in _targets_of(name, module)
    ]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost ModuleLists that hold anything to compress."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in blocks
        ):
            for index, element in enumerate(module):
                for block_name, block in _unwrapped(f"{name}.{index}", element):
                    if any(_targets_of(n, m) for n, m in block.named_modules()):
                        blocks[block_name] = block
    return blocks


def _unwrapped(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block, or the blocks in it where it is only a wrapper around a Sequential, as the stages of a ResNet are."""
    children = list(module.named_children())
    inner, child = children[0] if len(children) == 1 else ("", None)
    if isinstance(child, nn.Sequential) and all(
        list(block.children()) for block in child
    ):  # not of single layers
        yield from ((f"{name}.{inner}.{index}", block) for index, block in enumerate(child))
    else:
        yield name, module


def _targets_of(name: str, module: nn.Module) -> list[Target]:
    if isinstance(module, nn.Linear):
        return [Target(name, "linear", cast(nn.Parameter, module.weight))]
    if isinstance(module, Conv1D):
        return [Target(name, "conv1d", cast(nn.Parameter, module.weight), transposed=True)]
    if isinstance(module, nn.Conv2d) and _is_plain(module) and not _is_depthwise(module):
        parameter, size = cast(nn.Parameter, module.weight), module.out_channels // module.groups
        if module.groups == 1:
            return [Target(name, "conv2d", parameter)]
        return [
            Target(f"{name}.weight.{i}", "conv2d", parameter, rows=range(i * size, (i + 1) * size))
            for i in range(module.groups)
        ]
    found = []
    # transformers' own mark on every module of fused experts, and how their matrices lie
    if isinstance(transposed := getattr(module, "is_transposed", None), bool):
        for parameter_name in _EXPERTS:
            parameter = getattr(module, parameter_name, None)
            if isinstance(parameter, nn.Parameter) and parameter.dim() == 3:
                found += [
                    Target(f"{name}.{parameter_name}.{i}", "expert", parameter, transposed, i)
                    for i in range(len(parameter))
                ]
    return found


def _is_plain(module: nn.Conv2d) -> bool:
    # Subclasses may do something to the weight first, such as standardise it: zeros would not stay zeros.
    return type(module).forward is nn.Conv2d.forward


def _is_depthwise(module: nn.Conv2d) -> bool:
    return module.groups > 1 and module.groups == module.in_channels


def _warn_of_dense(model: nn.Module, understood: set[int], inside: Callable[[str], bool]) -> None:
    """Name the weights inside the blocks that stay dense because of what they are."""
    convolutions = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and inside(name)
    ]
    depthwise = {f"{name}.weight": name for name, module in convolutions if _is_depthwise(module)}
    if depthwise:
        logger.warning(
            "%d depthwise convolutions, such as '%s', stay dense: each of their filters reads a single channel.",
            len(depthwise),
            next(iter(depthwise.values())),
        )
    for name, parameter in model.named_parameters():
        if (
            parameter.ndim > 2
            and id(parameter) not in understood
            and name not in depthwise
            and inside(name)
        ):
            logger.warning(
                "'%s' %s is not one of the layers understood here and stays dense.",
                name,
                tuple(parameter.shape),
            )


def _matches(name: str, patterns: list[str]) -> bool:
    return any(
        _regex(pattern).fullmatch(name)
        if pattern.startswith("re:")
        else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise ModelError(
            f"'{pattern}' is not a regular expression after 're:': {error}."
        ) from error


def _refuse_tied(model: nn.Module, chosen: list[Target]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for target in chosen:
        sharing = names.get(id(target.parameter), [])
        if len(sharing) > 1:
            raise ModelError(
                f"'{target.name}' shares its weight with {', '.join(sharing[:3])}: compressing one would change the "
                "other. Leave it out with 'ignore', or untie the weights first."
            )
