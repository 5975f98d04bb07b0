"""`gguf`: the codes of quantized layers in one GGUF file, which llama.cpp runs as it is.

Codes go over untouched, each with the scale of its group, repeated for every 32 inputs. llama.cpp
and the package `gguf` compute `scale * code` in float32; rounded to the model's dtype, that is the
weight, to the bit. So scales must be float16 numbers, which `scales=float16` makes them. The grids
of K-quants, such as q4_k, go over with all of their scales.

Beside the file lie config.json and the tokenizer, as in every format, so that
`from_pretrained(folder, gguf_file="model.gguf")` loads the model in transformers.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_order.errors import ArtifactError, InvariantError, missing_extra
from optimum_order.files import SINGLE, read_json
from optimum_order.formats import (
    gguf_blocks,
    gguf_families,
    gguf_superblocks,
    gguf_vocabulary,
)
from optimum_order.formats.base import (
    Codec,
    Container,
    Contents,
    Layers,
    Size,
    Written,
    grid_of,
    outline,
)
from optimum_order.formats.gguf_blocks import BlockType
from optimum_order.formats.gguf_families import Entry
from optimum_order.formats.gguf_file import PLAIN, GGUFFile, Stored
from optimum_order.formats.gguf_published import FILE, unchanged_fields
from optimum_order.formats.gguf_superblocks import SuperblockLayout
from optimum_order.formats.layout import Layout, as_matrix, blocks
from optimum_order.formats.older import with_older_keys
from optimum_order.layers.grids.block import BLOCK, ForeignBlockGrid
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.source import read_config, skeleton
from optimum_order.models.units import Target

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUMBERS = {dtype: number for number, dtype in PLAIN.items()}
_FILE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
}
_PLAIN_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_QUANTIZATION_VERSION = 2
_Kind = BlockType | SuperblockLayout


class GGUF(Codec):
    """Blocks of 32 codes with a float16 scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; and K-quants."""

    name = "gguf"
    summary = "one GGUF file for llama.cpp, 2-8 bit symmetric or 2-5 bit affine, in groups of 32 n"
    container = "gguf"
    stock = False
    packages = ("gguf>=0.19",)
    gguf_file = FILE
    options = {"scales": "float16"}  # noqa: RUF012 (a ClassVar of the base)
    made_for = (SuperblockGrid, ForeignBlockGrid)
    k_quants = tuple(gguf_superblocks.BY_KIND)
    widths = (4, 5, 8)

    def encodes(self, state: LayerState) -> bool:
        return state.grid is not None and state.weight.shape[1] % BLOCK == 0

    def why_not(self, target: Target, state: LayerState) -> str | None:
        grid = state.grid
        if target.transposed or target.kind == "conv2d":
            return "it is no matrix of outputs by inputs, as llama.cpp stores layers"
        if state.weight.dtype not in _DTYPES.values():
            return (
                f"its weights are {state.weight.dtype}; they must be float32, bfloat16 or float16"
            )
        if isinstance(grid, DualScaleGrid):
            return (
                "its columns have steps of their own; save it as 'coded', and then "
                "'optimum-order compress CODED OUT --format gguf' moves these steps into what "
                "makes the input"
            )
        if isinstance(grid, (SuperblockGrid, ForeignBlockGrid)):
            return None
        if not isinstance(grid, UniformGrid):
            return f"its {type(grid).__name__} is not a grid of equal steps"
        if gguf_blocks.type_of(grid) is None:
            return f"its {grid.bits} bits have zero points, 5 may have at most; use symmetric=true"
        if grid.unit % BLOCK:
            return f"its groups of {grid.unit} are no whole blocks of {BLOCK}; use group_size=32"
        return None

    def why_not_values(self, state: LayerState) -> str | None:
        if isinstance(state.grid, UniformGrid) and gguf_blocks.inexact_scales(state.grid):
            return (
                "it has scales that float16 does not hold; quantize with scales=float16, as "
                "'--format gguf' does while it compresses"
            )
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if importlib.util.find_spec("gguf") is None:
            return str(missing_extra("gguf", ModuleNotFoundError(name="gguf")))
        return gguf_families.why_not(layout.model)

    def why_not_contents(self, contents: Contents) -> str | None:
        if contents.unloaded:
            return (
                f"The model does not load the tensor '{min(contents.unloaded)}', for which a GGUF "
                "has no place."
            )
        origin = _origin(contents)
        if origin is not None and "tokenizer.ggml.model" in origin.texts:
            return None  # it is written as it is
        embeddings: Any = contents.model.get_input_embeddings()
        return gguf_vocabulary.why_not(contents.processor, len(embeddings.weight))

    def size(self, state: LayerState) -> Size:
        return Size(sum(tensor.nbytes for tensor in self.encode(outline(state)).values()))

    def scheme(self, state: LayerState) -> dict[str, Any]:
        dtype = str(state.weight.dtype).removeprefix("torch.")
        return {"type": _type_of(state).name, "dtype": dtype, **_widths(state)}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        return {"weight": _packed(state, _type_of(state))}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        data = tensors.get("weight")
        kind = _BY_NAME.get(str(scheme.get("type")))
        dtype = _DTYPES.get(str(scheme.get("dtype")))
        if kind is None or dtype is None:
            raise ArtifactError(f"what is said of it cannot be read: {dict(scheme)}")
        if data is None or data.dtype != torch.uint8 or data.ndim != 2 or not data.numel():
            raise ArtifactError("a layer is rows of bytes, in the tensor 'weight'")
        if data.shape[1] % kind.bytes:
            raise ArtifactError(f"a row of {data.shape[1]} bytes is no whole blocks of {kind.name}")
        data = data.contiguous()
        grid: UniformGrid | ForeignBlockGrid | SuperblockGrid
        if isinstance(kind, SuperblockLayout):
            grid, codes = gguf_superblocks.unpack(data, kind, dtype)
            return LayerState(grid.dequantize(codes), grid=grid)
        if scheme.keys().isdisjoint(("bits", "group_size")):  # nobody says more than the file
            grid, codes = gguf_blocks.as_they_are(gguf_blocks.unpack(data, kind), kind, dtype)
            return LayerState(grid.dequantize(codes), grid=grid)
        bits, group_size = scheme.get("bits"), scheme.get("group_size")
        if type(bits) is not int or type(group_size) is not int:
            raise ArtifactError(f"what is said of it cannot be read: {dict(scheme)}")
        if not 2 <= bits <= kind.bits:
            raise ArtifactError(f"{kind.name} has no codes of {bits} bits")
        grid, codes = gguf_blocks.grid_of(gguf_blocks.unpack(data, kind), bits, group_size, dtype)
        return LayerState(grid.dequantize(codes), grid=grid)

    def loads_dense(self, layers: Layers) -> bool:
        return True


_BY_NAME: Mapping[str, _Kind] = gguf_blocks.BY_NAME | {
    layout.name: layout for layout in gguf_superblocks.LAYOUTS
}


def _type_of(state: LayerState) -> _Kind:
    """Return the type of the blocks of a layer that no `why_not` refuses."""
    if isinstance(state.grid, SuperblockGrid):
        return gguf_superblocks.BY_KIND[state.grid.kind]
    grid = state.grid if isinstance(state.grid, ForeignBlockGrid) else grid_of(state, UniformGrid)
    kind = gguf_blocks.type_of(grid)
    if kind is None:
        raise InvariantError("A layer that no type of block holds was to be packed.")
    return kind


def _widths(state: LayerState) -> dict[str, Any]:
    """Return what the type of blocks does not say of a grid."""
    if isinstance(state.grid, (SuperblockGrid, ForeignBlockGrid)):
        return {}
    grid = grid_of(state, UniformGrid)
    return {"bits": grid.bits, "group_size": grid.group_size}


def _packed(state: LayerState, kind: _Kind) -> Tensor:
    """Return the bytes of a layer, (out, bytes of a row) uint8."""
    grid = state.grid
    codes = state.weight
    if grid is not None and not codes.is_meta:
        codes = grid.quantize(codes)
    if isinstance(grid, SuperblockGrid):
        return gguf_superblocks.pack(codes, grid)
    assert isinstance(kind, BlockType)
    if not isinstance(grid, ForeignBlockGrid):
        grid = grid_of(state, UniformGrid)
    return gguf_blocks.pack(codes, grid, kind)


class GGUFFolder(Container):
    """config.json, the tokenizer, and all weights in one file, however large."""

    name = "gguf"
    patterns = ("*.gguf",)
    keeps_others = True

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
        for stale in [*self.files(folder), folder / SINGLE]:
            stale.unlink(missing_ok=True)
        model.save_pretrained(folder, state_dict={})  # all but the weights
        (folder / SINGLE).unlink(missing_ok=True)
        config = with_older_keys(read_json(folder / "config.json"), model.config)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        plan = _Plan(contents, codec)
        plan.say_what_stays()
        writer = plan.writer(folder / FILE, header)
        dense = hf.tensors_to_save(model)
        values = dense if contents.tensors is None else contents.tensors
        for tensor in plan.extra.values():
            writer.write_tensor_data(tensor.numpy())
        for block, entries in zip(blocks(dense), plan.entries, strict=True):
            stored = hf.to_checkpoint(model, {name: values[name] for name in block})
            for entry in entries:
                writer.write_tensor_data(plan.bytes_of(entry, stored).numpy())
        writer.close()
        return Written(plan.stored(), plan.bytes)

    def weight_bytes(self, contents: Contents, codec: Codec, header: Mapping[str, str]) -> int:
        plan = _Plan(contents, codec)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / FILE
            plan.writer(file, header).close()
            parts = [file.stat().st_size, *plan.sizes.values()]
        return sum(-(-size // BLOCK) * BLOCK for size in parts)

    def read(
        self, folder: Path, layers: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[str, LayerState]]:
        file = GGUFFile(folder / FILE)
        dtype = str(read_json(folder / "config.json").get("dtype"))
        # somebody else's folder is asked for by the names of a checkpoint
        places = {} if layers and all(map(_is_listed, layers.values())) else _places(folder)
        if layers is None:
            layers = {
                key.removesuffix(".weight"): None
                for key, place in places.items()
                if place[0] in file.tensors and len(file.tensors[place[0]].shape) > 1
            }
        for layer, stored in layers.items():
            try:
                listed = stored if _is_listed(stored) else _translated(layer, stored, places)
                state = _layer(file, listed, dtype)
            except ArtifactError as error:
                raise ArtifactError(f"Layer '{layer}' in {folder}: {error}.") from error
            yield layer, state

    def plain(self, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
        file = GGUFFile(folder / FILE)
        tensors: dict[str, Tensor] = {}
        encoded: set[str] = set()
        for entry in _entries(folder):
            stored = file.tensors.get(entry.name)
            if stored is None or stored.shape != entry.shape:
                raise ArtifactError(f"'{folder / FILE}' has no tensor '{entry.name}' as the model.")
            if isinstance(stored.kind, _Kind):
                encoded.update(entry.keys)
            else:
                tensors |= entry.undo(file.values(entry.name), _dtype_of(folder))
        return tensors, encoded

    def values(self, folder: Path, keys: Collection[str]) -> dict[str, Tensor]:
        file = GGUFFile(folder / FILE)
        values: dict[str, Tensor] = {}
        for entry in _entries(folder):
            if not set(keys).isdisjoint(entry.keys):
                values |= _values(file, entry, _dtype_of(folder))
        return {key: values[key] for key in keys}

    def header(self, file: Path) -> dict[str, str]:
        return GGUFFile(file).texts


# Writing


def _origin(contents: Contents) -> GGUFFile | None:
    """Return the GGUF file that a model began as, if it was one."""
    file = None if contents.origin is None else contents.origin / FILE
    return GGUFFile(file) if file is not None and file.is_file() else None


@dataclass(frozen=True)
class _Part:
    """Rows of a layer in a tensor of the file.

    Args:
        layer: The name of the layer.
        first: Its first row there, before rows are interleaved.
        start: Its first row in the layer.
        rows: The number of rows.
    """

    layer: str
    first: int
    start: int
    rows: int


class _Plan:
    """Which tensors a file gets, and how each is stored. No value is looked at.

    Args:
        contents: The model and its layers.
        codec: The codec.

    Attributes:
        entries: The tensors, block by block.
        extra: Tensors that no checkpoint has, before all others.
        sizes: Bytes of every tensor by name, in the order of the file.
    """

    def __init__(self, contents: Contents, codec: Codec):
        self._contents = contents
        self._compare = contents.tensors is None and contents.model.device.type != "meta"
        self.entries = gguf_families.entries(contents.model)
        factors = gguf_families.rope_factors(contents.model)
        self.extra = {} if factors is None else {gguf_families.ROPE_FACTORS: factors}
        self._outlines = {name: outline(state) for name, state in contents.layers.states.items()}
        self._parts = self._placed()
        self._origin = _origin(contents)
        self._kinds: dict[str, _Kind] = {}
        for entry in itertools.chain(*self.entries):
            kind = self._kind(entry, codec)
            if kind is not None:
                self._kinds[entry.name] = kind
        self._dtypes: dict[str, torch.dtype] = {}
        self._unchanged = self._before()
        self.sizes = {name: tensor.nbytes for name, tensor in self.extra.items()} | {
            entry.name: self._row_bytes(entry) * (torch.Size(entry.shape[:-1]).numel())
            for entry in itertools.chain(*self.entries)
        }

    def _placed(self) -> dict[str, list[_Part]]:
        """Return the parts of layers in each tensor, in the order of their rows."""
        places = {
            key: (entry, index)
            for entry in itertools.chain(*self.entries)
            for index, key in enumerate(entry.keys)
        }
        parts: dict[str, list[_Part]] = {}
        for name in self._contents.layers.states:
            pieces = self._contents.layout.pieces(self._contents.layers.targets[name])
            if not pieces:
                raise InvariantError(
                    f"Layer '{name}' is stored in a way that this package cannot follow."
                )
            for piece in pieces:
                entry, index = places[piece.key]
                first = index * entry.rows_per_key + piece.at
                part = _Part(name, first, piece.start, piece.rows)
                parts.setdefault(entry.name, []).append(part)
        return {name: sorted(listed, key=lambda part: part.first) for name, listed in parts.items()}

    def _kind(self, entry: Entry, codec: Codec) -> _Kind | None:
        """Return the type of the blocks of a tensor, or None if it is stored as values."""
        parts = self._parts.get(entry.name, [])
        states = [self._outlines[part.layer] for part in parts]
        rows = sum(part.rows for part in parts)
        if rows != entry.rows_per_key * len(entry.keys) or not all(map(codec.encodes, states)):
            return None
        kinds = [_type_of(state) for state in states]
        blocks = [kind for kind in kinds if isinstance(kind, BlockType)]
        if len(blocks) < len(kinds):
            return kinds[0] if len(set(kinds)) == 1 else None
        if len({kind.affine for kind in blocks}) > 1:
            return None
        return max(blocks, key=lambda kind: kind.bits)

    def _before(self) -> dict[str, Stored]:
        """Return the tensors that are written as they are in the file that the model began as.

        Embeddings, heads and norms are no layers, as a rule: where their values are the same, so
        are their bytes, of whatever type. Plain values that others have taken the place of keep
        their dtype if it holds them.
        """
        unchanged: dict[str, Stored] = {}
        if self._origin is None:
            return unchanged
        model = self._contents.model
        dense = hf.tensors_to_save(model)
        for block, entries in zip(blocks(dense), self.entries, strict=True):
            listed = [entry for entry in entries if self._is_as_before(entry)]
            tensors = {name: dense[name] for name in block}
            now = hf.to_checkpoint(model, tensors) if listed and self._compare else {}
            for entry in listed:
                stored = self._origin.tensors[entry.name]
                before = _values(self._origin, entry, model.dtype) if now else {}
                if all(torch.equal(now[key].cpu(), value) for key, value in before.items()):
                    unchanged[entry.name] = stored
                elif isinstance(stored.kind, torch.dtype):
                    values = entry.values(now).float()
                    if torch.equal(values.to(stored.kind).float(), values):
                        self._dtypes[entry.name] = stored.kind
        return unchanged

    def _is_as_before(self, entry: Entry) -> bool:
        """Return whether a tensor has no codes now, and the shape that it began with."""
        stored = None if self._origin is None else self._origin.tensors.get(entry.name)
        return entry.name not in self._kinds and stored is not None and stored.shape == entry.shape

    def _type(self, entry: Entry) -> _Kind | torch.dtype:
        """Return how a tensor is stored."""
        if entry.name in self._unchanged:
            return self._unchanged[entry.name].kind
        return self._kinds.get(entry.name) or self._dtypes.get(entry.name, entry.dtype)

    def _row_bytes(self, entry: Entry) -> int:
        kind = self._type(entry)
        if isinstance(kind, torch.dtype):
            return entry.shape[-1] * kind.itemsize
        return entry.shape[-1] // kind.weights * kind.bytes

    @property
    def bytes(self) -> int:
        """Bytes of all layers."""
        return sum(
            part.rows * self._row_bytes(entry)
            for entry in itertools.chain(*self.entries)
            for part in self._parts.get(entry.name, [])
        )

    def say_what_stays(self) -> None:
        """Log how many quantized layers are stored as values."""
        values = {
            part.layer
            for name, parts in self._parts.items()
            for part in parts
            if name not in self._kinds and self._outlines[part.layer].grid is not None
        }
        if values:
            logger.warning(
                "%d quantized layers, such as '%s', are stored as values: their inputs are no "
                "multiple of %d, or other rows of the same tensor have no such grid.",
                len(values),
                min(values),
                BLOCK,
            )

    def stored(self) -> dict[str, Any]:
        """Return where the layers are, as in `Written`."""
        rows: dict[str, list[list[Any]]] = {}
        for entry in itertools.chain(*self.entries):
            for part in self._parts.get(entry.name, []):
                place = [entry.name, part.first, part.rows, entry.heads]
                rows.setdefault(part.layer, []).append([part.start, place])
        stored: dict[str, Any] = {}
        for layer, listed in rows.items():
            places = [place for _, place in sorted(listed)]
            stored[layer] = {"rows": places}
            if all(place[0] in self._kinds for place in places):
                stored[layer] |= _widths(self._outlines[layer])
        return stored

    def writer(self, file: Path, header: Mapping[str, str]) -> Any:
        """Return a writer of the package `gguf` that has written all but the tensors.

        Args:
            file: The file.
            header: Fields to add.
        """
        from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

        contents = self._contents
        family = gguf_families.FAMILIES[type(contents.model).__name__]
        writer = GGUFWriter(file, family.name)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        writer.add_file_type(self._file_type())
        listed = list(itertools.chain(*self.entries))
        values = gguf_families.fields(contents.model, listed)
        unchanged = (
            {}
            if self._origin is None
            else unchanged_fields(self._origin, values, contents.processor)
        )
        if not any(key.startswith("tokenizer.") for key in unchanged):
            rows = next(entry.shape[0] for entry in listed if entry.name == "token_embd.weight")
            values |= gguf_vocabulary.fields(contents.processor, rows)
        for key, field in unchanged.items():
            inner = None if field.inner is None else GGUFValueType(field.inner)
            writer.add_key_value(key, field.value, GGUFValueType(field.kind), inner)
        for key, value in {**values, **header}.items():
            if key not in unchanged:
                _ADD[type(value)](writer, key, value)
        for name, tensor in self.extra.items():
            writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
        for entry in listed:
            kind = self._type(entry)
            number = _NUMBERS[kind] if isinstance(kind, torch.dtype) else kind.number
            writer.add_tensor_info(
                entry.name,
                (*entry.shape[:-1], self._row_bytes(entry)),
                torch.empty(0, dtype=torch.uint8).numpy().dtype,
                self.sizes[entry.name],
                GGMLQuantizationType(number),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    def _file_type(self) -> int:
        """Return llama.cpp's number for what most bytes are."""
        bytes_: Counter[int] = Counter()
        for entry in itertools.chain(*self.entries):
            kind = self._type(entry)
            if isinstance(kind, torch.dtype):
                number = _PLAIN_FILE_TYPES[kind]
            else:
                number = _FILE_TYPES[kind.name]
            bytes_[number] += torch.Size(entry.shape).numel()
        return bytes_.most_common(1)[0][0]

    def bytes_of(self, entry: Entry, stored: Mapping[str, Tensor]) -> Tensor:
        """Return what the file holds of a tensor, (rows, bytes of a row) uint8.

        Args:
            entry: The tensor.
            stored: Tensors of a checkpoint that it is made of, by name.

        Raises:
            InvariantError: If they do not hold the weights of the layers.
        """
        if entry.name in self._unchanged and self._origin is not None:
            return self._origin.bytes_of(entry.name)[1]
        kind = self._kinds.get(entry.name)
        parts = self._parts.get(entry.name, [])
        packed = []
        for part in parts:
            state = self._contents.layers.states[part.layer]
            rows = slice(part.start, part.start + part.rows)
            if part.rows != len(state.weight):
                state = LayerState(
                    state.weight[rows], grid=None if state.grid is None else state.grid.take(rows)
                )
            if self._compare and not self._holds(entry, part, state, stored):
                raise InvariantError(
                    f"The model does not hold the weight that layer '{part.layer}' has."
                )
            if kind is not None:
                packed.append(_packed(state, kind))
        if kind is None:
            whole = entry.values(stored).to(self._dtypes.get(entry.name, entry.dtype))
            whole = whole.contiguous().cpu()
            return whole.view(-1, entry.shape[-1]).view(torch.uint8)
        whole = torch.cat(packed)
        if entry.heads:
            whole = whole[gguf_families.interleaved(len(whole), entry.heads)]
        return whole.contiguous()

    @staticmethod
    def _holds(entry: Entry, part: _Part, state: LayerState, stored: Mapping[str, Tensor]) -> bool:
        index, first = divmod(part.first, entry.rows_per_key)
        matrix = as_matrix(stored[entry.keys[index]])[first : first + part.rows]
        return torch.equal(matrix.cpu(), state.weight.cpu())


