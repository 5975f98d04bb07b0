"""Ordinary safetensors: the values of the model. Holds every layer, compresses nothing on disk."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Codec, Layers
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target


class Dense(Codec):
    """The weight as it is. The grid is not stored, so `decode` returns none."""

    name = "dense"
    summary = "ordinary safetensors, as stock transformers writes them"

    def why_not(self, target: Target, state: LayerState) -> str | None:
        return None

    def encodes(self, state: LayerState) -> bool:
        return False

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        return {"weight": state.weight}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        weight = tensors.get("weight")
        if weight is None:
            raise ArtifactError(f"a dense layer has the tensor 'weight', got {', '.join(tensors)}")
        is_float = weight.is_floating_point() and weight.element_size() > 1
        if weight.ndim != 2 or not is_float:
            raise ArtifactError(
                "a dense layer must be a floating-point matrix, got "
                f"{weight.dtype} with {weight.ndim} dimensions"
            )
        return LayerState(weight)

    def loads_dense(self, layers: Layers) -> bool:
        return True
