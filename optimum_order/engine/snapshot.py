"""Results of a run in a file and back, bit for bit: safetensors, the rest as JSON in the header.

The header holds a digest of everything: a bit that a disk flipped would otherwise become a result.
The classes that may stand in such a file are known here; a name in the file only chooses one.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimum_order import files
from optimum_order.engine import recipe
from optimum_order.engine.reshape import Change
from optimum_order.errors import ArtifactError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState, StageRecord, tensor_bytes

_KEY = "snapshot"
_DIGEST = "sha256"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def save(value: Any, file: Path, *, durable: bool = False) -> int:
    """Write a value, so that the file is whole or absent.

    Args:
        value: Made of dataclasses known here, dicts with string keys, sequences, tensors, dtypes
            and plain values.
        file: Its folder exists.
        durable: Whether the file must survive a stop of the machine from then on.

    Returns:
        The size of the file in bytes.
    """
    text, tensors = flat(value)
    memory: set[int] = set()
    for key, tensor in tensors.items():  # safetensors takes no shared memory
        address = tensor.untyped_storage().data_ptr()
        if address in memory:
            tensors[key] = tensor.clone()
        memory.add(address)
    with files.atomic(file, durable=durable) as partial:
        save_file(tensors, partial, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
    return file.stat().st_size


def flat(value: Any) -> tuple[str, dict[str, Tensor]]:
    """Return a value as JSON and the tensors that the JSON names, on the CPU.

    Args:
        value: As `save` takes it.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_flatten(value, tensors), separators=(",", ":")), tensors


def restored(text: str, tensors: Mapping[str, Tensor], device: str = "cpu") -> Any:
    """Return the value that `flat` took apart; sequences come back as tuples.

    Args:
        text: The JSON.
        tensors: The tensors by name.
        device: Where they go.
    """
    return _restore(json.loads(text), lambda key: tensors[key].to(device), _classes())


def load(file: Path, device: str = "cpu") -> Any:
    """Read a value again; sequences come back as tuples.

    Args:
        file: From `save`.
        device: Where tensors go.

    Raises:
        ArtifactError: If the file is damaged or not one of ours.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            names = list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        if metadata[_DIGEST] != _digest(metadata[_KEY], tensors):
            raise ValueError("its sha256 does not match")

        def read(key: str) -> Tensor:
            # A copy is in memory that torch allocated, not in a map of the file.
            tensor: Tensor = tensors[key].to(device, copy=True)
            return tensor

        return _restore(json.loads(metadata[_KEY]), read, _classes())
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ArtifactError(f"'{file}' is damaged or no snapshot: {error}. Delete it.") from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the JSON, then of each tensor's name, dtype, shape and bytes."""

    def parts() -> Iterator[str | memoryview]:
        yield text
        for key, tensor in sorted(tensors.items()):
            yield f"{key} {tensor.dtype} {tuple(tensor.shape)}"
            yield tensor_bytes(tensor)

    return files.digest(parts())


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, tensors) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, tensors) for key, item in value.items()}}
    fields = {
        field.name: _flatten(getattr(value, field.name), tensors)
        for field in dataclasses.fields(value)
    }
    return {"class": type(value).__name__, "fields": fields}


def _restore(value: Any, read: Callable[[str], Tensor], classes: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_restore(item, read, classes) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return read(value["tensor"])
    if "dtype" in value:
        return _DTYPES[value["dtype"]]
    if "dict" in value:
        return {key: _restore(item, read, classes) for key, item in value["dict"].items()}
    fields = {key: _restore(item, read, classes) for key, item in value["fields"].items()}
    return classes[value["class"]](**fields)


def _classes() -> dict[str, type]:
    """Return every class that may stand in a snapshot, by name."""
    recipe.available()  # imports other people's grids, which are defined beside their backends
    classes = (*_parts(LayerState), Packed, StageRecord, Change, *_grids(Grid))
    return {cls.__name__: cls for cls in classes}


def _grids(base: type) -> Iterator[type]:
    grid: type
    for grid in base.__subclasses__():
        yield from _grids(grid)
        if dataclasses.is_dataclass(grid):
            yield from _parts(grid)


def _parts(cls: type) -> Iterator[type]:
    """Yield a dataclass and those that its fields are made of."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _parts(typing.cast(type, part))
