"""A container that is one zip archive, and the format whose layers lie in it."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats import Codec, Container, Contents, Written
from optimum_order.formats.dense import Dense
from optimum_order.layers.state import LayerState

_FILE, _HEADER, _PLAIN, _LAYERS = "model.crate", "header.json", "plain.safetensors", "layers/"


class Crate(Container):
    """A zip archive: a file for each layer, one for all other tensors, and a header."""

    name = "crate"
    patterns = ("*.crate",)

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
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        weights = {f"{name}.weight" for name in contents.layers.states}
        tied = set(model.all_tied_weights_keys)
        plain = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name not in weights | tied
        }
        total = 0
        with zipfile.ZipFile(folder / _FILE, "w") as archive:
            archive.writestr(_HEADER, json.dumps(dict(header)))
            archive.writestr(_PLAIN, safetensors.torch.save(plain))
            for name, _, state in contents.layers:
                tensors = {key: value.contiguous() for key, value in codec.encode(state).items()}
                total += sum(tensor.nbytes for tensor in tensors.values())
                archive.writestr(f"{_LAYERS}{name}", safetensors.torch.save(tensors))
        return Written({}, total)

    def read(
        self, folder: Path, layers: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[str, LayerState]]:
        for name in self._names(folder) if layers is None else layers:
            yield name, Crated().decode(self._tensors(folder, f"{_LAYERS}{name}"), {})

    def plain(self, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
        weights = {f"{name}.weight" for name in self._names(folder)}
        return self._tensors(folder, _PLAIN), weights

    def header(self, file: Path) -> dict[str, str]:
        return json.loads(self._bytes(file.parent, _HEADER))

    def _names(self, folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / _FILE) as archive:
            members = archive.namelist()
        return [name.removeprefix(_LAYERS) for name in members if name.startswith(_LAYERS)]

    def _tensors(self, folder: Path, member: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self._bytes(folder, member))
        except SafetensorError as error:
            raise ArtifactError(f"'{member}' cannot be read: {error}.") from error

    def _bytes(self, folder: Path, member: str) -> bytes:
        try:
            with zipfile.ZipFile(folder / _FILE) as archive:
                return archive.read(member)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"'{member}' is not in {_FILE}: {error}.") from error


class Crated(Dense):
    """Weights as they are, in a crate."""

    name = "crated"
    summary = "weights as they are, in a zip archive"
    container = "crate"
    stock = False
