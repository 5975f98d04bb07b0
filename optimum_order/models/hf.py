"""Every private or unstable API of transformers in use here, each behind a name of our own.

`tests/models/test_hf.py` has a test of each name, and says in which version of transformers the
behavior was seen. When a new version breaks this package, that file says which name needs work.

`transformers.modeling_utils` and `transformers.quantizers` are imported inside functions only: the
import of the second, which the first runs too, calls our hook, which needs this module whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import hub
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_order.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

__all__ = [
    "CheckpointNames",
    "Conv1D",
    "ConversionOps",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "WeightConverter",
    "auto_classes",
    "cached_file",
    "convert",
    "eager_experts",
    "experts_transposed",
    "forget_quantization",
    "is_left_dense",
    "load_without_values",
    "modules_left_dense",
    "register_quantization",
    "remember_conversions",
    "replaced_on_load",
    "sorted_keys",
    "stored_dtype",
    "tensors_to_save",
    "ties",
    "to_checkpoint",
    "translate_quantization",
    "weight_loader",
]


# Architectures


@functools.cache
def auto_classes() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the model classes of each supported auto class, in the order in which to try them.

    Returns:
        The names of the model classes, by the name of the auto class and then by `model_type`.
    """
    from transformers.models.auto import modeling_auto as auto  # not while transformers is imported

    mappings: dict[str, Mapping[str, Any]] = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForQuestionAnswering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSpeechSeq2Seq": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "AutoModelForCTC": auto.MODEL_FOR_CTC_MAPPING_NAMES,
        "AutoModelForAudioClassification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultipleChoice": auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        "AutoModelForNextSentencePrediction": (
            auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES
        ),
        "AutoModelForMaskedImageModeling": auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
        "AutoModelForPreTraining": auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        "AutoModel": auto.MODEL_MAPPING_NAMES,
        "AutoModelForTextEncoding": auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    }
    return {
        name: {
            model_type: (classes,) if isinstance(classes, str) else tuple(classes)
            for model_type, classes in mapping.items()
        }
        for name, mapping in mappings.items()
    }


def cached_file(
    model: str,
    name: str,
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | None = None,
    required: bool = True,
) -> str | None:
    """Return the path of one file of a model, downloaded where necessary.

    Args:
        model: A folder or a Hub id.
        name: The name of the file.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        cache_dir: The folder of downloads; by default that of huggingface_hub.
        required: Whether a missing file or an unreachable Hub is an error.

    Returns:
        The path, or None where the file is missing and not required.

    Raises:
        OSError: If the file is required and cannot be read.
    """
    quiet = {} if required else dict.fromkeys(_QUIET, False)
    place = {"revision": revision, "token": token, "cache_dir": cache_dir}
    return hub.cached_file(model, name, **place, **quiet)


_QUIET = (
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)


# Modules


def experts_transposed(module: nn.Module) -> bool | None:
    """Return whether fused experts store (experts, in, out), not (experts, out, in).

    None for a module that is not one of fused experts.
    """
    transposed = getattr(module, "is_transposed", None)
    return transposed if isinstance(transposed, bool) else None


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run fused experts one at a time while active, so that the inputs of each can be seen.

    Args:
        model: A model; nothing changes where it has no fused experts.
    """
    configs = {
        id(module.config): cast(Any, module.config)
        for module in model.modules()
        if hasattr(module, "is_transposed") and hasattr(module, "config")
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's own record of ties: each tied parameter, and the one that it repeats."""
    return model.all_tied_weights_keys


# Loading


def uncached(model: PreTrainedModel) -> dict[str, bool]:
    """Return the arguments that keep a forward from making a cache of keys and values."""
    text_config = model.config.get_text_config()
    caches = getattr(text_config, "use_cache", None) is not None
    return {"use_cache": False} if caches else {}


