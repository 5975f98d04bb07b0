"""A model in other sizes: what its config then says, and the modules that are made to fit.

A model that was made smaller is a stock model if its class, called with its new config, makes
parameters of the same names and shapes. `resized` makes that model, without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.errors import ModelError
from optimum_order.models.architecture import Block, Experts, Roles
from optimum_order.models.units import Target

Sizes = Mapping[str, Any]
"""New values of config fields, by field."""


def resized(model: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
    """Return the model of another size, without weights, in evaluation mode.

    Args:
        model: The model as it is, on any device; only its class, config and dtype are looked at.
        sizes: New values of config fields.

    Raises:
        ModelError: If the config refuses these values. The message is the config's.
    """
    try:
        config = copy.deepcopy(model.config)
        for field, value in sizes.items():  # a field may stand under another name in the dict
            setattr(config, field, value)
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            made = type(model)(config)
    except Exception as error:  # what a config or a model checks of itself raises anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(lines[-1].strip()[:300]) from error
    smaller: PreTrainedModel = nn.Module.to(made, dtype=model.dtype)
    smaller.eval()
    return smaller


def set_sizes(model: PreTrainedModel, sizes: Sizes) -> None:
    """Write new sizes into the config of a model, in place.

    Args:
        model: The model.
        sizes: New values of config fields.
    """
    for field, value in sizes.items():
        setattr(model.config, field, value)


def mismatch(model: PreTrainedModel, stock: PreTrainedModel) -> str | None:
    """Return how the parameters of a model differ from those that its class makes, or None.

    Args:
        model: A model whose modules were changed.
        stock: From `resized`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    for name in {**shapes, **expected}:
        if shapes.get(name) != expected.get(name):
            return f"'{name}' is {shapes.get(name)}, and the config says {expected.get(name)}"
    return None


def replace_matrix(target: Target, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer another matrix, of any size, and another bias.

    Args:
        target: The layer: all of its parameter.
        weight: (out, in).
        bias: (out,), or None for a layer without a bias, or whose bias stays.
    """
    module = target.module
    stored = weight.T.contiguous() if target.transposed else weight
    _replace(module, target.attribute, stored)
    if bias is not None:
        _replace(module, "bias", bias)
    rows, inputs = weight.shape
    names = {"linear": ("out_features", "in_features"), "conv1d": ("nf", "nx")}
    for name, size in zip(names.get(target.kind, ()), (rows, inputs), strict=False):
        setattr(module, name, size)


def keep_blocks(model: PreTrainedModel, roles: Roles, indices: Sequence[int]) -> None:
    """Remove all other blocks of a model, and number those that remain from 0 on, in place.

    Args:
        model: The model.
        roles: Its roles.
        indices: The blocks that remain, in order.
    """
    blocks = model.get_submodule(roles.blocks[0].name.rpartition(".")[0])
    assert isinstance(blocks, nn.ModuleList)
    remaining = [blocks[index] for index in indices]
    blocks._modules.clear()
    for number, block in enumerate(remaining):
        blocks.append(block)
        for module in block.modules():  # where a cache of keys and values keeps those of a block
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]


def keep_experts(model: PreTrainedModel, block: Block, indices: Tensor) -> None:
    """Remove all other experts of a block, with the rows of the router, in place.

    Args:
        model: The model.
        block: Its MLP is a mixture of experts.
        indices: (k,) int64, the experts that remain.
    """
    mixture = block.mlp
    assert isinstance(mixture, Experts)
    count = len(mixture.experts)
    router = mixture.router.target(model).module
    experts = mixture.experts[0].down.target(model).module
    for module in (router, experts):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and len(parameter) == count:
                _replace(module, name, parameter.data.index_select(0, indices))
    for module in model.get_submodule(block.name).modules():
        for name in ("num_experts", "num_local_experts"):
            if getattr(module, name, None) == count:
                setattr(module, name, len(indices))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    with torch.inference_mode(False):  # its parameters stay ordinary ones
        setattr(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))


def renew_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every module new parameters of its own, in another dtype; shared ones are copied.

    Args:
        model: The model.
        dtype: Of the new parameters.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                _replace(module, name, parameter.data.to(dtype))


class Structure:
    """The modules, parameters and config of a model as they are now, to come back to.

    The values of the parameters are not remembered.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._config = dict(vars(model.config))
        self._modules = [
            (module, dict(module._modules), dict(module._parameters), _sizes(module))
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Put all modules, parameters and sizes back."""
        vars(self._model.config).clear()
        vars(self._model.config).update(self._config)
        for module, modules, parameters, sizes in self._modules:
            module._modules.clear()
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
            vars(module).update(sizes)


def _sizes(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if isinstance(value, int)}
