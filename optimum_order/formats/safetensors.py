"""The `safetensors` container: config.json and safetensors files, as stock transformers has them.

A folder holds what stock `save_pretrained` would write, under the names that checkpoints of the
architecture have, with encoded tensors in place of the dense ones. It is written a block at a time:
no more of the model has to be in memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimum_order.errors import ArtifactError, InvariantError
from optimum_order.files import INDEX, SINGLE, read_json, weight_files
from optimum_order.formats import available
from optimum_order.formats.base import Codec, Container, Contents, Layers, Written, outline
from optimum_order.formats.layout import Piece, as_matrix, blocks
from optimum_order.formats.older import with_older_keys
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.quantizer import encoding

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "F8_E4M3")
"""Allowed dtypes of a layer's tensors, as safetensors names them: torch cannot use all others."""
_CONFIG = "config.json"


class Safetensors(Container):
    """config.json and one or several safetensors files, which stock `from_pretrained` loads."""

    name = "safetensors"
    patterns = ("*.safetensors",)

    def write(
        self,
        contents: Contents,
        codec: Codec,
        folder: Path,
        *,
        header: Mapping[str, str],
        max_shard_size: str = "5GB",
    ) -> Written:
        model = contents.model
        for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
            stale.unlink(missing_ok=True)
        model.save_pretrained(folder, state_dict={})  # all but the weights
        dense = hf.tensors_to_save(model)
        on_meta = {name: torch.empty_like(t, device="meta") for name, t in dense.items()}
        on_disk = frozenset(hf.to_checkpoint(model, on_meta))
        missing = set(on_disk)
        limit = convert_file_size_to_int(max_shard_size)
        if contents.tensors is not None:  # then hold two blocks at most
            sizes = [sum(dense[name].nbytes for name in block) for block in blocks(dense)]
            limit = min(limit, max(sizes))
        shards = _Shards(folder, limit, header)
        encoder = _Encoder(contents, codec)
        values = dense if contents.tensors is None else contents.tensors
        for block in blocks(dense):
            # No name for the whole block: it must be gone when the next one is read.
            for key, tensor in hf.to_checkpoint(model, {n: values[n] for n in block}).items():
                if key not in missing:
                    raise InvariantError(f"'{key}' is not what transformers would save, or twice.")
                missing.remove(key)
                shards.add(encoder.encode(key, tensor) or {key: tensor})
        for key in contents.unloaded:
            if key in on_disk:
                raise InvariantError(f"'{key}' is loaded by the model, and was to be copied.")
            shards.add({key: contents.unloaded[key]})
        missing |= encoder.missing
        if missing:
            raise InvariantError(f"'{min(missing)}' is missing from what transformers would save.")
        shards.close({"total_parameters": model.num_parameters()})
        layers = Layers(contents.layers.targets, encoder.outlines)
        config = with_older_keys(read_json(folder / _CONFIG), model.config)
        entry = codec.quantization_config(contents.layout, layers)
        if entry is not None:
            config["quantization_config"] = entry
        _dump_json(folder / _CONFIG, config)
        return Written(encoder.stored, encoder.bytes)

    def read(
        self, folder: Path, layers: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[str, LayerState]]:
        with ExitStack() as files:
            checkpoint = _Checkpoint(folder, files)
            for layer in checkpoint.matrices() if layers is None else layers:
                try:
                    state = checkpoint.layer(layer, layers and layers[layer])
                except ArtifactError as error:
                    raise ArtifactError(f"Layer '{layer}' in {folder}: {error}.") from error
                yield layer, state

    def plain(self, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
        with ExitStack() as files:
            checkpoint = _Checkpoint(folder, files)
            encoded = {prefix for prefix in checkpoint.parts if not checkpoint.is_plain(prefix)}
            parts = {
                f"{prefix}.{local}" for prefix in encoded for local in checkpoint.parts[prefix]
            }
            tensors = {
                key: shard.get_tensor(key)
                for key, shard in checkpoint.shards.items()
                if key not in parts
            }
            return tensors, {f"{prefix}.weight" for prefix in encoded}

    def header(self, file: Path) -> dict[str, str]:
        with _open(file) as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            return metadata


# Writing


class _Encoder:
    """Encodes the layers of a model, each once, as the stored tensors that hold them come by.

    Args:
        contents: The model and its layers.
        codec: The codec.

    Attributes:
        stored: As in `Written`.
        outlines: The layers that were encoded, without values.
    """

    def __init__(self, contents: Contents, codec: Codec):
        self._layers = contents.layers
        self._codec = codec
        self._compare = contents.tensors is None  # those tensors were made from the states
        self.stored: dict[str, Any] = {}
        self.outlines: dict[str, LayerState] = {}
        self._plain: dict[str, int] = {}
        self._encoded = 0
        self._places: dict[str, list[tuple[str, Piece]]] = {}
        for name in self._layers.states:  # without a look at a state
            target = self._layers.targets[name]
            pieces = contents.layout.pieces(target)
            if not pieces:
                raise InvariantError(
                    f"Layer '{name}' is stored in a way that this package cannot follow."
                )
            for piece in pieces:
                self._places.setdefault(piece.key, []).append((name, piece))
            keys = [(piece.key, piece.whole) for piece in pieces]
            if target.transposed or keys != [(f"{name}.weight", True)]:
                rows = [[piece.key, piece.at, piece.rows] for piece in pieces]
                self.stored[name] = {"rows": rows, "transposed": target.transposed}

    @property
    def missing(self) -> set[str]:
        """The stored tensors that hold a layer and have not come by."""
        return set(self._places)

    @property
    def bytes(self) -> int:
        """Bytes of all layers."""
        return self._encoded + sum(self._plain.values())

    def encode(self, key: str, dense: Tensor) -> dict[str, Tensor]:
        """Return what to store in place of a dense tensor; empty if it stays.

        Args:
            key: Name of the stored tensor.
            dense: The tensor.

        Raises:
            InvariantError: If the tensor does not hold the weights of its layers.
        """
        encoded: dict[str, Tensor] = {}
        for name, piece in self._places.pop(key, []):
            state = self._layers.states[name]
            matrix = state.weight.T if self._layers.targets[name].transposed else state.weight
            rows = slice(piece.start, piece.start + piece.rows)
            at = slice(piece.at, piece.at + piece.rows)
            if self._compare and not _equal(as_matrix(dense)[at], matrix[rows]):
                raise InvariantError(f"The model does not hold the weight that layer '{name}' has.")
            if not self._codec.encodes(state):
                self._plain[name] = state.weight.nbytes
                continue
            part = state if piece.rows == len(matrix) else _take(state, rows)
            for local, tensor in self._codec.encode(part).items():
                encoded[key.removesuffix("weight") + local] = tensor.cpu().contiguous()
            self.outlines[name] = outline(state)
        self._encoded += sum(tensor.nbytes for tensor in encoded.values())
        return encoded


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two matrices are equal; one that is the other's memory is not looked at."""
    same_place = one.device == other.device and one.data_ptr() == other.data_ptr()
    if same_place and one.shape == other.shape and one.stride() == other.stride():
        return True
    return torch.equal(one.cpu(), other.cpu())


def _take(state: LayerState, rows: slice) -> LayerState:
    """Return some rows of a layer as a layer."""
    return dataclasses.replace(
        state,
        weight=state.weight[rows],
        pruned=None if state.pruned is None else state.pruned[rows],
        grid=None if state.grid is None else state.grid.take(rows),
    )


class _Shards:
    """Weight files that are filled one after the other, and named when their number is known.

    Args:
        folder: Where they go.
        limit: Most bytes of tensors in a file, unless a single tensor has more.
        header: The metadata of each file.
    """

    def __init__(self, folder: Path, limit: int, header: Mapping[str, str]):
        self._folder = folder
        self._limit = limit
        self._header = header
        self._tensors: dict[str, Tensor] = {}
        self._size = 0
        self._total = 0
        self._files: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that go into one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._size + size > self._limit:
            self._write()
        self._tensors |= {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self._size += size

    def _write(self) -> None:
        file = self._folder / _unfinished(len(self._files))
        save_file(self._tensors, file, metadata={**self._header, "format": "pt"})
        _settle(file)
        self._files.append(list(self._tensors))
        self._total += self._size
        self._tensors = {}
        self._size = 0

    def close(self, metadata: dict[str, Any]) -> None:
        """Give the files their names, and write the index if there are several.

        Args:
            metadata: What the index says besides the total size.
        """
        self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._files):
            name = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._folder / _unfinished(number), self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": metadata | {"total_size": self._total}, "weight_map": weight_map}
            _dump_json(self._folder / INDEX, index)


def _settle(file: Path) -> None:
    """Sort the metadata in a file's header: equal runs must be equal, and safetensors does not."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise InvariantError(f"'{file}' has a header that is not written as compact JSON.")
        opened.seek(8)
        opened.write(text)


def _unfinished(number: int) -> str:
    return f"model-{number + 1:05d}.new"


def _dump_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Reading


class _Checkpoint:
    """The open shards of one folder, and which of their tensors belong together.

    Args:
        folder: The folder.
        files: Closes the shards.

    Raises:
        ArtifactError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, files: ExitStack):
        self.config = read_json(folder / _CONFIG)
        entry = self.config.get("quantization_config")
        name = "dense" if entry is None else None
        if isinstance(entry, dict):
            name = encoding(entry)
        if not isinstance(name, str) or name not in available():
            raise ArtifactError(
                f"{folder / _CONFIG} names the quantization {name!r}, which is none of "
                f"{', '.join(available())}."
            )
        self.codec: Codec = available()[name]()
        self.shards: dict[str, Any] = {}
        self.parts: dict[str, set[str]] = {}
        locals_ = sorted({"weight", *self.codec.tensors}, key=len, reverse=True)
        places: dict[str, str] = {}
        for shard in weight_files(folder):
            opened = files.enter_context(_open(folder / shard))
            for key in opened.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if key in self.shards:
                    raise ArtifactError(f"{folder} holds the tensor '{key}' twice.")
                self.shards[key] = opened
                places[key] = shard
                local = next((local for local in locals_ if key.endswith(f".{local}")), None)
                if local is not None:
                    self.parts.setdefault(key.removesuffix(f".{local}"), set()).add(local)
        # Others go by the index alone, and would load random weights for what it does not list.
        if (folder / INDEX).exists() and places != read_json(folder / INDEX)["weight_map"]:
            raise ArtifactError(
                f"{folder / INDEX} says of a tensor that it is in another file than it is."
            )

    def matrices(self) -> list[str]:
        """Return the prefixes of everything that is encoded or is a matrix called `weight`."""
        return [
            prefix
            for prefix in self.parts
            if not self.is_plain(prefix) or len(self._slice(f"{prefix}.weight").get_shape()) == 2
        ]

    def layer(self, name: str, stored: Any) -> LayerState:
        """Return one layer.

        Args:
            name: Name of the layer.
            stored: Its entry in `Written.stored`, which nobody has checked, or None.

        Raises:
            ArtifactError: If the layer cannot be put together.
        """
        if stored is None:
            return self._part(name, name)
        unreadable = ArtifactError("the list of its rows cannot be read")
        listed = stored.get("rows") if isinstance(stored, dict) else None
        if not isinstance(listed, list) or not listed:
            raise unreadable
        parts = []
        taken: dict[str, list[tuple[int, int]]] = {}
        for row in listed:
            if not (isinstance(row, list) and [type(item) for item in row] == [str, int, int]):
                raise unreadable
            key, first, count = row
            last = first + count
            others = taken.setdefault(key, [])
            # Rows that overlap could be listed without end, and make much out of a small file.
            overlap = any(begin < last and first < end for begin, end in others)
            if first < 0 or count < 1 or overlap:
                raise unreadable
            others.append((first, last))
            prefix = key.removesuffix(".weight")
            if key not in self.shards or (prefix in self.parts and not self.is_plain(prefix)):
                parts.append(self._part(prefix, name))
                continue
            tensor = self._tensor(key)
            if tensor.ndim < 2 or not tensor.numel():
                raise ArtifactError(f"'{key}' is no matrix")
            rows = as_matrix(tensor)[first:last]
            if stored.get("transposed") is True:
                rows = rows.T.contiguous()
            parts.append(LayerState(rows))
        return parts[0] if len(parts) == 1 else _stack(parts)

    def _part(self, prefix: str, name: str) -> LayerState:
        """Decode the tensors under one prefix.

        Args:
            prefix: Their common prefix.
            name: Name of the layer that they belong to.
        """
        parts = self.parts.get(prefix)
        if parts is None:
            raise ArtifactError("there is no such tensor")
        tensors = {local: self._tensor(f"{prefix}.{local}") for local in parts}
        if self.is_plain(prefix):
            return available()["dense"]().decode(tensors, {})
        return self.codec.decode(tensors, self.codec.scheme_in(self.config, (name, prefix)))

    def is_plain(self, prefix: str) -> bool:
        """Return whether these parts are a weight as it is, not codes under its name."""
        if self.parts[prefix] != {"weight"}:
            return False
        return "F" in self._slice(f"{prefix}.weight").get_dtype()

    def _tensor(self, key: str) -> Tensor:
        if (dtype := self._slice(key).get_dtype()) not in _DTYPES:
            raise ArtifactError(
                f"'{key}' is of type {dtype}, which must be one of {', '.join(_DTYPES)}"
            )
        tensor: Tensor = self.shards[key].get_tensor(key)
        return tensor

    def _slice(self, key: str) -> Any:
        return self.shards[key].get_slice(key)


def _stack(parts: list[LayerState]) -> LayerState:
    """Return a layer made of parts, the first rows first.

    Raises:
        ArtifactError: If the parts do not fit together.
    """
    if len({(part.weight.shape[1], part.weight.dtype) for part in parts}) > 1:
        raise ArtifactError("its parts are of different widths or dtypes")
    grids = [part.grid for part in parts if part.grid is not None]
    grid = None
    if grids:
        try:
            grid = grids[0].concat(grids) if len(grids) == len(parts) else None
        except ValueError as error:
            raise ArtifactError(f"its parts lie on different grids: {error}") from error
        if grid is None:
            raise ArtifactError("its parts lie on different grids")
    pruned = None
    if any(part.pruned is not None for part in parts):
        pruned = torch.cat([part.mask for part in parts])
    weight = torch.cat([part.weight for part in parts])
    return LayerState(weight, pruned=pruned, grid=grid, inputs=parts[0].inputs)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}.") from error
