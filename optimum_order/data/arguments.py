"""Arguments of a forward as a processor makes them: any named tensors, one row for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.draws import choose, shortage
from optimum_order.data.samples import Purpose, Samples, check_tokens
from optimum_order.errors import DataError
from optimum_order.models.rehearsal import takes

FILE = ".safetensors"
_MOST_AT_ONCE = 64
_INTEGERS_AT_ONCE = 2048
_FLOATS_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class Arguments(Samples):
    """Samples that are given as the arguments of a forward.

    Args:
        arguments: The tensors by the names of the arguments, each (samples, ...); "labels" may be
            among them.
        source: The source as the user named it; only the file name of a local path.
        note: A remark for the user, or "".
        largest_batch: The most samples that the model takes in one forward, or None.
    """

    arguments: Mapping[str, Tensor]
    source: str
    note: str = ""
    largest_batch: int | None = None
    unit = "sample"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.arguments)

    @property
    def batch_size(self) -> int:
        limits = [_MOST_AT_ONCE]
        for tensor in self.arguments.values():
            most = _FLOATS_AT_ONCE if tensor.is_floating_point() else _INTEGERS_AT_ONCE
            limits.append(most // max(1, tensor[0].numel()))
        return max(1, min(limits))

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "arguments": {
                name: list(tensor.shape[1:]) for name, tensor in sorted(self.arguments.items())
            }
        }

    def take(self, index: Tensor) -> Arguments:
        taken = {name: tensor[index] for name, tensor in self.arguments.items()}
        return replace(self, arguments=taken)

    def check(self, model: PreTrainedModel) -> None:
        allowed = takes(model)
        for name in self.arguments:
            if name not in allowed:
                raise DataError(
                    f"The forward of {type(model).__name__} takes no '{name}', which is in "
                    f"{self.source}. It takes {', '.join(allowed)}."
                )
        if "input_ids" in self.arguments:
            check_tokens(model, self.arguments["input_ids"], self.source)


def is_source(source: Any) -> bool:
    """Return whether a source is arguments of a forward: a mapping, or a .safetensors file."""
    if isinstance(source, Mapping):
        return True
    return isinstance(source, (str, Path)) and str(source).lower().endswith(FILE)


def load(
    source: Any, *, samples: int | None, seed: int = 0, purpose: Purpose = "calibration"
) -> Arguments:
    """Return samples of named tensors.

    Args:
        source: A mapping of names to tensors or arrays, such as a processor returns, or the path of
            a .safetensors file.
        samples: Samples to take; None takes all. A source with fewer gives all and a note.
        seed: The permutation that a calibration draws from. An evaluation takes the first samples.
        purpose: The use of the samples.

    Raises:
        DataError: If the source cannot be read, or its tensors are not one row for each sample.
    """
    name = "arguments in memory"
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        name = path.name
        source = _read(path)
    tensors = {str(key): _tensor(str(key), value, name) for key, value in source.items()}
    counts = {key: len(tensor) for key, tensor in tensors.items()}
    if not tensors or len(set(counts.values())) != 1 or 0 in counts.values():
        sizes = ", ".join(f"{key}: {count}" for key, count in counts.items()) or "nothing"
        raise DataError(
            f"{name} must hold tensors of as many rows as there are samples, got {sizes}."
        )
    count = next(iter(counts.values()))
    index = choose(count, samples, seed if purpose == "calibration" else None)
    note = shortage(name, count, samples, "sample")
    return Arguments({key: tensor[index] for key, tensor in tensors.items()}, name, note)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"The file '{path}' does not exist. Give the path of a {FILE} file.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise DataError(
            f"'{path.name}' is not a {FILE} file, or it is damaged. Write it anew."
        ) from None


def _tensor(name: str, value: Any, source: str) -> Tensor:
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            value = None
    if not isinstance(value, Tensor) or value.ndim == 0 or value.is_complex():
        raise DataError(
            f"'{name}' of {source} must be a tensor with one row for each sample. Give what a "
            "processor makes with return_tensors='pt'."
        )
    tensor = value.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
