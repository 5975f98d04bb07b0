"""Where a model comes from: a Hub id or folder that can be loaded again and again, or a model in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file, is_vision_available

from optimum_order.errors import ArtifactError, ModelError, OptimumOrderError, chainable, redacted
from optimum_order.files import weight_bytes
from optimum_order.layers.state import tensor_bytes
from optimum_order.models.lazy import Weights, give_memory_back, planned

EMBEDDED = ("tiny-llama", "tiny-resnet", "tiny-vit")
"""Models that ship inside the package and can be named like a Hub id."""

# The auto classes a checkpoint may be loaded with, by the architecture its config names; nothing else is imported.
_AUTO = [
    (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        transformers.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        transformers.AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        transformers.AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (transformers.AutoModel, modeling_auto.MODEL_MAPPING_NAMES),
]


def auto_class(config: Any) -> type:
    """The transformers auto class that loads a model with this config.

    Raises:
        ModelError: If transformers has no such architecture.
    """
    architecture = next(iter(config.architectures or []), None)
    for auto, names in _AUTO:
        known = names.get(config.model_type, ())
        if (architecture is None and known) or architecture in (
            (known,) if isinstance(known, str) else known
        ):
            return auto
        if auto.__name__ in getattr(config, "auto_map", {}):
            return auto
    raise ModelError(
        f"The architecture {architecture!r} (model type {config.model_type!r}) is not one that transformers "
        f"{transformers.__version__} loads as a causal LM, classifier, encoder or masked LM."
    )


def refuse_quantized(config: Any, name: str) -> None:
    """Raise ModelError if the model's weights are already codes."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ModelError(
            f"'{name}' is already quantised ({values.get('quant_method', 'unknown method')}). Compression starts from "
            "dense weights: give the model it was made from."
        )


class Checkpoint:
    """A model on the Hub or in a folder. Its config and processor are read at once, its weights by `load`.

    Args:
        model: A Hub id, a folder, or the name of an embedded model.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; never stored or printed.
        dtype: "auto" for the checkpoint's own, or a torch dtype or its name.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ModelError: If there is no such model, or it is already quantised.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None,
        token: str | None,
        dtype: str,
        trust_remote_code: bool,
    ):
        given = str(model)
        self.revision = revision
        self.embedded = given in EMBEDDED and not Path(given).exists()
        self._path = (
            str(resources.files("optimum_order") / "assets" / given) if self.embedded else given
        )
        if not self.embedded and (given.startswith((".", "/", "~")) or given.count("/") > 1):
            self._path = str(Path(given).expanduser())
            if not Path(self._path).is_dir():
                raise ModelError(
                    f"There is no folder '{given}'. Give a folder, a Hub id, or one of {list(EMBEDDED)}."
                )
        self.id = given if self.embedded else _public_name(self._path)
        self._dtype = _read_dtype(dtype)
        self._hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "trust_remote_code": trust_remote_code,
        }
        self.commit = None
        try:
            if not Path(self._path).is_dir():  # a branch may move between two loads
                self.commit = Path(
                    cached_file(self._path, "config.json", revision=revision, token=token)
                ).parent.name
                self._hub["revision"] = self.commit
            self.config = transformers.AutoConfig.from_pretrained(self._path, **self._hub)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot read the model '{given}': {_first_line(error, token)}"
            ) from chainable(error, token)
        refuse_quantized(self.config, self.id)
        self.auto = auto_class(self.config)
        self.processor = load_processor(self._path, self._hub)

    def load(self) -> PreTrainedModel:
        """The model, fresh from the checkpoint, in evaluation mode on the CPU.

        Raises:
            ModelError: If the weights cannot be read, are not safetensors, or do not fill the model.
        """
        return self._from_pretrained()

    def load_empty(self, device: torch.device | str = "cpu") -> Weights:
        """The same model without its weights, and the weights to be read when they are needed.

        Args:
            device: Where its buffers are, and its parameters when they are there.

        Raises:
            ModelError: As in `load`; also if it is a model whose weights cannot be read a block at a time.
        """
        give_memory_back()
        with planned() as plan:
            model = self._from_pretrained()
        return Weights(model, plan, device)

    def _from_pretrained(self) -> PreTrainedModel:
        try:
            model, info = self.auto.from_pretrained(
                self._path,
                dtype=self._dtype,
                use_safetensors=True,
                output_loading_info=True,
                **self._hub,
            )
        except OptimumOrderError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            token = self._hub["token"]
            reason = _first_line(error, token)
            raise ModelError(f"Cannot load the weights of '{self.id}': {reason}") from chainable(
                error, token
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"The checkpoint '{self.id}' lacks {len(missing)} weights of {type(model).__name__}, such as "
                f"'{missing[0]}': they would be random. Give a complete checkpoint."
            )
        return model.eval()

    @property
    def main_input_name(self) -> str:
        """What the model reads: "input_ids", "pixel_values" and so on. Of a model with its own code, "input_ids"."""
        known = next(names for auto, names in _AUTO if auto is self.auto).get(
            self.config.model_type
        )
        if known is None:
            return "input_ids"
        return getattr(transformers, known if isinstance(known, str) else known[0]).main_input_name

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, or 0 where they cannot be found."""
        folder = Path(self._path)
        if not folder.is_dir():
            found = try_to_load_from_cache(
                self._path, "config.json", revision=self.commit or self.revision
            )
            if not isinstance(found, str):
                return 0
            folder = Path(found).parent
        try:
            return weight_bytes(folder)
        except ArtifactError:
            return 0


