"""Files: JSON of unknown origin, sha256, human sizes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from optimum_order.errors import ArtifactError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_BYTES = 256 * 2**20


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        ArtifactError: If it is not one, or larger than any that a model has.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes, which no JSON of a model has")
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"'{file}' cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"'{file}' must hold a JSON object, got {type(data).__name__}.")
    return data


def size(count: float) -> str:
    """A number of bytes in the largest decimal unit that keeps it above one: `11.7 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def sha256(file: Path) -> str:
    """sha256 of a file's bytes."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def weight_bytes(folder: str | Path) -> int:
    """How many bytes the weights of a saved model take on disk.

    Raises:
        ArtifactError: If it has none, or one of them is missing.
    """
    return sum((Path(folder) / shard).stat().st_size for shard in weight_files(Path(folder)))


def weight_files(folder: Path) -> list[str]:
    """The names of the weight files, in order, all of them in the folder itself."""
    if not (folder / INDEX).exists():
        names = [SINGLE]
    else:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ArtifactError(f"{folder / INDEX} has no 'weight_map' from tensors to files.")
        names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"{folder / INDEX} names the file '{name}', which is not a .safetensors beside it."
            )
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing.")
    return names
