"""The adapter of an artifact, in PEFT's own format: a folder inside the artifact's folder.

`PeftModel.from_pretrained(model, "FOLDER/adapter")` loads it. The files are as little trusted as
any: the manifest says which layers have an adapter of which rank, and no more than that is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import files
from optimum_order.errors import ArtifactError
from optimum_order.layers.low_rank import DTYPES, LowRank
from optimum_order.layers.state import tensor_bytes
from optimum_order.models.source import ADAPTER, auto_class

FOLDER = "adapter"
PACKAGE = "peft"
"""What loading needs beside the packages of the format."""
_WEIGHTS = "adapter_model.safetensors"
METADATA = {"format": "pt"}
"""Of the weight file."""
_TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
"""PEFT's names of tasks for which it adds nothing but `generate`."""


def describe(adapter: LowRank) -> dict[str, Any]:
    """Return what a manifest says of the adapter of one layer."""
    digest = files.digest([tensor_bytes(adapter.a), tensor_bytes(adapter.b)])
    return {"rank": adapter.rank, "dtype": _name(adapter), "digest": digest}


def named(facts: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers that have an adapter, as a manifest says."""
    return [name for name, layer in facts["layers"].items() if layer.get("adapter") is not None]


def write(adapters: Mapping[str, LowRank], model: PreTrainedModel, folder: Path) -> int:
    """Write the adapter of a model.

    Args:
        adapters: Of each layer that has one, by name.
        model: The model; it may be empty.
        folder: The folder of the artifact.

    Returns:
        The size of the weight file in bytes.
    """
    home = folder / FOLDER
    home.mkdir()
    task = _TASKS.get(auto_class(model.config).__name__)
    text = json.dumps(config({n: one.rank for n, one in adapters.items()}, task), indent=2)
    (home / ADAPTER).write_text(f"{text}\n", encoding="utf-8")
    stored = {key: tensor.cpu().contiguous() for key, tensor in tensors(adapters).items()}
    save_file(stored, home / _WEIGHTS, metadata=METADATA)
    return (home / _WEIGHTS).stat().st_size


def tensors(adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the tensors of the weight file by name.

    Args:
        adapters: Of each layer that has one, by name.
    """
    parts = {"A": "a", "B": "b"}
    return {
        _key(name, part): getattr(adapter, attribute)
        for name, adapter in adapters.items()
        for part, attribute in parts.items()
    }


def config(ranks: Mapping[str, int], task: str | None) -> dict[str, Any]:
    """Return the adapter_config.json: scales are 1, so that B A is what a layer adds.

    Args:
        ranks: Of each layer that has an adapter, by name.
        task: PEFT's name of the task, if it has one.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def read(folder: Path, facts: Mapping[str, Any]) -> dict[str, LowRank]:
    """Read the adapter of an artifact, by the names of layers; empty if it has none.

    Args:
        folder: The folder of the artifact.
        facts: Its manifest.

    Raises:
        ArtifactError: If the files are not what the manifest says.
    """
    names = named(facts)
    if not names:
        return {}
    ranks = {name: _rank(folder, facts["layers"][name]) for name in names}
    home = folder / FOLDER
    stated = files.read_json(home / ADAPTER)
    if stated != config(ranks, stated.get("task_type")):
        raise ArtifactError(f"'{home / ADAPTER}' does not fit the layers of the manifest.")
    try:
        with safe_open(home / _WEIGHTS, framework="pt") as opened:
            expected = {_key(name, part) for name in names for part in "AB"}
            if set(opened.keys()) != expected:
                raise ArtifactError(f"'{home / _WEIGHTS}' holds the adapters of other layers.")
            adapters = {}
            for name, rank in ranks.items():
                rows, inputs = facts["layers"][name]["shape"]
                shapes = {"A": [rank, inputs], "B": [rows, rank]}
                for part, shape in shapes.items():
                    if opened.get_slice(_key(name, part)).get_shape() != shape:
                        raise ArtifactError(f"The adapter of '{name}' has another shape.")
                parts = {part: opened.get_tensor(_key(name, part)) for part in shapes}
                adapters[name] = LowRank(parts["A"], parts["B"])
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{home / _WEIGHTS}' cannot be read: {error}.") from error
    for name, adapter in adapters.items():
        if adapter.a.dtype not in DTYPES or adapter.b.dtype != adapter.a.dtype:
            raise ArtifactError(f"The adapter of '{name}' is not in 16 bits.")
    return adapters


def _rank(folder: Path, layer: Mapping[str, Any]) -> int:
    entry = layer["adapter"]
    rank = entry.get("rank") if isinstance(entry, dict) else None
    if type(rank) is not int or not 0 < rank < min(layer["shape"]):
        raise ArtifactError(
            f"The manifest of '{folder}' says of an adapter that its rank is {rank!r}."
        )
    return rank


def _key(name: str, part: str) -> str:
    return f"base_model.model.{name}.lora_{part}.weight"


def _name(adapter: LowRank) -> str:
    return str(adapter.a.dtype).removeprefix("torch.")