def check_savable(model: PreTrainedModel) -> None:
    """Save all but the weights of a model to nowhere, as is done with the weights in the end.

    Raises:
        ModelError: If transformers refuses, as it does with a generation config that contradicts
            itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
        except (ValueError, TypeError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(
                f"transformers will not save this {type(model).__name__}: {reason} Correct "
                "model.generation_config or model.config first."
            ) from error


_LOADING = threading.RLock()
"""Held by the thread whose loading is replaced."""


@contextlib.contextmanager
def weight_loader(
    load: Callable[[PreTrainedModel, Sequence[str], Any, bool], Any],
) -> Iterator[None]:
    """Have `from_pretrained` call `load` in place of its own loading of weights, while active.

    Only this thread's calls: other threads load as usual, and wait here for their turn.

    Args:
        load: Called with the model on the meta device, the checkpoint files, transformers' load
            config, and whether the call is for an adapter; returns transformers' loading info.
    """
    from transformers.modeling_utils import PreTrainedModel

    with _LOADING:
        original = PreTrainedModel._load_pretrained_model
        ours = threading.get_ident()

        def replacement(
            model: Any, state_dict: Any, files: Any, config: Any, *others: Any, **more: Any
        ) -> tuple[Any, Any]:
            if threading.get_ident() != ours:
                return original(model, state_dict, files, config, *others, **more)
            return load(model, files or (), config, bool(others or more)), None

        PreTrainedModel._load_pretrained_model = staticmethod(replacement)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = staticmethod(original)  # type: ignore[method-assign]


class CheckpointNames:
    """Which tensor of a model each stored tensor becomes, or becomes a part of.

    Args:
        model: The model, on any device.
        config: The load config that `weight_loader` passes on.
    """

    def __init__(self, model: PreTrainedModel, config: Any):
        mapping = copy.deepcopy(config.weight_mapping or [])
        self._state = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def destination(self, key: str) -> tuple[str, str, WeightConverter | None] | None:
        """Return where a stored tensor goes.

        Args:
            key: The stored name.

        Returns:
            The first tensor of the model that is made of it, the pattern by which the converter
            knows the stored name, and the converter or None. None if transformers leaves the
            stored tensor out.
        """
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        if name not in self._state and key in self._state:
            name, pattern = rename_source_key(
                key, [], [], base_model_prefix=self._prefix, meta_state_dict=self._state
            )
        if name not in self._state:
            return None
        matching = (c for c in reversed(self._converters) if pattern in c.source_patterns)
        return name, pattern or key, next(matching, None)


def sorted_keys(keys: Iterable[str]) -> list[str]:
    """Return stored names in the order in which transformers loads them: 2 before 10."""
    return sorted(keys, key=dot_natural_key)


def stored_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors dtype such as "BF16", or None if torch has none."""
    from transformers.modeling_utils import str_to_torch_dtype

    return str_to_torch_dtype.get(name)


