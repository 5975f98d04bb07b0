"""Which parameters of a model are compressed, and each of them seen as a matrix (out, in).

A model is a sequence of units: the blocks of its outermost `nn.ModuleList`s, and any layer outside
the blocks that the user asked for by name. The targets of a unit are the `nn.Linear`s, GPT-2
`Conv1D`s, single experts of fused 3-D expert parameters and `nn.Conv2d`s inside it; a grouped
convolution is one target for each of its groups. Stems, the output head, norms and routers are left
alone by default, and so are embeddings: `nn.Embedding`s outside the blocks are targets where a
stage names them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.errors import ModelError
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.adapted import adapt
from optimum_order.models.inputs import quantize_inputs
from optimum_order.order import matches

logger = logging.getLogger(__name__)

_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """One layer to compress: an attribute of a module, or a part of it.

    The parameter is looked up at each use, so a target also sees a parameter that was put in place
    of another.

    Args:
        name: `model.layers.0.self_attn.q_proj`; an expert is
            `model.layers.0.mlp.experts.down_proj.3`, a group of a convolution
            `encoder.stages.0.layers.1.convolution.weight.3`.
        kind: "linear", "conv1d", "conv2d", "expert" or "embedding".
        module: The module that has the parameter.
        attribute: The name of the parameter in the module. The parameter is (out, in), (in, out)
            for a Conv1D, (experts, out, in) or (experts, in, out) for experts, (out, in, kh, kw)
            for a convolution.
        transposed: Whether the parameter stores (in, out).
        expert: The index of the expert, or None if the parameter is not one of experts.
        rows: The filters of a group of a convolution, or None for all filters.
    """

    name: str
    kind: str
    module: nn.Module
    attribute: str = "weight"
    transposed: bool = False
    expert: int | None = None
    rows: range | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the module has now."""
        return cast(nn.Parameter, getattr(self.module, self.attribute))

    @property
    def whole(self) -> bool:
        """Whether the layer is all of its parameter."""
        return self.expert is None and self.rows is None

    @property
    def parameter_name(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.name}.{self.attribute}" if self.whole else self.name.rpartition(".")[0]

    @property
    def view(self) -> Tensor:
        """The weight as (out, in), or (out, in * kh * kw), in the memory of the model."""
        return self.matrix_of(self.parameter.data)

    def matrix_of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that is this layer's, sharing memory with the tensor.

        Args:
            tensor: A tensor of the shape of the parameter.

        Returns:
            The weight as (out, in), or (out, in * kh * kw) for a convolution.
        """
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.rows is not None:
            tensor = tensor[self.rows.start : self.rows.stop]
        return tensor.T if self.transposed else tensor.view(len(tensor), -1)

    def read(self) -> Tensor:
        """Return a contiguous copy of the weight, (out, in)."""
        return self.view.clone(memory_format=torch.contiguous_format)

    def shared(self) -> Tensor:
        """Return the weight (out, in) in the model's memory if it lies row by row, else a copy."""
        view = self.view
        return view if view.is_contiguous() else self.read()

    def write(self, weight: Tensor) -> None:
        """Put a weight (out, in) back into the model."""
        self.view.copy_(weight)

    def put(self, state: LayerState) -> None:
        """Put a layer into the model: its weight, the grid of its inputs, and its adapter."""
        self.write(state.weight)
        quantize_inputs(self.module, state.inputs)
        adapt(self.module, state.adapter)

    def plain(self) -> None:
        """Have the module compute with its weight alone, on its input as it is."""
        quantize_inputs(self.module, None)
        adapt(self.module, None)


@dataclass(frozen=True)
class Unit:
    """A block that runs as a whole between two points of calibration.

    Args:
        name: The name of the module in the model.
        module: The module.
        targets: The layers to compress in it, in definition order.
    """

    name: str
    module: nn.Module
    targets: tuple[Target, ...]


