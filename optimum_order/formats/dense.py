"""Ordinary safetensors: the values the model has. Holds everything, compresses nothing on disk."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import Format, Layers, Layout
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target


class Dense(Format):
    """The weight as it is. Its grid is not stored, so `decode` gives none."""

    name = "dense"
    summary = "ordinary safetensors, as stock transformers writes them"
    tensors = ("weight",)

    def why_not(self, target: Target, state: LayerState) -> str | None:
        return None

    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        return None

    def encodes(self, state: LayerState) -> bool:
        return False

    def scheme(self, state: LayerState) -> dict[str, Any]:
        return {}

    def encode(self, state: LayerState) -> dict[str, Tensor]:
        return {"weight": state.weight}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        weight = tensors["weight"]
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ArtifactError(
                f"a dense layer must be a floating-point matrix, got {weight.dtype} {weight.ndim}-D"
            )
        return LayerState(weight)

    def quantization_config(self, layout: Layout, layers: Layers) -> dict[str, Any] | None:
        return None

    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {}
