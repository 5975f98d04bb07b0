"""Teach stock transformers checkpoints whose layers are bytes under the names of their weights.

Importing this module registers our own method, `optimum_order`; `import optimum_order` imports this
module as soon as transformers knows about quantization. That is in the middle of transformers'
import, so nothing that imports transformers' models is imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from optimum_order.errors import ArtifactError
from optimum_order.models import hf

METHOD = "optimum_order"
"""The `quant_method` of every encoding of ours; the key `encoding` beside it says which one."""
FIRST_ENCODING = "sparse"
"""What version 0.1.0 wrote as a `quant_method` of its own, with nothing beside it."""

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


class BytesConfig(hf.QuantizationConfigMixin):
    """The `quantization_config` of a config.json; every layer describes itself."""

    method: ClassVar[str]
    """The `quant_method`."""
    dequantize = True  # transformers then forgets after loading that the model was quantized

    def __init__(self, quant_method: str | None = None):
        self.quant_method: Any = quant_method or self.method


class BytesQuantizer(hf.HfQuantizer):
    """Puts `Decode` before everything that transformers does to a tensor of a checkpoint."""

    name: ClassVar[str]
    """The `quant_method`."""

    def decode(self, payload: Tensor) -> Tensor:
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


def register(name: str, decode: DecodeWeight) -> tuple[type[BytesConfig], type[BytesQuantizer]]:
    """Have transformers load a format, from now on and in this process.

    Where the name is taken, its owner keeps it: importing a package never fails because of another.

    Args:
        name: The `quant_method` in config.json.
        decode: Gives the weight (out, in) of a layer's bytes, (bytes,) uint8 on the CPU.

    Returns:
        The classes of the configuration and the quantizer.
    """
    config = type(BytesConfig.__name__, (BytesConfig,), {"method": name})
    members = {"name": name, "decode": staticmethod(decode)}
    quantizer = type(BytesQuantizer.__name__, (BytesQuantizer,), members)
    hf.register_quantization(name, config, quantizer)
    return config, quantizer


# Our own encodings


class OwnConfig(BytesConfig):
    """The `quantization_config` of a folder of ours.

    Args:
        encoding: What the bytes of a layer are.
        quant_method: `METHOD`.
        **unknown: Keys of a later version.

    Raises:
        ArtifactError: If there are any.
    """

    method = METHOD

    def __init__(self, encoding: str = FIRST_ENCODING, quant_method: str = METHOD, **unknown: Any):
        if unknown:
            raise ArtifactError(
                f"The quantization_config has the keys {', '.join(sorted(unknown))}, which this "
                "version of optimum-order does not know: upgrade it."
            )
        super().__init__(quant_method)
        self.encoding = encoding


class OwnQuantizer(BytesQuantizer):
    """Decodes the encodings of ours."""

    name = METHOD

    def decode(self, payload: Tensor) -> Tensor:
        # The formats are above this module and import transformers' models: both can wait until a
        # layer is decoded.
        hook = import_module("optimum_order.formats.transformers_hook")
        config: Any = self.quantization_config
        weight: Tensor = hook.decode(config.encoding, payload)
        return weight


def encoding(entry: Mapping[str, Any]) -> Any:
    """Return the name of the format that a `quantization_config` describes, which nobody checked.

    Args:
        entry: The `quantization_config`.
    """
    return entry.get("encoding" if entry.get("quant_method") == METHOD else "quant_method")


def translated(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a `quantization_config` of version 0.1.0 as one of today; others as they are.

    Args:
        entry: The `quantization_config`.
    """
    if dict(entry) == {"quant_method": FIRST_ENCODING}:
        return {"quant_method": METHOD, "encoding": FIRST_ENCODING}
    return entry


hf.register_quantization(METHOD, OwnConfig, OwnQuantizer)
# The name of 0.1.0 is not registered: another package may own it, now or later.
hf.translate_quantization(FIRST_ENCODING, translated)
