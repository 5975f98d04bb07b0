"""Writing a model with some of its layers encoded, and reading them back: config.json and safetensors, nothing else.

Written is what stock `save_pretrained` would write, under the names that checkpoints of this architecture have, with
the encoded tensors in place of the dense ones. It is done a block at a time: no more of the model has to be there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import ArtifactError, InvariantError
from optimum_order.files import INDEX, SINGLE, read_json, weight_files
from optimum_order.formats import available
from optimum_order.formats.base import Format, Layers, Layout, Piece, as_matrix, blocks, outline
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target, find_targets

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8")
"""What the tensors of a layer may be, in the words of safetensors: torch can do nothing with some of the others."""
_CONFIG = "config.json"


@dataclass(frozen=True)
class Written:
    """What was written of the layers.

    Args:
        stored: What `read` must be told about those that are not simply stored as `<name>.weight`, ready for JSON: the
            rows `[key, first, count]` that a layer consists of, and whether they are its columns.
        bytes: How many bytes they take, all of them together.
    """

    stored: dict[str, Any]
    bytes: int


def write(
    model: PreTrainedModel,
    layers: Layers,
    format: Format,
    folder: str | Path,
    *,
    header: Mapping[str, str],
    max_shard_size: str = "5GB",
    tensors: Mapping[str, Tensor] | None = None,
) -> Written:
    """Save a model so that stock `from_pretrained(folder)` gives it back, its layers held in `format`.

    Args:
        model: The compressed model, every layer's weight in it dense and equal to its state's.
        layers: Every layer that was compressed, by name; their states are asked for block by block.
        format: What `choose` returned for these layers.
        folder: Where to; a config.json and weights in it are replaced.
        header: What every shard says in its safetensors metadata.
        max_shard_size: Of a file of weights, as `save_pretrained` takes it.
        tensors: What is in the model, by name, if it is empty; each is asked for once. Files are then no larger than
            its largest block, so that never more than two blocks are held.

    Raises:
        InvariantError: If the model does not hold the weights that the layers have.
    """
    folder = Path(folder)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
        stale.unlink(missing_ok=True)
    model.save_pretrained(folder, state_dict={})  # all but the weights
    layout = Layout.of(model, tensors)
    stored, places = _places(layout, layers)
    dense = hf.tensors_to_save(model)
    missing = set(
        hf.to_checkpoint(
            model, {n: torch.empty_like(t, device="meta") for n, t in dense.items()}
        )
    )
    limit = convert_file_size_to_int(max_shard_size)
    if tensors is not None:
        limit = min(
            limit, max(sum(dense[name].nbytes for name in block) for block in blocks(dense))
        )
    shards = _Shards(folder, limit, header)
    outlines: dict[str, tuple[Target, LayerState]] = {}
    plain: dict[str, int] = {}
    size = 0
    for block in blocks(dense):
        own = dense if tensors is None else tensors
        for key, tensor in hf.to_checkpoint(model, {name: own[name] for name in block}).items():
            if key not in missing:
                raise InvariantError(f"'{key}' is not what transformers would save, or twice.")
            missing.remove(key)
            found = [(name, *layers[name], piece) for name, piece in places.pop(key, [])]
            encoded = _replace(key, tensor, found, format)
            shards.add(encoded or {key: tensor})
            size += sum(part.nbytes for part in encoded.values())
            for name, target, state, _ in found:
                if format.encodes(state):
                    outlines[name] = target, outline(state)
                else:
                    plain[name] = state.weight.nbytes
    if missing or places:
        raise InvariantError(
            f"'{min(missing | set(places))}' is missing from what transformers would save."
        )
    shards.close({"total_parameters": model.num_parameters()})
    entry = format.quantization_config(layout, outlines)
    if entry is not None:
        _dump_json(folder / _CONFIG, read_json(folder / _CONFIG) | {"quantization_config": entry})
    return Written(stored, size + sum(plain.values()))


def _places(
    layout: Layout, layers: Layers
) -> tuple[dict[str, Any], dict[str, list[tuple[str, Piece]]]]:
    """What to say of the layers that are not simply `<name>.weight`, and which pieces lie in each stored tensor."""
    stored: dict[str, Any] = {}
    places: dict[str, list[tuple[str, Piece]]] = {}
    targets = {target.name: target for target in find_targets(layout.model)}
    for name in layers:  # without a look at their states
        target = targets[name]
        pieces = layout.pieces(name, target)
        if not pieces:
            raise InvariantError(
                f"Layer '{name}' is stored in a way that this package cannot follow."
            )
        for piece in pieces:
            places.setdefault(piece.key, []).append((name, piece))
        if target.transposed or [(piece.key, piece.whole) for piece in pieces] != [
            (f"{name}.weight", True)
        ]:
            rows = [[piece.key, piece.at, piece.rows] for piece in pieces]
            stored[name] = {"rows": rows, "transposed": target.transposed}
    return stored, places


class _Shards:
    """Weight files that are filled one after the other, and named when it is known how many there are.

    Args:
        folder: Where they go.
        limit: How many bytes of tensors a file has at most, unless a single one has more.
        header: What each says in its metadata.
    """

    def __init__(self, folder: Path, limit: int, header: Mapping[str, str]):
        self._folder, self._limit, self._header = folder, limit, header
        self._tensors: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors that go into one file."""
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
        self._tensors, self._size = {}, 0

    def close(self, metadata: dict[str, Any]) -> None:
        """Give the files their names, and write the index if there are several."""
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
    """Put the metadata in a file's header in order: safetensors writes it in any, and equal runs are to be equal."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        said = json.loads(opened.read(size))
        said["__metadata__"] = dict(sorted(said["__metadata__"].items()))
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise InvariantError(f"'{file}' has a header that is not written as compact JSON.")
        opened.seek(8)
        opened.write(text)


def _unfinished(number: int) -> str:
    return f"model-{number + 1:05d}.new"


def _replace(
    key: str, dense: Tensor, found: list[tuple[str, Target, LayerState, Piece]], format: Format
) -> dict[str, Tensor]:
    """What to store in place of a dense tensor, if anything, after checking that it holds what its layers have."""
    encoded: dict[str, Tensor] = {}
    for name, target, state, piece in found:
        matrix = state.weight.T if target.transposed else state.weight
        held = as_matrix(dense)[piece.at : piece.at + piece.rows]
        if not torch.equal(held, matrix[piece.start : piece.start + piece.rows].cpu()):
            raise InvariantError(f"The model does not hold the weight that layer '{name}' has.")
        if format.encodes(state):
            part = state if piece.rows == len(matrix) else _rows(state, piece)
            prefix = key.removesuffix("weight")
            encoded |= {
                prefix + local: t.cpu().contiguous() for local, t in format.encode(part).items()
            }
    return encoded


def _rows(state: LayerState, piece: Piece) -> LayerState:
    rows = slice(piece.start, piece.start + piece.rows)
    grid = state.grid
    if isinstance(grid, UniformGrid):
        zero = None if grid.zero_point is None else grid.zero_point[rows]
        grid = dataclasses.replace(grid, scale=grid.scale[rows], zero_point=zero)
    pruned = None if state.pruned is None else state.pruned[rows]
    return dataclasses.replace(state, weight=state.weight[rows], pruned=pruned, grid=grid)


def read(
    folder: str | Path, layers: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, LayerState]]:
    """Decode the layers of a saved model, one after the other, from config.json and its safetensors alone.

    Nothing in the folder is trusted: what does not fit together is an error, and no path out of it is followed.

    Args:
        folder: Of the model.
        layers: The layers wanted, each with what `write` returned about it or None; by default every matrix there
            is, by its name in the checkpoint.

    Raises:
        ArtifactError: If a file is missing or damaged, or a layer is not there or cannot be decoded.
    """
    folder = Path(folder)
    with ExitStack() as files:
        checkpoint = _Checkpoint(folder, files)
        for layer in checkpoint.matrices() if layers is None else layers:
            try:
                state = checkpoint.layer(layer, layers and layers[layer])
            except ArtifactError as error:
                raise ArtifactError(f"Layer '{layer}' in {folder}: {error}.") from error
            yield layer, state


def plain(folder: str | Path) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors that are stored as they are, and the names of those that are encoded.

    Raises:
        ArtifactError: If a file is missing or damaged.
    """
    with ExitStack() as files:
        checkpoint = _Checkpoint(Path(folder), files)
        encoded = {prefix for prefix in checkpoint.parts if not checkpoint.is_plain(prefix)}
        belong = {f"{prefix}.{local}" for prefix in encoded for local in checkpoint.parts[prefix]}
        tensors = {
            key: shard.get_tensor(key)
            for key, shard in checkpoint.shards.items()
            if key not in belong
        }
        return tensors, {f"{prefix}.weight" for prefix in encoded}


