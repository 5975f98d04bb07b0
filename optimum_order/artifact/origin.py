"""A compressed model that a run goes on from: its layers keep their masks and grids.

The model may be an artifact of this package, in any format that stores what must be kept, or a
quantized model of somebody else in a format that this package reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import adapter, hub, manifest
from optimum_order.artifact.loading import Loaded, format_of, load
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, ModelError
from optimum_order.files import is_folder, read_json
from optimum_order.formats.gguf_published import stage
from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.adapter import Merged
from optimum_order.models.source import Checkpoint, read_config, skeleton

_CHAIN = ("order", "stages", "schedule", "base_model", "calibration", "versions", "digest")
"""What a manifest says of each earlier run."""


class Origin(Checkpoint):
    """A folder with a compressed model.

    Args:
        model: The folder.
        options: As in `Checkpoint`; `dtype` must be "auto".

    Raises:
        ModelError: If the folder is not what its manifest says, or its layers cannot be continued.
    """

    def __init__(self, model: str | Path, **options: Any):
        if options["dtype"] != "auto":
            raise ModelError(
                f"'{model}' is compressed already, and its layers keep their data type: leave out "
                f"dtype={options['dtype']!r} (--dtype)."
            )
        folder = Path(model).expanduser()
        self._facts = manifest.load(folder) if (folder / manifest.FILE).exists() else None
        if self._facts is not None and (problems := verify(folder)):
            raise ModelError(
                f"'{folder}' is not what its manifest says: {problems[0]} Get it again, or remove "
                f"{manifest.FILE} to compress it as any other model."
            )
        super().__init__(folder, **options)
        self._loaded: Loaded | None = None
        if self._facts is not None:
            self.continues = _chain(self._facts)
            self.targets = self._facts.get("targets")
            self.ignore = self._facts.get("ignore")

    def check_dense(self) -> None:
        """Accept quantized weights, if a format reads them."""
        try:
            if self._facts is None:
                format_of(Path(self._path))
        except ArtifactError as error:
            raise ModelError(str(error)) from error

    def load(self) -> PreTrainedModel:
        """Return the model, dense, with the dequantized values of its layers.

        Raises:
            ModelError: If it cannot be loaded.
        """
        try:
            loaded = load(Path(self._path), self._facts)
        except ArtifactError as error:
            raise ModelError(str(error)) from error
        self._loaded = loaded
        return loaded.model

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk in bytes, without an adapter."""
        name = format_of(self.origin) if self._facts is None else self._facts["format"]
        return sum(file.stat().st_size for file in formats.container(name).files(self.origin))

    def load_empty(self, device: torch.device | str = "cpu") -> NoReturn:
        """Refuse: codes are not read a block at a time.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"'{self.id}' is compressed already, and such a model is not read a block at a time: "
            "leave out low_memory (--low-memory)."
        )

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights, on the meta device."""
        return skeleton(read_config(Path(self._path)))

    @property
    def states(self) -> Mapping[str, LayerState]:
        """The layers that are compressed already, by name, for a run that goes on from them.

        Raises:
            ModelError: If the format did not store what a run has to keep.
        """
        states = self.loaded().layers.states
        if self._facts is not None:
            if adapter.named(self._facts):
                raise ModelError(
                    f"'{self.id}' has an adapter, made for the weights that its layers have, and "
                    "no run goes on from it. Compress the model that it was made from, with all "
                    "stages in one order and the adapter last."
                )
            _check(self._facts, states)
        return states

    @property
    def origin(self) -> Path:
        """The folder."""
        return Path(self._path)

    @property
    def unloaded(self) -> Mapping[str, Tensor]:
        """The stored tensors that the model does not load."""
        return self.loaded().unloaded

    def loaded(self) -> Loaded:
        """Return the model and its layers, as far as the format stores what they are."""
        if self._loaded is None:
            self.load()
        assert self._loaded is not None
        return self._loaded


