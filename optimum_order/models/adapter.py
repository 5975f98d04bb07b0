"""A LoRA adapter merged into its base model, so that there is one ordinary model to compress.

The files of an adapter are as little trusted as any: its config can name a module to import, a path
to read, patterns that take forever to match and ranks that fill the memory. So PEFT never reads
them. It gets a config made of checked values, and the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.errors import ArtifactError, ModelError, missing_extra
from optimum_order.files import digest, is_folder, read_json
from optimum_order.layers.state import tensor_bytes
from optimum_order.models import hf
from optimum_order.models.lazy import Weights
from optimum_order.models.source import ADAPTER, EMBEDDED, Checkpoint

_WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>[\w.]+)\.lora_"
    r"(A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
_NAME = re.compile(r"[\w.]+")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WITHOUT_MEANING = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
"""Keys that change nothing in a merge: the tensors say which layers, the rest is for training. The
initial weights are looked at on their own."""
_NUMBERS = ("lora_alpha", "r")
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, checked.

    Args:
        id: What a manifest may call it.
        commit: Its commit on the Hub, if it is from there.
        base: The base model that its config names; nobody has checked it.
        revision: The revision of the base that its config names.
        options: Arguments of PEFT's `LoraConfig`.
        tensors: Its tensors by name.
    """

    id: str
    commit: str | None
    base: str
    revision: str | None
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(
        cls, path: str, *, revision: str | None, token: str | None, cache_dir: str | None = None
    ) -> Adapter:
        """Read an adapter.

        Args:
            path: A folder, or an id on the Hub.
            revision: Branch, tag or commit.
            token: Hub token.
            cache_dir: The folder of downloads from the Hub.

        Raises:
            ModelError: If there is none, or not one that can be merged.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        try:
            config_file = hf.cached_file(path, ADAPTER, required=False, **hub)
            weights_file = hf.cached_file(path, _WEIGHTS, required=False, **hub)
        except (OSError, ValueError) as error:
            raise ModelError(f"Cannot read the adapter '{path}': {error}") from error
        if config_file is None:
            raise ModelError(
                f"'{path}' holds no adapter ({ADAPTER}), so there is nothing to merge: leave out "
                "merge_adapter (--merge-adapter) and base (--base)."
            )
        if weights_file is None:
            raise ModelError(
                f"The adapter '{path}' has no {_WEIGHTS}, and no other kind of file is read. Load "
                "it with PEFT and save it again: save_pretrained writes that file."
            )
        try:
            config = read_json(Path(config_file))
            tensors = load_file(weights_file)
        except (ArtifactError, OSError, SafetensorError) as error:
            raise ModelError(f"Cannot read the adapter '{path}': {error}") from error
        local = is_folder(path)
        named = config.get("revision")
        return cls(
            id=Path(path).resolve().name if local else path,
            commit=None if local else Path(config_file).parent.name,
            base=str(config.get("base_model_name_or_path") or ""),
            revision=named if isinstance(named, str) else None,
            options=_options(config, tensors, path),
            tensors=tensors,
        )

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it."""

        def parts() -> Any:
            yield repr(sorted(self.options.items()))
            for name, tensor in sorted(self.tensors.items()):
                yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
                yield tensor_bytes(tensor)

        return {"id": self.id, "revision": self.commit, "digest": digest(parts())}

    def named_base(self) -> str:
        """Return the base model that the config names, if it is safe to follow.

        Raises:
            ModelError: If the config names a path, or nothing.
        """
        is_id = _HUB_ID.fullmatch(self.base) and not Path(self.base).exists()
        if self.base in EMBEDDED or is_id:
            return self.base
        what = f"the path '{self.base[:200]}'" if self.base else "nothing"
        raise ModelError(
            f"The adapter '{self.id}' names {what} as its base model, and only an id on the Hub is "
            "followed from a file: name the base with base='FOLDER' (--base FOLDER)."
        )

    def merge_into(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        """Return a base model with the adapter merged into its weights.

        Args:
            model: The base model; changed.
            name: What to call it in errors.

        Raises:
            ModelError: If the adapter does not fit the model.
            OptimumOrderError: If PEFT is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        except ImportError as error:
            raise missing_extra("adapters", error) from error
        _refuse_tied(model, self)
        try:
            adapted: Any = get_peft_model(model, LoraConfig(**self.options))
            result: Any = set_peft_model_state_dict(adapted, dict(self.tensors))
            missing = [key for key in result.missing_keys if "lora_" in key]
            if result.unexpected_keys or missing:
                raise ValueError(f"no place for '{[*result.unexpected_keys, *missing][0]}'")
            merged: PreTrainedModel = adapted.merge_and_unload()
            for layer in self.options["target_modules"]:
                weight: Any = merged.get_submodule(layer).weight
                if not torch.isfinite(weight).all():
                    raise ValueError(f"layer '{layer}' gets weights that are no numbers")
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0][:200].rstrip(".")
            raise ModelError(
                f"The adapter '{self.id}' does not fit the base model '{name}': {reason}. Name the "
                "model that it was trained on with base=... (--base)."
            ) from error
        merged.eval()
        return merged


class Merged(Checkpoint):
    """A base model with an adapter merged into it, whenever it is loaded.

    Args:
        model: The folder or Hub id of the adapter.
        base: The base model; by default the one that the adapter names.
        revision: Of the adapter on the Hub.
        token: Hub token.
        options: As in `Checkpoint`, for the base model. Code that comes with a base model runs
            only where the caller named the base.

    Raises:
        ModelError: If the adapter or the base cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        base: str | Path | None = None,
        revision: str | None,
        token: str | None,
        **options: Any,
    ):
        path = str(Path(model).expanduser()) if is_folder(Path(model).expanduser()) else str(model)
        self._adapter = Adapter.read(
            path, revision=revision, token=token, cache_dir=options.get("cache_dir")
        )
        if base is None and options["trust_remote_code"]:
            raise ModelError(
                f"The adapter '{self._adapter.id}' names '{self._adapter.base[:200]}' as its base "
                "model, and the code of a model that a file names is not run: name the base "
                "yourself, with base=... (--base), or leave out trust_remote_code=True "
                "(--trust-remote-code)."
            )
        super().__init__(
            self._adapter.named_base() if base is None else base,
            revision=self._adapter.revision if base is None else None,
            token=token,
            **options,
        )
        self.adapter = self._adapter.describe()

    def load(self) -> PreTrainedModel:
        """Return the base model with the adapter merged into its weights."""
        return self._adapter.merge_into(super().load(), self.id)

    def load_empty(self, device: Any = "cpu") -> NoReturn:
        """Refuse: an adapter is merged into a whole model.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "An adapter is merged into a model that is in memory, which low_memory (--low-memory) "
            "avoids: merge first, with PEFT's merge_and_unload() and save_pretrained(), and "
            "compress that folder."
        )

    def skeleton(self) -> PreTrainedModel:
        """Return the base model without weights: a merged one has the same layers."""
        weights: Weights = super().load_empty()
        return weights.model


def _options(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Return the arguments of a `LoraConfig` from a config that nobody has checked.

    Raises:
        ModelError: If the adapter is of another kind, or does more than a merge can do.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"The adapter '{path}' is of the kind {str(kind)[:40]!r}, and only LORA is merged."
        )
    mergeable = {*_WITHOUT_MEANING, *_NUMBERS, *_FLAGS, *_PATTERNS, "modules_to_save"}
    extra = {key for key, value in config.items() if key not in mergeable and value not in _NOTHING}
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        extra.add("init_lora_weights")  # others change the base model as well
    if extra:
        name = min(extra)
        raise ModelError(
            f"The adapter '{path}' has {name[:40]}={str(config[name])[:60]!r}, which is not merged "
            "here: merge it with PEFT's merge_and_unload(), save the model, and compress that."
        )
    options: dict[str, Any] = {key: config.get(key, 8) for key in _NUMBERS}
    options |= {key: config.get(key) or False for key in _FLAGS}
    options |= {key: config.get(key) or {} for key in _PATTERNS}
    saved = config.get("modules_to_save") or []
    layers = {match["layer"] for name in tensors if (match := _TENSOR.fullmatch(name))}
    rank = max((min(tensor.shape) for tensor in tensors.values() if tensor.ndim == 2), default=0)
    ranks = [options["r"], *_values(options["rank_pattern"])]
    alphas = [options["lora_alpha"], *_values(options["alpha_pattern"])]
    valid = (
        all(type(value) is int and 0 < value <= rank for value in ranks)
        and all(type(value) in (int, float) and math.isfinite(value) for value in alphas)
        and all(type(options[key]) is bool for key in _FLAGS)
        and all(isinstance(options[key], dict) for key in _PATTERNS)
        and isinstance(saved, list)
        and all(isinstance(name, str) for name in saved)
        and all(_NAME.fullmatch(name) for key in _PATTERNS for name in options[key])
        and all(_NAME.fullmatch(name) for name in saved)
    )
    if not valid or not layers:
        raise ModelError(
            f"The {ADAPTER} of '{path}' is damaged, or does not belong to its {_WEIGHTS}: ranks "
            "are positive integers, alphas are numbers, and patterns are names of layers."
        )
    # The names of the layers that there are tensors for, in place of patterns to match.
    return options | {"target_modules": sorted(layers), "modules_to_save": saved or None}


_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})
"""Values of an option that is not used."""


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else []


def _refuse_tied(model: PreTrainedModel, adapter: Adapter) -> None:
    """Refuse an adapter of a layer that shares its weight with another.

    Merged into one of them it would change both, or set apart what a config says is one.

    Raises:
        ModelError: If there is one.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    adapted = [*adapter.options["target_modules"], *(adapter.options["modules_to_save"] or [])]
    for names in owners.values():
        for name in names if len(names) > 1 else []:
            if any(name == part or name.endswith(f".{part}") for part in adapted):
                raise ModelError(
                    f"The adapter '{adapter.id}' changes '{name}', which is tied to "
                    f"'{next(other for other in names if other != name)}' in the base model: "
                    "merged, it would change both."
                )
