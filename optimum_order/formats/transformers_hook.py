"""Teach stock transformers to load formats whose layers are bytes under the names of their weights.

Importing this module registers `sparse`, and `import optimum_order` imports it as soon as
transformers can load models. A plug-in registers its own format. What is loaded is an ordinary
dense model, which knows nothing of how it was stored: it can be run, trained, saved and compressed
like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.models import hf

METHOD = "sparse"

DecodeWeight = Callable[[Tensor], Tensor]
"""The weight (out, in) that the bytes of a layer, (bytes,) uint8, stand for."""


class Decode(hf.ConversionOps):
    """Turns the bytes of layers into their weights, and passes other tensors on as they are.

    Args:
        decode: Gives the weight of a layer's bytes.
        fit: Whether the weight becomes a parameter as it is, not part of one that transformers puts
            together.
    """

    dtype: torch.dtype | None = None
    """The dtype in which to load the weight."""

    def __init__(self, decode: DecodeWeight, fit: bool):
        self.decode = decode
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
        if tensor.dtype != torch.uint8:
            return tensor
        weight = self.decode(tensor.cpu())
        if self.fit:
            parameter = model.get_parameter(name)
            if isinstance(model.get_submodule(name.rpartition(".")[0]), hf.Conv1D):
                weight = weight.T.contiguous()
            if weight.shape != parameter.flatten(1).shape:
                raise ArtifactError(
                    f"'{name}' is {tuple(parameter.shape)}, its stored weight "
                    f"{tuple(weight.shape)}."
                )
            weight = weight.view(parameter.shape)
        return weight.to(tensor.device, self.dtype)


class BytesQuantizer(hf.HfQuantizer):
    """Puts `Decode` before everything that transformers does to a tensor of a checkpoint."""

    name: ClassVar[str]
    """The name of the format."""

    @staticmethod
    def decode(payload: Tensor) -> Tensor:
        """Return the weight of a layer's bytes; `register` puts the function of a format here."""
        raise NotImplementedError

    requires_calibration = True  # nothing here could compress a model while it is loaded

    def update_weight_conversions(self, weight_conversions: Iterable[Any], *args: Any) -> list[Any]:
        self._pairs = []
        for theirs in weight_conversions:
            ours = theirs
            if isinstance(theirs, hf.WeightConverter):
                ours = copy.deepcopy(theirs)
                ours.operations = [Decode(self.decode, fit=False), *ours.operations]
            self._pairs.append((ours, theirs))
        # A tensor goes to the first converter that knows its name; the last is for those that no
        # other knows.
        rest = hf.WeightConverter("weight", "weight", [Decode(self.decode, fit=True)])
        return [ours for ours, _ in self._pairs] + [rest]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Decode):
                operation.dtype = dtype
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # The model is saved again by these, with nothing of ours to be undone. Some versions of
        # transformers (5.24) have forgotten by now which ones they used.
        used = [theirs for ours, theirs in self._pairs if ours.was_used()]
        hf.remember_conversions(model, used)
        return model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(hf.HfQuantizer, "get_new_dtype"):
            raise ImportError(
                f"'{self.name}' needs transformers 5.21 or newer to load, got "
                f"{transformers.__version__}."
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register(
    name: str, decode: DecodeWeight
) -> tuple[type[hf.QuantizationConfigMixin], type[BytesQuantizer]]:
    """Have transformers load a format, from now on and in this process.

    Args:
        name: The `quant_method` in config.json.
        decode: Gives the weight (out, in) of a layer's bytes, (bytes,) uint8 on the CPU.

    Returns:
        The classes of the configuration and the quantizer that transformers then uses.
    """

    class BytesConfig(hf.QuantizationConfigMixin):
        """The `quantization_config` of a config.json; every layer describes itself."""

        dequantize = True  # transformers then forgets after loading that the model was quantized

        def __init__(self, quant_method: str = name):
            self.quant_method: Any = quant_method

    hf.register_quantization_config(name)(BytesConfig)
    members = {"name": name, "decode": staticmethod(decode)}
    quantizer = type(BytesQuantizer.__name__, (BytesQuantizer,), members)
    hf.register_quantizer(name)(quantizer)
    return BytesConfig, quantizer


def _decode_sparse(payload: Tensor) -> Tensor:
    from optimum_order.formats.sparse import decode_weight

    return decode_weight(payload)


SparseConfig, SparseQuantizer = register(METHOD, _decode_sparse)
