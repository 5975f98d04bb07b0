"""The contracts of a format: a codec turns one layer into tensors, a container stores a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats.layout import Layout
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.state import LayerState
from optimum_order.layers.tree import map_tensors
from optimum_order.models.units import Target
from optimum_order.order import Value

_Grid = TypeVar("_Grid", bound=Grid)

Config = dict[str, Any]
"""A JSON object, such as the `quantization_config` of a config.json."""


@dataclass(frozen=True)
class Layers:
    """Compressed layers by name.

    Args:
        targets: The targets of these layers, and possibly of others.
        states: The states of these layers. A mapping may read a state when it is asked for.
    """

    targets: Mapping[str, Target]
    states: Mapping[str, LayerState]

    def __iter__(self) -> Iterator[tuple[str, Target, LayerState]]:
        """Read one layer after the other: name, target and state."""
        for name in self.states:
            yield name, self.targets[name], self.states[name]


@dataclass(frozen=True)
class Contents:
    """What a folder is written from.

    Args:
        model: The compressed model. The model holds the weights of the states, or is empty.
        layers: Every layer that was compressed.
        tensors: The tensors of the model by name, if the model is empty.
        processor: Tokenizer or image processor, or None.
        unloaded: Tensors of the checkpoint that the model does not load, by stored name; they are
            written as they are.
        documents: Files beside the model that go with it, by their path in the folder.
        origin: The folder of the compressed model that this one began as. What has not changed
            since, a container may write as it is stored there.
    """

    model: PreTrainedModel
    layers: Layers
    tensors: Mapping[str, Tensor] | None = None
    processor: Any = None
    unloaded: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Mapping[str, Path] = field(default_factory=dict)
    origin: Path | None = None

    @cached_property
    def layout(self) -> Layout:
        """Where checkpoints of this architecture store the layers."""
        return Layout.of(self.model, self.tensors)


@dataclass(frozen=True)
class Size:
    """The size of an encoded layer.

    Args:
        bytes: Bytes of all tensors together.
        exact: Whether that is the size whatever the weights are; otherwise no layer takes more.
    """

    bytes: int
    exact: bool = True


def outline(state: LayerState) -> LayerState:
    """Return a state without values: shapes, dtypes and grid, in tensors on the meta device."""
    return map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), state)


class Codec(ABC):
    """One way to hold a compressed layer in tensors.

    A subclass is one file in this folder, or a class in the entry-point group
    `optimum_order.formats`. `decode(encode(state), scheme(state))` returns the weight and the grid
    bit for bit; it returns `pruned` as well if the codec stores masks, otherwise `pruned` is None.

    `why_not`, `why_not_model` and `size` look at shapes, dtypes and kinds of grid alone, so they
    can be asked about an `outline` before anything is compressed. `why_not_values` is for the rare
    reason that depends on weights.
    """

    name: ClassVar[str]
    """Name after `--format`, and the `quant_method` in config.json; or the `encoding` there, beside
    the `quant_method` "optimum_order"."""
    summary: ClassVar[str]
    """One line for lists of formats."""
    container: ClassVar[str] = "safetensors"
    """Name of the container that holds the tensors."""
    tensors: ClassVar[tuple[str, ...]] = ("weight",)
    """Local names that the tensors of a layer may have."""
    runs_dense: ClassVar[bool] = True
    """Whether transformers computes with decoded weights, as the model in memory does."""
    stock: ClassVar[bool] = True
    """Whether stock transformers loads it with nothing else installed; "auto" takes no other."""
    made_for: ClassVar[tuple[type[Grid], ...]] = ()
    """Kinds of grid that no stock format packs: "auto" takes this format for a model that has one,
    though it is not stock."""
    k_quants: ClassVar[tuple[str, ...]] = ()
    """The K-quants that it holds, the smallest first."""
    codes_rates: ClassVar[bool] = False
    """Whether integers take as many bits as their rate, not those of the widest."""
    holds_inputs: ClassVar[bool] = False
    """Whether a folder tells loaders how the inputs of layers are rounded."""
    zeros_are_cheap: ClassVar[bool] = False
    """Whether a zero takes fewer bits than another weight, so that pruning saves bytes."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages that loading needs besides torch and transformers."""
    import_first: ClassVar[str | None] = None
    """Module to import before transformers can load it."""
    gguf_file: ClassVar[str | None] = None
    """The `gguf_file` to give to `from_pretrained`, if it needs one."""
    options: ClassVar[Mapping[str, Value]] = {}
    """Options that stages get which have them and do not name them, when a model is compressed for
    this format: then it holds what they make."""
    widths: ClassVar[tuple[int, ...]] = (4, 8)
    """Widths that its kernels run, of symmetric grids of whole rows."""

    # One layer

    @abstractmethod
    def why_not(self, target: Target, state: LayerState) -> str | None:
        """Return why this codec cannot hold a layer exactly, or None if it can.

        Args:
            target: Where the layer is in the model.
            state: The layer or its outline; one that this codec encodes.

        Returns:
            The end of a sentence: "it has 5 bits, ...".
        """

    def why_not_values(self, state: LayerState) -> str | None:
        """Return why the values of a layer cannot be held exactly, as `why_not` does.

        Args:
            state: A layer with values, which `why_not` does not refuse.
        """
        return None

    def encodes(self, state: LayerState) -> bool:
        """Return whether the layer is stored as other tensors than its plain weight."""
        return state.grid is not None

    def size(self, state: LayerState) -> Size:
        """Return the size of an encoded layer from its shapes alone.

        By default an outline is encoded, which works where `encode` asks for no value.

        Args:
            state: The layer or its outline; one that this codec encodes.
        """
        encoded = self.encode(outline(state))
        return Size(sum(tensor.nbytes for tensor in encoded.values()))

    @abstractmethod
    def scheme(self, state: LayerState) -> dict[str, Any]:
        """Return what must be known of an encoded layer before its tensors can be decoded.

        Returns:
            A JSON object. `scheme_in` finds it in config.json.
        """

    @abstractmethod
    def encode(self, state: LayerState) -> dict[str, Tensor]:
        """Return the tensors of a layer by local name, such as "weight_packed".

        Args:
            state: A layer that `encodes` and that no `why_not` refuses.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        """Return the layer.

        Args:
            tensors: Tensors by local name, from a file that nobody has checked.
            scheme: From `scheme_in`.

        Raises:
            ArtifactError: If the tensors do not fit together.
        """

    # A whole model, and its config.json

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        """Return why these layers cannot be held together in this model, or None if they can.

        Args:
            layout: Layout of the model.
            layers: The layers that this codec encodes, as outlines.

        Returns:
            A sentence.
        """
        return None

    def why_not_contents(self, contents: Contents) -> str | None:
        """Return why what goes with the layers cannot be stored, or None if it can.

        Args:
            contents: The model, its layers as outlines, its tokenizer and other tensors.

        Returns:
            A sentence.
        """
        return None

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        """Return the `quantization_config` of config.json, with no key that loaders do not know.

        Args:
            layout: Layout of the model.
            layers: The layers that this codec encodes, as outlines.
        """
        return None

    def variant(self, layers: Layers) -> str:
        """Return the name under which the census tried what loading these layers takes.

        Args:
            layers: The layers that this codec encodes, as outlines.
        """
        return self.name

    def loads_dense(self, layers: Layers) -> bool:
        """Return whether loading decodes every layer, so that the model is an ordinary dense one.

        Args:
            layers: The layers that this codec encodes, as outlines.
        """
        return False

    def why_not_adapter(self, layers: Layers) -> str | None:
        """Return why PEFT would not put an adapter on what loads from a folder, or None if it does.

        Args:
            layers: The layers that this codec encodes, as outlines.

        Returns:
            A sentence.
        """
        if self.gguf_file is None and (not layers.states or self.loads_dense(layers)):
            return None
        return (
            f"PEFT puts adapters on models that load as ordinary dense ones, and '{self.name}' "
            "does not load these layers so."
        )

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Return what a config.json says about one encoded layer, as `scheme` does.

        Args:
            config: The config.json, which nobody has checked.
            names: The names of the layer, in the model and in the checkpoint.

        Raises:
            ArtifactError: If the config.json says nothing about the layer.
        """
        return {}