_ADD: dict[type, Any] = {
    bool: lambda writer, key, value: writer.add_bool(key, value),
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}


# Reading


def _dtype_of(folder: Path) -> torch.dtype:
    name = str(read_json(folder / "config.json").get("dtype"))
    if name not in _DTYPES:
        raise ArtifactError(f"'{folder}' has a config.json of the data type {name!r}.")
    return _DTYPES[name]


def _entries(folder: Path) -> Iterable[Entry]:
    """Return the tensors that the file of a folder should have.

    Raises:
        ArtifactError: If no such file is written for its model.
    """
    _dtype_of(folder)
    model = skeleton(read_config(folder))
    if reason := gguf_families.why_not(model):
        raise ArtifactError(f"'{folder}' holds a model that no GGUF is written of: {reason}")
    return itertools.chain(*gguf_families.entries(model))


def _values(file: GGUFFile, entry: Entry, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of a checkpoint that a tensor of a file is, dequantized."""
    stored, data = file.bytes_of(entry.name)
    if isinstance(stored.kind, torch.dtype):
        return entry.undo(file.values(entry.name), dtype)
    scheme = {"type": stored.kind.name, "dtype": str(dtype).removeprefix("torch.")}
    weight = GGUF().decode({"weight": data}, scheme).weight
    return entry.undo(weight.view(stored.shape), dtype)


def _places(folder: Path) -> dict[str, list[Any]]:
    """Return where each stored tensor of a checkpoint is, as `Written.stored` says it, by name."""
    return {
        key: [entry.name, index * entry.rows_per_key, entry.rows_per_key, entry.heads]
        for entry in _entries(folder)
        for index, key in enumerate(entry.keys)
    }


def _is_listed(stored: Any) -> bool:
    """Return whether an entry names tensors of a GGUF file, and not those of a checkpoint."""
    rows = stored.get("rows") if isinstance(stored, dict) else None
    return isinstance(rows, list) and all(isinstance(r, list) and len(r) == 4 for r in rows)


def _translated(layer: str, stored: Any, places: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return where a layer is, by the tensors of a GGUF file.

    Args:
        layer: Its name.
        stored: Where it is, by the tensors of a checkpoint; None if it is one of its name.
        places: Of each tensor of a checkpoint.

    Raises:
        ArtifactError: If it is in none of these.
    """
    if stored is None:
        whole = places.get(f"{layer}.weight")
        if whole is None:
            raise ArtifactError("the file has no place for it")
        return {"rows": [whole]}
    rows = stored.get("rows") if isinstance(stored, dict) else None
    listed = []
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, list) or [type(item) for item in row] != [str, int, int]:
            raise ArtifactError("the list of its rows cannot be read")
        key, at, count = row
        if key not in places:
            raise ArtifactError(f"the file has no place for '{key}'")
        name, first, _, heads = places[key]
        listed.append([name, first + at, count, heads])
    return {"rows": listed}


