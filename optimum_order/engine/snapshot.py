"""Results of a run in a file and back, bit for bit: plain safetensors, with what is no tensor as JSON in its header.

A digest of all of it stands there too: a bit that a disk flipped would otherwise become a result. The classes that
may stand in such a file are known here; a name in the file only chooses among them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimum_order.backends import available
from optimum_order.calibration.walk import Crossing
from optimum_order.errors import ArtifactError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState, StageRecord

_KEY, _DIGEST = "snapshot", "sha256"


def save(value: Any, file: Path, *, durable: bool = False) -> int:
    """Write a value by rename, so that the file is whole or not there.

    Args:
        value: Of dataclasses known here, dicts with string keys, sequences, tensors, dtypes and plain values.
        file: Its folder exists.
        durable: Whether it is to be on the disk on return, should the machine stop.

    Returns:
        How many bytes the file has.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(value, tensors), separators=(",", ":"))
    held: set[int] = set()
    for key, tensor in tensors.items():  # safetensors takes no shared memory
        if (memory := tensor.untyped_storage().data_ptr()) in held:
            tensors[key] = tensor.clone()
        held.add(memory)
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, beside, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
        if durable:
            _sync(beside)
        os.replace(beside, file)
        if durable:
            _sync(file.parent)
    finally:
        beside.unlink(missing_ok=True)
    return file.stat().st_size


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def load(file: Path, device: str = "cpu") -> Any:
    """The value again, its tensors on `device`; sequences come back as tuples.

    Raises:
        ArtifactError: If the file is damaged or not one of ours.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (a handle is no mapping)
        if metadata[_DIGEST] != _digest(metadata[_KEY], tensors):
            raise ValueError("its sha256 does not match")

        def read(key: str) -> Tensor:
            return tensors[key].to(
                device, copy=True
            )  # in memory that torch allocated, not in a map of the file

        return _restore(json.loads(metadata[_KEY]), read, _known())
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


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """sha256 of the JSON, then of each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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


def _restore(value: Any, read: Callable[[str], Tensor], known: dict[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_restore(item, read, known) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return read(value["tensor"])
    if "dtype" in value:
        return _DTYPES[value["dtype"]]
    if "dict" in value:
        return {key: _restore(item, read, known) for key, item in value["dict"].items()}
    return known[value["class"]](
        **{key: _restore(item, read, known) for key, item in value["fields"].items()}
    )


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def _known() -> dict[str, type]:
    """Every class that may stand in a snapshot, by name: states, records, and the grids of all backends."""
    available()  # a grid is defined beside its backend
    return {
        cls.__name__: cls
        for cls in (*_parts(LayerState), Packed, StageRecord, Crossing, *_grids(Grid))
    }


def _grids(base: type) -> Iterator[type]:
    grid: type
    for grid in base.__subclasses__():
        yield from _grids(grid)
        if dataclasses.is_dataclass(grid):
            yield from _parts(grid)


def _parts(cls: type) -> Iterator[type]:
    """A dataclass and those its fields are made of."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _parts(typing.cast(type, part))
