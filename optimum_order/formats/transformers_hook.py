"""Teaches stock transformers to load `sparse` checkpoints: importing this module registers them there.

`import optimum_order` has it imported as soon as transformers can load models. What is loaded is an ordinary dense
model, which knows nothing of how it was stored: it can be run, trained, saved and compressed like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.models import hf

METHOD = "sparse"


@hf.register_quantization_config(METHOD)
class SparseConfig(hf.QuantizationConfigMixin):
    """The `quantization_config` of a config.json; every layer describes itself."""

    dequantize = True  # transformers then forgets after loading that there was a quantisation

    def __init__(self, quant_method: str = METHOD):
        self.quant_method: Any = quant_method


class Decode(hf.ConversionOps):
    """Turns the bytes of layers into their weights; what else comes along is passed on as it is.

    Args:
        fit: Whether the weight becomes a parameter as it is, not part of one that transformers puts together.
    """

    dtype: torch.dtype | None = None
    """What the weight is to be loaded in."""

    def __init__(self, fit: bool):
        self.fit = fit

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        return {
            pattern: [self._decode(tensor, full_layer_name, model) for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }

    def _decode(self, tensor: Tensor, name: str, model: Any) -> Tensor:
        from optimum_order.formats.sparse import decode_weight

        if tensor.dtype != torch.uint8:
            return tensor
        weight = decode_weight(tensor.cpu())
        if self.fit:
            parameter = model.get_parameter(name)
            if isinstance(model.get_submodule(name.rpartition(".")[0]), hf.Conv1D):
                weight = weight.T.contiguous()
            if weight.shape != parameter.flatten(1).shape:
                raise ArtifactError(
                    f"'{name}' is {tuple(parameter.shape)}, its stored weight {tuple(weight.shape)}."
                )
            weight = weight.view(parameter.shape)
        return weight.to(tensor.device, self.dtype)


@hf.register_quantizer(METHOD)
class SparseQuantizer(hf.HfQuantizer):
    """Puts `Decode` before everything that transformers does to a tensor of a checkpoint."""

    requires_calibration = (
        True  # there is nothing here that could compress a model while it is loaded
    )

    def update_weight_conversions(self, weight_conversions: Iterable[Any], *args: Any) -> list[Any]:
        self._ours = []
        for conversion in weight_conversions:
            ours = conversion
            if isinstance(conversion, hf.WeightConverter):
                ours = copy.deepcopy(conversion)
                ours.operations = [Decode(fit=False), *ours.operations]
            self._ours.append((ours, conversion))
        # A tensor goes to the first converter that knows its name; this one is for those that no other does.
        return [ours for ours, _ in self._ours] + [
            hf.WeightConverter("weight", "weight", [Decode(fit=True)])
        ]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Decode):
                operation.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # By these the model is saved again, with nothing of ours to be undone. Some versions of transformers (5.24)
        # have forgotten by now which they used.
        hf.remember_conversions(
            model, [theirs for ours, theirs in self._ours if ours.was_used()]
        )
        return model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(hf.HfQuantizer, "get_new_dtype"):
            raise ImportError(
                f"'{METHOD}' needs transformers 5.21 or newer to load, got {transformers.__version__}."
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
