"""What the formats share that store a layer as bytes under the name of its dense weight.

A layer is one tensor of bytes under the name of the dense weight, `<layer>.weight`. So whatever
transformers does to checkpoints of an architecture, renaming parameters and fusing experts, it does
to these bytes too; and a reader that does not know the format stops, because one dimension of uint8
fits no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Codec, Config, Layers
from optimum_order.formats.layout import Layout, Piece
from optimum_order.layers.state import LayerState
from optimum_order.models.quantizer import METHOD
from optimum_order.models.units import Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a weight, by the number that a header has for each."""
MOST_INPUTS = 2**20
"""Whole rows are decoded at a time, so one row alone bounds the memory of decoding."""


class LayerBytes(Codec):
    """A codec whose layers are bytes, which `import optimum_order` teaches transformers to read."""

    stock = False
    packages = ("optimum-order",)
    import_first = "optimum_order"
    nothing: ClassVar[str]
    """What is said of a model that has no layer to encode."""

    def why_not(self, target: Target, state: LayerState) -> str | None:
        if state.weight.dtype not in DTYPES:
            return (
                f"its weights are {state.weight.dtype}; they must be float32, bfloat16 or float16"
            )
        if state.weight.shape[1] > MOST_INPUTS:
            return f"it has {state.weight.shape[1]} inputs, and may have {MOST_INPUTS} at most"
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        if not layers.states:
            return self.nothing
        for name, target, _ in layers:
            if not _stored_alone(layout, target, layout.pieces(target)):
                return (
                    f"Layer '{name}' is not stored in tensors of its own in this model's "
                    "checkpoints."
                )
        return None

    def variant(self, layers: Layers) -> str:
        return "sparse"  # what is tried is where transformers looks for bytes, not what they are

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {}  # every layer describes itself

    def loads_dense(self, layers: Layers) -> bool:
        return True

    def quantization_config(self, layout: Layout, layers: Layers) -> Config | None:
        return {"quant_method": METHOD, "encoding": self.name}

    def payload(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the bytes of a layer.

        Raises:
            ArtifactError: If it has other tensors.
        """
        if set(tensors) != set(self.tensors):
            raise ArtifactError(
                f"a {self.name} layer has the tensor 'weight' alone, got "
                f"{', '.join(sorted(tensors))}"
            )
        return tensors["weight"]


def checked_bytes(payload: Tensor, name: str, least: int) -> NDArray[Any]:
    """Return the bytes of a layer as an array.

    Args:
        payload: A tensor from a file that nobody has checked.
        name: Name of the format.
        least: Bytes of its header.

    Raises:
        ArtifactError: If it is not one dimension of enough bytes.
    """
    if payload.dtype != torch.uint8 or payload.ndim != 1 or len(payload) < least:
        raise ArtifactError(
            f"a {name} layer is one dimension of at least {least} uint8, got "
            f"{payload.dtype} {tuple(payload.shape)}"
        )
    data: NDArray[Any] = payload.numpy()
    return data


def _stored_alone(layout: Layout, target: Target, pieces: tuple[Piece, ...]) -> bool:
    """Return whether the tensors of a layer hold rows of its matrix and nothing else."""
    one = len(pieces) == 1 and pieces[0].key not in layout.converted
    if target.kind == "conv2d":
        alone = one and target.rows is None
    elif target.transposed:  # after loading, the module says so: it is a Conv1D
        alone = one and target.kind == "conv1d"
    else:
        alone = len(pieces) > 0 and all(piece.whole for piece in pieces)
    return alone and all(piece.key.endswith(".weight") for piece in pieces)