def convert(
    converter: WeightConverter,
    name: str,
    tensors: Iterable[tuple[str, str, Callable[[], Tensor]]],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """Make tensors of a model from stored tensors, as transformers does.

    Args:
        converter: From `CheckpointNames.destination`; left as it is.
        name: The first tensor of the model that comes of the conversion.
        tensors: For each stored tensor its name, the pattern and a function that reads the values.
        model: The model.

    Returns:
        The tensors by their names in the model.
    """
    converter = copy.deepcopy(converter)
    for key, pattern, read in tensors:
        converter.add_tensor(name, key, pattern, cast(Any, read))
    converted = converter.convert(name, model=model, config=model.config)
    return {
        made: value[0] if isinstance(value, list) else value for made, value in converted.items()
    }


def load_without_values(model: PreTrainedModel, stored: dict[str, Tensor], config: Any) -> Any:
    """Have transformers load tensors without values: it decides names, dtypes and what is missing.

    Args:
        model: On the meta device.
        stored: The stored tensors, on the meta device.
        config: The load config that `weight_loader` passes on.

    Returns:
        transformers' loading info, with `missing_keys`, `mismatched_keys` and `conversion_errors`.
    """
    on_meta = dataclasses.replace(config, device_map={"": "meta"})
    info, _ = convert_and_load_state_dict_in_model(model, stored, on_meta, None)
    return info


# Saving


def tensors_to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what `save_pretrained` saves, by name in the model; of tied tensors only one."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return remove_tied_weights_from_state_dict(tensors, model)


def to_checkpoint(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of a model the names and the layout that they have in a checkpoint.

    Args:
        model: The model; it may be on the meta device.
        tensors: Tensors by their names in the model. Those that transformers fuses into one stored
            tensor must come together.

    Returns:
        The tensors by their stored names. A tensor that is only renamed is the same object.
    """
    return cast("dict[str, Tensor]", revert_weight_conversion(model, tensors))


def remember_conversions(model: PreTrainedModel, conversions: Sequence[Any]) -> None:
    """Have `save_pretrained` and `to_checkpoint` undo these conversions.

    Args:
        model: The model.
        conversions: The conversions by which the model was loaded.
    """
    model._weight_conversions = list(conversions)  # type: ignore[assignment]


# Quantizers


def __getattr__(name: str) -> Any:
    """Return `HfQuantizer`, imported when it is asked for."""
    if name != "HfQuantizer":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer


def register_quantization(
    method: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]
) -> None:
    """Have transformers load a quantization method, unless somebody else has registered it.

    Args:
        method: The `quant_method` in config.json.
        config: The class of its `quantization_config`.
        quantizer: The class that loads it.
    """
    from transformers.quantizers import auto

    if method in auto.AUTO_QUANTIZATION_CONFIG_MAPPING or method in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(method)(config)
    auto.register_quantizer(method)(quantizer)


def forget_quantization(quantizer: Any, model: PreTrainedModel) -> None:
    """Make a model that a quantizer loaded an ordinary one, which is saved as it was loaded.

    Args:
        quantizer: The `HfQuantizer`.
        model: The model, with its weights.
    """
    conversions = getattr(model, "_weight_conversions", None)
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        remember_conversions(model, conversions)


def translate_quantization(
    method: str, translate: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    """Have transformers read a `quantization_config` as another while nobody owns its method.

    Args:
        method: The `quant_method`.
        translate: Return the `quantization_config` to read in place of one; or that one itself.
    """
    from transformers.quantizers import auto

    places: list[tuple[Any, str]] = [
        (auto.AutoQuantizationConfig, "from_dict"),
        (auto.AutoHfQuantizer, "supports_quant_method"),
    ]
    for owner, function in places:
        original = getattr(owner, function)
        if getattr(original, "translates", None) != method:  # else this package is imported again
            setattr(owner, function, staticmethod(_translating(original, method, translate)))


def _translating(
    original: Callable[..., Any],
    method: str,
    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Callable[..., Any]:
    """Return a function of a `quantization_config` that translates it first."""
    from transformers.quantizers import auto

    @functools.wraps(original)
    def function(quantization_config_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            quantization_config_dict = translate(quantization_config_dict)
        return original(quantization_config_dict, *args, **kwargs)

    function.translates = method  # type: ignore[attr-defined]
    return function


def replaced_on_load(model: nn.Module, method: str) -> str | None:
    """Name the first module that transformers swaps for one of another layout on loading a format.

    Args:
        model: The model.
        method: The `quant_method` of the format.

    Returns:
        The name and class of the module, or None if transformers swaps none.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    for name, module in model.named_modules():
        patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
        if patch is not None and method in cast("list[str]", patch["quantization_methods"]):
            return f"'{name}' ({type(module).__name__})"
    return None


def modules_left_dense(model: PreTrainedModel, skip: list[str]) -> list[str]:
    """Return the patterns of modules that transformers leaves dense in a quantized checkpoint.

    Args:
        model: The model.
        skip: The patterns that config.json lists.

    Returns:
        Those patterns, and those of modules that the architecture keeps in float32.
    """
    from transformers.quantizers.base import HfQuantizer

    in_float32 = cast("list[str] | None", model._keep_in_fp32_modules)
    patterns = HfQuantizer.get_modules_to_not_convert(model, skip, in_float32)
    return cast("list[str]", patterns)


def is_left_dense(name: str, patterns: list[str]) -> bool:
    """Return whether transformers leaves a module dense.

    Args:
        name: The name of the module.
        patterns: From `modules_left_dense`.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, patterns)
