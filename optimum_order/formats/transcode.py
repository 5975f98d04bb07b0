"""The layers of a model on the grids of stock formats: the same codes, and the same outputs.

A grid with steps of its own for each column is no grid of a stock format. Its steps are powers of
two: they move into the norm or the layer that makes the input, where no bit of any output changes,
and one scale for each row is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.calibration.folding import Fold, find_folds
from optimum_order.errors import FormatError
from optimum_order.formats.base import Codec, Contents, Layers
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_units


def needs_transcoding(layers: Layers) -> bool:
    """Return whether a layer has steps of its own for its columns."""
    return any(isinstance(state.grid, DualScaleGrid) for state in layers.states.values())


def home(layers: Layers) -> str:
    """Return the name of the format that is made for the grids of layers that need transcoding."""
    return next(
        name
        for name, codec in formats.available().items()
        if any(isinstance(state.grid, codec.made_for) for state in layers.states.values())
    )


def foreseen(contents: Contents) -> Contents:
    """Return what `transcode` would leave, without values; whether steps can move is not asked.

    Args:
        contents: A model, and its layers or outlines of them.
    """
    states = {}
    for name, _, state in contents.layers:
        outlined = formats.outline(state)
        grid = outlined.grid
        if isinstance(grid, DualScaleGrid):
            width = next(bits for bits in Codec.widths if bits >= grid.bits)
            outlined = dataclasses.replace(
                outlined, grid=dataclasses.replace(grid.folded(), bits=width)
            )
        states[name] = outlined
    return dataclasses.replace(contents, layers=Layers(contents.layers.targets, states))


def choose(
    contents: Contents, name: str, *, unproven: bool = False, engine: str | None = None
) -> tuple[Codec, bool]:
    """Return the codec to save a model with, and whether its layers have to be transcoded first.

    Args:
        contents: The model and its layers, or outlines of them.
        name: As `formats.choose` takes it.
        unproven: As `formats.choose` takes it.
        engine: As `formats.choose` takes it.

    Raises:
        FormatError: If no format that is allowed holds the layers, as they are or transcoded.
    """
    if needs_transcoding(contents.layers) and any(
        state.inputs is not None for _, _, state in contents.layers
    ):
        raise FormatError(
            "No format holds layers on the grid of ecsq whose inputs are rounded: to move the "
            "steps of columns would change what is rounded. Use gptq or rtn in place of ecsq."
        )
    try:
        return formats.choose(contents, name, unproven=unproven, engine=engine), False
    except FormatError:
        if not needs_transcoding(contents.layers):
            raise
    _refuse_adapters(contents.layers)
    codec = formats.choose(foreseen(contents), name, unproven=unproven, engine=engine)
    return codec, True


def transcode(
    model: PreTrainedModel, layers: Layers, widths: Sequence[int] = Codec.widths
) -> Layers:
    """Return the layers with one scale for each row; what makes their inputs is multiplied.

    Args:
        model: It holds the weights of the layers, and is changed with them.
        layers: All layers that are compressed.
        widths: Widths that kernels run, the narrowest first; a layer gets the first that holds its
            codes. 8 is one of them.

    Returns:
        The layers. `W[i, j]` is now what it was times a power of two of column j and of row i.

    Raises:
        FormatError: If the steps of a layer have no place to move to, or a layer has an adapter.
    """
    _refuse_adapters(layers)
    states = dict(layers.states)
    for fold in find_folds(model, find_units(model), _sample(model)):
        readers = [target.name for target in fold.readers if target.name in states]
        grids = [states[name].grid for name in readers]
        exponents = [grid.exponent for grid in grids if isinstance(grid, DualScaleGrid)]
        if not any(exponent.any() for exponent in exponents):
            continue
        exponent = exponents[0].cpu()
        alike = all(torch.equal(exponent, other.cpu()) for other in exponents[1:])
        if len(exponents) == len(fold.readers) and alike and fold.holds(exponent):
            _move(fold, exponent, states)
    rows = {name: _with_rows_alone(name, state, widths) for name, state in states.items()}
    for name, state in rows.items():
        layers.targets[name].put(state)
    return Layers(layers.targets, rows)


def _refuse_adapters(layers: Layers) -> None:
    """Refuse layers with adapters: these read inputs whose columns would be multiplied.

    Raises:
        FormatError: If there is one.
    """
    if any(state.adapter is not None for _, _, state in layers):
        raise FormatError(
            "Layers on the grid of ecsq that have an adapter are stored as 'coded' or 'dense' "
            "alone: to move the steps of columns would change what the adapter reads."
        )


def _move(fold: Fold, exponent: Tensor, states: dict[str, LayerState]) -> None:
    """Take powers of two out of the columns of the readers, in the states and in the model."""
    fold.multiply(exponent)
    for target in fold.readers:
        state = states[target.name]
        assert isinstance(state.grid, DualScaleGrid)
        grid = dataclasses.replace(state.grid, exponent=torch.zeros_like(state.grid.exponent))
        weight = torch.ldexp(state.weight, -exponent.int())
        states[target.name] = dataclasses.replace(state, weight=weight, grid=grid)
    if fold.writer is not None and fold.writer.name in states:
        states[fold.writer.name] = _scaled(states[fold.writer.name], fold.of_rows(exponent))


def _scaled(state: LayerState, exponent: Tensor) -> LayerState:
    """Return a layer whose rows are multiplied by powers of two, (out,)."""
    grid = state.grid
    powers = exponent.int()[:, None]
    if isinstance(grid, (DualScaleGrid, UniformGrid)):
        grid = dataclasses.replace(grid, scale=torch.ldexp(grid.scale, powers))
    return dataclasses.replace(state, weight=torch.ldexp(state.weight, powers), grid=grid)


def _with_rows_alone(name: str, state: LayerState, widths: Sequence[int]) -> LayerState:
    """Return a layer on a uniform grid of rows, of the first width that holds its codes.

    Raises:
        FormatError: If columns still have steps of their own.
    """
    grid = state.grid
    if not isinstance(grid, DualScaleGrid):
        return state
    if grid.exponent.any():
        raise FormatError(
            f"Layer '{name}' has steps of its own for its columns, and nothing before the layer "
            "can take them: no stock format holds it. Keep the format 'coded', or compress with "
            "ecsq(columns=false)."
        )
    codes = grid.quantize(state.weight)
    low, high = (int(end) for end in codes.aminmax())
    width = next(bits for bits in widths if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
    uniform = dataclasses.replace(grid.folded(), bits=width)
    return dataclasses.replace(state, grid=uniform)


def _sample(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return arguments of a forward."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        side = (size, size) if isinstance(size, int) else tuple(size)
        generator = torch.Generator().manual_seed(0)
        channels = getattr(config, "num_channels", 3)
        return {
            "pixel_values": torch.randn(1, channels, *side, generator=generator).to(model.dtype)
        }
    return {"input_ids": torch.arange(16)[None] % config.get_text_config().vocab_size}
