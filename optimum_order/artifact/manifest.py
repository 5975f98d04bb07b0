"""`optimum_order.json`: what was done, to what, with which result. Data only, and never trusted when read.

The full manifest stands in that one file, with a digest of its own canonical form; `config.json` carries the
schema, the order and the manifest's name, and each shard's header carries the order.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimum_order import __version__
from optimum_order.errors import ArtifactError
from optimum_order.files import read_json

FILE = "optimum_order.json"
SCHEMA = 1
KEY = "optimum_order"
"""The top-level key of config.json and of each shard's header."""
PLOT = "optimum_order.png"
"""The picture in the model card."""
DOCUMENTS = re.compile(rf"README\.md|{re.escape(PLOT)}|(LICENSE|NOTICE)(\.md|\.txt)?")
"""Files that may stand beside an artifact. No program reads them, and people, and the Hub itself, edit them there."""

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "order": str,
    "stages": list,
    "schedule": str,
    "format": str,
    "base_model": dict,
    "layers": dict,
    "bytes": dict,
    "files": dict,
    "versions": dict,
    "metrics": dict,
    "digest": str,
}
_LIBRARIES = (
    "torch",
    "transformers",
    "optimum",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "compressed-tensors",
)


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    return {"python": platform.python_version(), KEY: __version__} | {
        n: version(n) for n in _LIBRARIES
    }


def digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON, its own digest left out."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def write(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seal the manifest with its digest and write it into the folder."""
    sealed = manifest | {"digest": digest(manifest)}
    (folder / FILE).write_text(
        json.dumps(sealed, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return sealed


def load(path: str | Path) -> dict[str, Any]:
    """Read the manifest of an artifact folder, checking its form, not its truth.

    Raises:
        ArtifactError: If there is none, or it is not one this version can read.
    """
    file = Path(path) / FILE
    if not file.is_file():
        raise ArtifactError(f"'{path}' has no {FILE}: it is not a folder that optimum-order wrote.")
    manifest = read_json(file)
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"'{file}' has schema {schema}, and this version of optimum-order reads up to {SCHEMA}. Upgrade it."
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest[key], bool):
            raise ArtifactError(f"'{file}' lacks a proper '{key}'; the manifest is damaged.")
    return manifest