def _layer(file: GGUFFile, stored: Any, dtype: str) -> LayerState:
    """Return a layer.

    Args:
        file: The file.
        stored: Its entry in `Written.stored`, which nobody has checked.
        dtype: Name of the dtype of the model.

    Raises:
        ArtifactError: If the layer cannot be read.
    """
    rows = stored.get("rows") if isinstance(stored, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ArtifactError("the list of its rows cannot be read")
    parts = []
    taken: set[str] = set()
    for place in rows:
        if not (isinstance(place, list) and [type(item) for item in place] == [str, int, int, int]):
            raise ArtifactError("the list of its rows cannot be read")
        name, first, count, heads = place
        # a tensor that is listed without end could make much out of a small file
        if name in taken:
            raise ArtifactError(f"tensor {name!r} is listed twice")
        taken.add(name)
        info, data = file.bytes_of(name)
        if first < 0 or count < 1 or first + count > len(data):
            raise ArtifactError(f"tensor {name!r} has no rows {first} ... {first + count}")
        if heads:
            if heads < 0 or len(data) % (2 * heads):
                raise ArtifactError(f"tensor {name!r} has no {heads} heads")
            data = data[gguf_families.interleaved(len(data), heads).argsort()]
        data = data[first : first + count]
        if isinstance(info.kind, torch.dtype):
            values = data.contiguous().view(info.kind)
            parts.append(LayerState(values.to(_DTYPES.get(dtype, info.kind))))
            continue
        scheme = {"type": info.kind.name, "dtype": dtype, **stored}
        parts.append(GGUF().decode({"weight": data}, scheme))
    return parts[0] if len(parts) == 1 else _stacked(parts)


def _stacked(parts: list[LayerState]) -> LayerState:
    """Return layers as one, row below row.

    Raises:
        ArtifactError: If they do not fit together.
    """
    grids = [part.grid for part in parts if part.grid is not None]
    try:
        weight = torch.cat([part.weight for part in parts])
        grid = type(grids[0]).concat(grids) if len(grids) == len(parts) else None
    except (RuntimeError, ValueError) as error:
        raise ArtifactError("its rows do not fit together") from error
    return LayerState(weight, grid=grid)