def header(file: str | Path) -> dict[str, str]:
    """The metadata of one safetensors file; what `write` was given is in there.

    Raises:
        ArtifactError: If the file cannot be read.
    """
    with _open(Path(file)) as opened:
        return opened.metadata() or {}


class _Checkpoint:
    """The open shards of one folder, and which of their tensors belong together."""

    def __init__(self, folder: Path, files: ExitStack):
        self.config = read_json(folder / _CONFIG)
        entry = self.config.get("quantization_config")
        name = (
            "dense"
            if entry is None
            else entry.get("quant_method")
            if isinstance(entry, dict)
            else None
        )
        if not isinstance(name, str) or name not in available():
            raise ArtifactError(
                f"{folder / _CONFIG} names the quantisation {name!r}, which is none of {', '.join(available())}."
            )
        self.format: Format = available()[name]()
        self.shards: dict[str, Any] = {}
        self.parts: dict[str, set[str]] = {}
        locals_ = sorted({"weight", *self.format.tensors}, key=len, reverse=True)
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
        # Others go by the index alone, and would load random weights for what it does not find.
        if (folder / INDEX).exists() and places != read_json(folder / INDEX)["weight_map"]:
            raise ArtifactError(
                f"{folder / INDEX} says of a tensor that it is in another file than it is."
            )

    def matrices(self) -> list[str]:
        """The prefixes of everything that is encoded or is a matrix called `weight`."""
        return [
            p
            for p in self.parts
            if not self.is_plain(p) or len(self._slice(f"{p}.weight").get_shape()) == 2
        ]

    def layer(self, name: str, stored: Any) -> LayerState:
        """One layer, put together from the rows that `stored` lists."""
        if stored is None:
            return self._part(name, name)
        if (
            not isinstance(stored, dict)
            or not isinstance(stored.get("rows"), list)
            or not stored["rows"]
        ):
            raise ArtifactError("the list of its rows cannot be read")
        parts = []
        taken: dict[str, list[tuple[int, int]]] = {}
        for row in stored["rows"]:
            if not (isinstance(row, list) and [type(item) for item in row] == [str, int, int]):
                raise ArtifactError("the list of its rows cannot be read")
            key, first, count = row
            # Rows that overlap could be listed without end, and make much out of a small file.
            if (
                first < 0
                or count < 1
                or any(a < first + count and first < b for a, b in taken.setdefault(key, []))
            ):
                raise ArtifactError("the list of its rows cannot be read")
            taken[key].append((first, first + count))
            prefix = key.removesuffix(".weight")
            if key in self.shards and (prefix not in self.parts or self.is_plain(prefix)):
                tensor = self._tensor(key)
                if tensor.ndim < 2 or not tensor.numel():
                    raise ArtifactError(f"'{key}' is no matrix")
                rows = as_matrix(tensor)[first : first + count]
                parts.append(
                    LayerState(rows.T.contiguous() if stored.get("transposed") is True else rows)
                )
            else:
                parts.append(self._part(prefix, name))
        return parts[0] if len(parts) == 1 else _stack(parts)

    def _part(self, prefix: str, name: str) -> LayerState:
        parts = self.parts.get(prefix)
        if parts is None:
            raise ArtifactError("there is no such tensor")
        tensors = {local: self._tensor(f"{prefix}.{local}") for local in parts}
        if self.is_plain(prefix):
            return available()["dense"]().decode(tensors, {})
        return self.format.decode(tensors, self.format.scheme_in(self.config, (name, prefix)))

    def is_plain(self, prefix: str) -> bool:
        """Whether these parts are a weight as it is, not codes under its name."""
        return (
            self.parts[prefix] == {"weight"} and "F" in self._slice(f"{prefix}.weight").get_dtype()
        )

    def _tensor(self, key: str) -> Tensor:
        if (dtype := self._slice(key).get_dtype()) not in _DTYPES:
            raise ArtifactError(
                f"'{key}' is of type {dtype}, which must be one of {', '.join(_DTYPES)}"
            )
        return self.shards[key].get_tensor(key)

    def _slice(self, key: str) -> Any:
        return self.shards[key].get_slice(key)


def _stack(parts: list[LayerState]) -> LayerState:
    """Parts of one layer, the first rows first."""
    if len({(part.weight.shape[1], part.weight.dtype) for part in parts}) > 1:
        raise ArtifactError("its parts are of different widths or dtypes")
    grids = [part.grid for part in parts]
    uniform = [grid for grid in grids if isinstance(grid, UniformGrid)]
    grid = None
    if (
        len(uniform) == len(parts)
        and len({(g.bits, g.unit, g.dtype, g.symmetric) for g in uniform}) == 1
    ):
        zeros = [g.zero_point for g in uniform if g.zero_point is not None]
        scale = torch.cat([g.scale for g in uniform])
        grid = dataclasses.replace(
            uniform[0], scale=scale, zero_point=torch.cat(zeros) if zeros else None
        )
    elif any(g is not None for g in grids):
        raise ArtifactError("its parts lie on different grids")
    known = any(part.pruned is not None for part in parts)
    pruned = torch.cat([part.mask for part in parts]) if known else None
    return LayerState(torch.cat([part.weight for part in parts]), pruned=pruned, grid=grid)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}.") from error


def _dump_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