@dataclass(frozen=True)
class Written:
    """What `Container.write` has written of the layers.

    Args:
        stored: Where the layers are that are not simply stored as `<name>.weight`, ready for JSON:
            the rows `[key, first, count]` of a layer, and whether they are its columns.
        bytes: Bytes of all layers together.
    """

    stored: dict[str, Any]
    bytes: int


class Container(ABC):
    """One way to hold a model in the files of a folder.

    A subclass is one file in this folder, or a class in the entry-point group
    `optimum_order.containers`. A codec names its container. Whatever a container reads comes from
    files that nobody has checked: what does not fit together is an ArtifactError.
    """

    name: ClassVar[str]
    """Name that codecs refer to."""
    patterns: ClassVar[tuple[str, ...]]
    """Shell patterns of the names of its weight files."""
    keeps_others: ClassVar[bool] = False
    """Whether it writes quantized weights that are no layers of a run as they are stored."""

    @abstractmethod
    def write(
        self,
        contents: Contents,
        codec: Codec,
        folder: Path,
        *,
        header: Mapping[str, str],
        max_shard_size: str = "5GB",
    ) -> Written:
        """Write everything but the processor; loaders find the model in the folder alone.

        Args:
            contents: The model and its layers; states are asked for block by block.
            codec: From `formats.choose`.
            folder: The folder; a config.json and weights in it are replaced.
            header: Metadata that every weight file repeats.
            max_shard_size: Most bytes of one weight file, as `save_pretrained` takes it.

        Raises:
            InvariantError: If the model does not hold the weights that the layers have.
        """

    @abstractmethod
    def read(
        self, folder: Path, layers: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[str, LayerState]]:
        """Decode the layers of a folder, one after the other.

        Args:
            folder: The folder.
            layers: The layers to read, each with its entry in `Written.stored` or None. By default
                every matrix, by its name in the checkpoint.

        Raises:
            ArtifactError: If a file is missing or damaged, or a layer cannot be decoded.
        """

    @abstractmethod
    def plain(self, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
        """Return the tensors that are stored as they are, and the names of the encoded weights.

        Raises:
            ArtifactError: If a file is missing or damaged.
        """

    def values(self, folder: Path, keys: Collection[str]) -> dict[str, Tensor]:
        """Return the values of encoded weights that are no layers of a run, by stored name.

        Args:
            folder: The folder.
            keys: Names of stored tensors, of those that `plain` calls encoded.

        Raises:
            ArtifactError: If the container does not write such weights as they are stored.
        """
        raise ArtifactError(
            f"'{folder}' holds the quantized tensor '{min(keys)}', which is no layer that this "
            "package compresses: give the model that it was made from."
        )

    @abstractmethod
    def header(self, file: Path) -> dict[str, str]:
        """Return the metadata of one weight file.

        Raises:
            ArtifactError: If the file cannot be read.
        """

    def weight_bytes(
        self, contents: Contents, codec: Codec, header: Mapping[str, str]
    ) -> int | None:
        """Return the bytes of the weight files that `write` would write.

        Args:
            contents: The model and its layers, without values.
            codec: The codec.
            header: As in `write`.

        Returns:
            The bytes; None if it writes safetensors files of what the codec encodes: their size
            follows from that.
        """
        return None

    def files(self, folder: Path) -> list[Path]:
        """Return the weight files of a folder, in order of their names."""
        return sorted({file for pattern in self.patterns for file in folder.glob(pattern)})


def grid_of(state: LayerState, kind: type[_Grid]) -> _Grid:
    """Return the grid of a layer.

    Args:
        state: The layer.
        kind: The class that the grid must have.

    Raises:
        FormatError: If the layer has no grid of this kind.
    """
    if not isinstance(state.grid, kind):
        raise FormatError(f"A {kind.__name__} is needed, got {type(state.grid).__name__}.")
    return state.grid