@dataclass(frozen=True)
class InMemory:
    """A model that is already loaded; its weights are copied once, and every `load` is a copy of that copy."""

    model: PreTrainedModel
    processor: Any = None
    id: str = "in-memory"
    revision: str | None = None
    commit: str | None = None
    embedded: bool = False

    @classmethod
    def of(cls, model: nn.Module, processor: Any = None) -> InMemory:
        """Copy the model.

        Raises:
            ModelError: If it is not a transformers model, or is already quantised.
        """
        if not isinstance(model, transformers.PreTrainedModel):
            raise ModelError(f"A transformers model is needed, got {type(model).__name__}.")
        name = model.config.name_or_path or type(model).__name__
        refuse_quantized(model.config, name)
        copied = copy.deepcopy(model).eval().to("cpu", memory_format=torch.contiguous_format)
        return cls(copied, processor, _public_name(name))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def main_input_name(self) -> str:
        return self.model.main_input_name

    @property
    def bytes(self) -> int:
        """Size of the weights, each counted once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def load(self) -> PreTrainedModel:
        return copy.deepcopy(self.model)


def weights_digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over every tensor of a model: name, dtype, shape and bytes, in order of name, one tensor at a time."""
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto" or dtype in allowed.values():
        return dtype
    if dtype not in allowed:
        raise ModelError(f"'dtype' must be one of auto, {', '.join(allowed)}, got {dtype!r}.")
    return allowed[dtype]


def _public_name(path: str) -> str:
    """What a manifest may call a model: of a local folder its name only."""
    return Path(path).resolve().name if Path(path).is_dir() else path


_PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


def load_processor(path: str, hub: dict[str, Any]) -> Any:
    """The tokenizer or image processor that comes with the model, or None if none does."""
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            return auto.from_pretrained(path, **hub)
        except (OSError, ValueError) as caught:
            error = caught
    for name in _PROCESSOR_FILES:
        if cached_file(
            path,
            name,
            revision=hub["revision"],
            token=hub["token"],
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        ):
            token = hub["token"]
            reason = _first_line(error, token)
            if name == "preprocessor_config.json" and not is_vision_available():
                reason = "it needs the library Pillow. Install it with pip install 'optimum-order[vision]'"
            raise ModelError(
                f"The model has a '{name}' that cannot be used: {reason}"
            ) from chainable(error, token)
    return None


def _first_line(error: BaseException, token: str | None) -> str:
    return (redacted(str(error), token).strip().splitlines() or [type(error).__name__])[0][:300]