class Published(Origin):
    """A GGUF file of somebody else, with its grids as they are.

    Args:
        file: The file, or a folder with one.
        options: As in `Checkpoint`; `dtype` must be "auto".

    Raises:
        ModelError: If the file cannot be read, or another format has to be given first.
    """

    def __init__(self, file: Path, **options: Any):
        self._staged = tempfile.TemporaryDirectory(prefix="optimum-order-")
        try:
            stage(file, Path(self._staged.name))
        except ArtifactError as error:
            raise ModelError(str(error)) from error
        super().__init__(self._staged.name, **options)
        self.id = file.name


def open_checkpoint(
    model: str | Path,
    *,
    merge_adapter: bool = False,
    base: str | Path | None = None,
    **options: Any,
) -> Checkpoint:
    """Return where a model comes from; a compressed one in a folder is an `Origin`.

    Args:
        model: A Hub id, a folder, or the name of an embedded model.
        merge_adapter: Whether the model is a LoRA adapter, to be merged into its base model.
        base: The base model of the adapter; by default the one that the adapter names.
        options: As in `Checkpoint`.

    Raises:
        ModelError: If there is no such model, or it cannot be compressed.
    """
    if merge_adapter:
        return Merged(model, base=base, **options)
    if base is not None:
        raise ModelError(
            f"base={str(base)!r} (--base) is the base model of an adapter: give merge_adapter=True "
            "(--merge-adapter) with it."
        )
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return Published(folder, **options)
    if is_folder(folder):
        if file := _only_file(folder):
            return Published(file, **options)
        quantized = (folder / "config.json").is_file() and "quantization_config" in _config(folder)
        if quantized or (folder / manifest.FILE).exists():
            return Origin(folder, **options)
    elif "/" in str(model) and not str(model).startswith((".", "/", "~")):
        return _on_hub(str(model), **options)
    return Checkpoint(model, **options)


def _only_file(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder that this package has not written, if it is its model.

    Raises:
        ModelError: If there are several.
    """
    listed = sorted(folder.glob("*.gguf"))
    if not listed or (folder / manifest.FILE).exists() or any(folder.glob("*.safetensors")):
        return None
    if len(listed) > 1:
        raise ModelError(
            f"'{folder}' holds {len(listed)} GGUF files: name one, such as '{listed[0]}'."
        )
    return listed[0]


def _on_hub(repo_id: str, **options: Any) -> Checkpoint:
    """Return a model on the Hub; one that this package has compressed is pulled as a whole."""
    place: dict[str, Any] = {name: options.get(name) for name in ("revision", "token", "cache_dir")}
    try:
        listed = hf.cached_file(repo_id, manifest.FILE, required=False, **place)
    except (OSError, ValueError):
        listed = None  # loading the model says what is wrong
    if not listed:
        return Checkpoint(repo_id, **options)
    folder = hub.pull(repo_id, **place)
    origin = Origin(folder, **options)
    origin.id = repo_id
    origin.commit = folder.name
    return origin


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except ArtifactError as error:
        raise ModelError(str(error)) from error


def _chain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of the run that it is of, and of those before."""
    chain = {key: facts.get(key) for key in _CHAIN}
    return chain | {"continues": facts.get("continues")}


def _check(facts: Mapping[str, Any], states: Mapping[str, LayerState]) -> None:
    """Refuse layers of which the format did not store what a run has to keep.

    Raises:
        ModelError: If there is one.
    """
    for name, entry in facts["layers"].items():
        state = states[name]
        if entry["bits"] != state.bits:
            raise ModelError(
                f"Layer '{name}' has {entry['bits']} bits and is stored as plain values, from "
                "which its grid cannot be told. Go on from the model as it was saved in a format "
                "that stores codes, such as --format sparse or compressed-tensors."
            )
        if entry["pruned"] and state.pruned is None:
            raise ModelError(
                f"Of the {int((state.weight == 0).sum())} zeros of layer '{name}' "
                f"{entry['pruned']} were pruned, and the format '{facts['format']}' does not store "
                "which. Go on from the model as it was saved with --format sparse."
            )