def find_units(
    model: nn.Module,
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    *,
    embeddings: Iterable[str] = (),
) -> list[Unit]:
    """Return the units of a model, in definition order.

    Args:
        model: Any transformers model, its weights dense.
        targets: Patterns of the layers to compress: a shell pattern on the full name (`*.q_proj`),
            or a regular expression after `re:`. By default every layer inside the blocks that is
            not a router.
        ignore: Patterns of layers to leave alone; a layer that matches both is left alone.
        embeddings: Patterns that stages name; embeddings are taken where one matches no other
            layer.

    Raises:
        ModelError: If nothing is left to compress, a pattern matches nothing, or a target is tied
            to another weight.
        OrderError: If a pattern cannot be read.
    """
    targets = list(targets or [])
    ignore = list(ignore or [])
    blocks = _blocks(model)

    def inside(name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in blocks)

    every = find_targets(model)
    layers = [layer for layer in every if layer.kind != "embedding"]
    tables = [t for t in every if t.kind == "embedding" and not inside(t.name)]
    named = [p for p in embeddings if not any(matches(layer.name, p) for layer in layers)]
    for pattern in [*targets, *ignore]:
        if any(matches(layer.name, pattern) for layer in layers):
            continue
        if any(matches(table.name, pattern) for table in tables):
            raise ModelError(
                f"The pattern '{pattern}' matches an embedding, and no other layer. An embedding "
                f"is compressed by a stage that names it, such as 'rtn(bits=8, targets={pattern})'."
            )
        names = ", ".join(repr(layer.name) for layer in layers[:3])
        raise ModelError(
            f"The pattern '{pattern}' matches no layer of {type(model).__name__}. Its layers "
            f"are called, for example, {names or 'nothing that can be compressed'}."
        )
    chosen = []
    for layer in layers:
        router = not _ROUTERS.isdisjoint(layer.name.split("."))
        wanted = inside(layer.name) and not router
        if targets:
            wanted = any(matches(layer.name, pattern) for pattern in targets)
        if wanted and not any(matches(layer.name, pattern) for pattern in ignore):
            chosen.append(layer)
    chosen += [t for t in tables if any(matches(t.name, pattern) for pattern in named)]
    for layer in chosen:
        if layer.attribute not in layer.module._parameters:
            raise ModelError(
                f"The weight of layer '{layer.name}' is computed from other tensors: it is pruned "
                "by torch.nn.utils.prune, or parametrized. Make it permanent first, with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no layer to compress. What can be compressed are "
            "nn.Linear, nn.Conv2d, GPT-2 Conv1D and fused expert weights inside the model's "
            f"blocks; it has {len(blocks)} blocks"
            + (
                f", and targets={targets}, ignore={ignore} leave none."
                if targets or ignore
                else "."
            )
        )
    _refuse_tied(model, chosen)
    _warn_of_dense(model, {id(layer.parameter) for layer in layers}, inside)
    units = []
    for name, module in blocks.items():
        within = tuple(layer for layer in chosen if layer.name.startswith(f"{name}."))
        if within:
            units.append(Unit(name, module, within))
    outside: dict[str, list[Target]] = {}
    for layer in chosen:
        if not inside(layer.name):
            # the groups of one convolution run together
            name = layer.name if layer.rows is None else layer.name.rsplit(".", 2)[0]
            outside.setdefault(name, []).append(layer)
    return units + [
        Unit(name, model.get_submodule(name), tuple(group)) for name, group in outside.items()
    ]


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the embedding of the input.

    Args:
        model: The model; it may be empty.

    Raises:
        ModelError: If the model has none that could be compressed.
    """
    module = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        module = model.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        raise ModelError(
            f"{type(model).__name__} has no nn.Embedding of its input: leave out 'embeddings' "
            "(--embeddings)."
        )
    names: list[str] = [name for name, child in model.named_modules() if child is module]
    return names[0]


def find_targets(model: nn.Module) -> list[Target]:
    """Return every layer of a model that could be compressed, in definition order."""
    return [target for name, module in model.named_modules() for target in targets_of(name, module)]


def targets_of(name: str, module: nn.Module) -> list[Target]:
    """Return the layers that one module holds itself, without those of its children.

    Args:
        name: The name of the module in the model.
        module: Any module.
    """
    if isinstance(module, nn.Linear):
        return [Target(name, "linear", module)]
    if isinstance(module, nn.Embedding):
        return [Target(name, "embedding", module)]
    if isinstance(module, hf.Conv1D):
        return [Target(name, "conv1d", module, transposed=True)]
    if isinstance(module, nn.Conv2d) and _is_plain(module) and not _is_depthwise(module):
        if module.groups == 1:
            return [Target(name, "conv2d", module)]
        size = module.out_channels // module.groups
        return [
            Target(f"{name}.weight.{i}", "conv2d", module, rows=range(i * size, (i + 1) * size))
            for i in range(module.groups)
        ]
    transposed = hf.experts_transposed(module)
    if transposed is None:
        return []
    experts = []
    for attribute in _EXPERTS:
        parameter = getattr(module, attribute, None)
        if isinstance(parameter, nn.Parameter) and parameter.dim() == 3:
            experts += [
                Target(f"{name}.{attribute}.{i}", "expert", module, attribute, transposed, i)
                for i in range(len(parameter))
            ]
    return experts


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the elements of the outermost ModuleLists that hold anything to compress."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in blocks
        ):
            for index, element in enumerate(module):
                for block_name, block in _unwrapped(f"{name}.{index}", element):
                    if any(_layers_of(*named) for named in block.named_modules()):
                        blocks[block_name] = block
    return blocks


def _layers_of(name: str, module: nn.Module) -> list[Target]:
    """Return the layers that one module holds itself, but for an embedding."""
    return [target for target in targets_of(name, module) if target.kind != "embedding"]


def _unwrapped(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a block, or the blocks in it where it only wraps a Sequential, as in a ResNet."""
    children = list(module.named_children())
    inner, child = children[0] if len(children) == 1 else ("", None)
    if isinstance(child, nn.Sequential) and all(
        list(block.children()) for block in child
    ):  # not of single layers
        yield from ((f"{name}.{inner}.{index}", block) for index, block in enumerate(child))
    else:
        yield name, module


def _is_plain(module: nn.Conv2d) -> bool:
    # Subclasses may change the weight before its use (standardize it): zeros would not stay.
    return type(module).forward is nn.Conv2d.forward


def _is_depthwise(module: nn.Conv2d) -> bool:
    return module.groups > 1 and module.groups == module.in_channels


def _warn_of_dense(model: nn.Module, understood: set[int], inside: Callable[[str], bool]) -> None:
    """Log the weights inside the blocks that stay dense because of their kind."""
    convolutions = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and inside(name)
    ]
    depthwise = {f"{name}.weight": name for name, module in convolutions if _is_depthwise(module)}
    if depthwise:
        logger.warning(
            "%d depthwise convolutions, such as '%s', stay dense: each of their filters reads a "
            "single channel.",
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


def _refuse_tied(model: nn.Module, chosen: list[Target]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for target in chosen:
        sharing = names.get(id(target.parameter), [])
        if len(sharing) > 1 and target.kind != "embedding":  # a head that is tied goes with it
            raise ModelError(
                f"'{target.name}' shares its weight with {', '.join(sharing[:3])}: compressing one "
                "would change the other. Leave it out with 'ignore', or untie the weights first."
            )
