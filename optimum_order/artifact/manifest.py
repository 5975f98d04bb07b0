"""`optimum_order.json`: what was done, to what, with which result. Data only, never trusted.

The full manifest is in that one file, with a digest of its own canonical form; `config.json`
carries the schema, the order and the manifest's name, and the header of each weight file carries
the order.
"""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimum_order import __version__, files
from optimum_order.errors import ArtifactError

FILE = "optimum_order.json"
SCHEMA = 1
KEY = "optimum_order"
"""The top-level key of config.json and of the header of each weight file."""
PLOT = "optimum_order.png"
"""The picture in the model card."""
DOCUMENTS = re.compile(rf"README\.md|{re.escape(PLOT)}|(LICENSE|NOTICE)(\.md|\.txt)?")
"""Files that may stand beside an artifact: no program reads them, people and the Hub edit them."""

_REQUIRED: dict[str, type] = {
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
    """Return the versions that a run depends on."""
    ours = {"python": platform.python_version(), KEY: __version__}
    return ours | {library: version(library) for library in _LIBRARIES}


def digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of the manifest's canonical JSON, its own digest left out."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return files.digest([text])


def write(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seal the manifest with its digest and write it.

    Args:
        manifest: The manifest, with or without a digest.
        folder: The folder of the artifact.

    Returns:
        The manifest with its digest.
    """
    sealed = manifest | {"digest": digest(manifest)}
    text = json.dumps(sealed, indent=2, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    return sealed


def load(path: str | Path) -> dict[str, Any]:
    """Read the manifest of an artifact, checking its form, not its truth.

    Args:
        path: The folder of the artifact.

    Raises:
        ArtifactError: If there is none, or it is not one that this version can read.
    """
    folder = Path(path)
    file = folder / FILE
    if not files.is_folder(folder) or not os.path.lexists(file):
        raise ArtifactError(f"'{path}' has no {FILE}: it is not a folder that optimum-order wrote.")
    if not files.is_plain(file, folder):
        raise ArtifactError(f"'{file}' is a link or no file at all, and is not read.")
    manifest = files.read_json(file)
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"'{file}' has schema {schema}, and this version of optimum-order reads up to "
            f"{SCHEMA}. Upgrade it."
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest[key], bool):
            raise ArtifactError(f"'{file}' lacks a proper '{key}'; the manifest is damaged.")
    return manifest
