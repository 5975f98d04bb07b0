"""Where a model comes from: a Hub id or folder that can be loaded again, or a model in memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from optimum_order.errors import ArtifactError, ModelError, OptimumOrderError, chainable, redacted
from optimum_order.files import digest, is_folder, size, special, weight_bytes
from optimum_order.layers.state import LayerState, tensor_bytes
from optimum_order.models import hf
from optimum_order.models.adapted import is_adapted
from optimum_order.models.documents import card_facts, documents
from optimum_order.models.inputs import rounds_inputs
from optimum_order.models.lazy import Unloaded, Weights, planned

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
"""The file that makes a folder one of an adapter."""
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
EMBEDDED = ("tiny-llama", "tiny-resnet", "tiny-vit")
"""Models that ship inside the package and can be named like a Hub id."""


def auto_class(config: Any) -> Any:
    """Return the transformers auto class that loads a model with this config.

    A config that names no architecture is that of a base model, unless the model type is one of
    decoders: an encoder such as BERT has a causal head in transformers too, and is none.

    Raises:
        ModelError: If transformers has no such architecture.
    """
    architecture = next(iter(config.architectures or []), None)
    by_type = {name: classes.get(config.model_type) for name, classes in hf.auto_classes().items()}
    if architecture is None:
        is_decoder = not (config.is_encoder_decoder or by_type["AutoModelForMaskedLM"])
        preferred = ("AutoModelForCausalLM", "AutoModel") if is_decoder else ("AutoModel",)
        for name in (*preferred, *by_type):
            if by_type[name] or name in (getattr(config, "auto_map", None) or {}):
                return getattr(transformers, name)
    for name, candidates in by_type.items():
        if architecture in (candidates or ()) or name in (getattr(config, "auto_map", None) or {}):
            return getattr(transformers, name)
    raise ModelError(
        f"The architecture {architecture!r} (model type {config.model_type!r}) is not one that "
        f"transformers {transformers.__version__} loads with any of {', '.join(by_type)}."
    )


def refuse_quantized(config: Any, name: str) -> None:
    """Raise if the weights of a model are codes already.

    Args:
        config: The config of the model.
        name: What to call the model in the error.

    Raises:
        ModelError: If they are.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ModelError(
            f"'{name}' is already quantized ({values.get('quant_method', 'unknown method')}). "
            "Compression starts from dense weights: give the model that it was made from."
        )


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a saved model, without what it says of quantization.

    Raises:
        ArtifactError: If the config cannot be used, or needs code of its own.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ArtifactError(
            f"'{folder}' has a config.json that cannot be used: {reason}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model without weights, on the meta device, in evaluation mode.

    Args:
        config: Its config.
    """
    auto: Any = auto_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    model.eval()
    return model


class Checkpoint:
    """A model on the Hub or in a folder: config and processor are read at once, weights by `load`.

    Args:
        model: A Hub id, a folder, or the name of an embedded model.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; never stored or printed.
        cache_dir: The folder of downloads from the Hub; by default that of huggingface_hub.
        attn_implementation: The attention of transformers; by default what transformers takes.
        chat_template: A Jinja template in place of the tokenizer's; it goes with the result.
        dtype: "auto" for the checkpoint's own, or a torch dtype or its name.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ModelError: If the model does not exist, or is already quantized.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None,
        token: str | None,
        dtype: str | torch.dtype,
        trust_remote_code: bool,
        cache_dir: str | None = None,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
    ):
        name = str(model)
        self.revision = revision
        self.embedded = name in EMBEDDED and not Path(name).exists()
        self._path = (
            str(resources.files("optimum_order") / "assets" / name) if self.embedded else name
        )
        if not self.embedded and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            self._path = str(Path(name).expanduser())
            if not is_folder(self._path):
                raise ModelError(
                    f"There is no folder '{name}'. Give a folder, a Hub id, or one of "
                    f"{list(EMBEDDED)}."
                )
        self.id = name if self.embedded else _public_name(self._path)
        self._dtype = _read_dtype(dtype)
        self._hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "trust_remote_code": trust_remote_code,
        }
        self._attention = attn_implementation
        if is_folder(self._path) and (entry := special(Path(self._path))):
            raise ModelError(
                f"'{entry}' in '{self._path}' is a pipe, a socket or a device, and only files are "
                "read: remove it."
            )
        logger.info("Reading the config and the tokenizer of '%s'", self.id)
        self._refuse_adapter()
        self.commit: str | None = None
        self.adapter: dict[str, Any] | None = None
        """What the manifest says of an adapter that was merged."""
        self.continues: dict[str, Any] | None = None
        """What the manifest of a compressed model says of the runs that made it."""
        self.targets: list[str] | None = None
        self.ignore: list[str] | None = None
        try:
            if not is_folder(self._path):  # a branch may move between two loads
                file: Any = hf.cached_file(
                    self._path,
                    "config.json",
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                )
                self.commit = Path(file).parent.name
                self._hub["revision"] = self.commit
            self.config = transformers.AutoConfig.from_pretrained(self._path, **self._hub)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot read the model '{name}': {_first_line(error, token)}"
            ) from chainable(error, token)
        self.check_dense()
        self.auto = auto_class(self.config)
        self.processor: Any = None
        self.processor_error: ModelError | None = None
        """Why the processor that comes with the model cannot be used: raised where data is read."""
        try:
            self.processor = load_processor(self._path, self._hub)
        except ModelError as error:
            self.processor_error = error
        if chat_template is not None:
            self._set_chat_template(chat_template)

    def _set_chat_template(self, template: str) -> None:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ModelError(
                f"'{self.id}' has no tokenizer, so no conversation is written for the model: leave "
                "out chat_template=... (--chat-template)."
            )
        self.processor.chat_template = template
        tokenizer.chat_template = template

    def _refuse_adapter(self) -> None:
        """Refuse a folder or a repository with an adapter, of which half would be compressed.

        Raises:
            ModelError: If there is one.
        """
        place = {name: self._hub[name] for name in ("revision", "token", "cache_dir")}
        try:
            adapter = hf.cached_file(self._path, ADAPTER, required=False, **place)
        except (OSError, ValueError):
            return  # reading the model says what is wrong
        if adapter:
            raise ModelError(
                f"'{self.id}' holds an adapter ({ADAPTER}), whose weights belong to layers of "
                "another model. Merge it into its base model with merge_adapter=True "
                "(--merge-adapter)."
            )

    def check_dense(self) -> None:
        """Check that the weights of the model are no codes.

        Raises:
            ModelError: If they are.
        """
        refuse_quantized(self.config, self.id)

    def load(self) -> PreTrainedModel:
        """Return the model, fresh from the checkpoint, in evaluation mode on the CPU.

        Raises:
            ModelError: If the weights cannot be read, are not safetensors, or do not fill the
                model.
        """
        logger.info("Loading %s of weights", size(self.bytes))
        return self._from_pretrained()

    def load_empty(self, device: torch.device | str = "cpu") -> Weights:
        """Return the model without its weights, and the weights to be read when they are needed.

        Args:
            device: The device of its buffers, and of its parameters when they are filled.

        Raises:
            ModelError: As in `load`; also if the weights cannot be read a block at a time.
        """
        with planned() as plan:
            model = self._from_pretrained()
        return Weights(model, plan, device)

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights, its parameters on the meta device.

        Where no weights are on this machine, the config alone says what the model is: nobody has
        to download a model to learn that it does not fit.

        Raises:
            ModelError: As in `load_empty`; or if the config describes no model.
        """
        if self.bytes or self._runs_code:
            return self.load_empty().model
        dtype = self.config.dtype if self._dtype == "auto" else self._dtype
        try:
            with init_empty_weights(include_buffers=False):
                model = self.auto.from_config(self.config, dtype=dtype or torch.float32)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"The config of '{self.id}' describes no model: {_first_line(error, None)}"
            ) from error
        return cast(PreTrainedModel, model.eval())

    @property
    def states(self) -> Mapping[str, LayerState]:
        """The layers that are compressed already, by name: none."""
        return {}

    @property
    def unloaded(self) -> Mapping[str, Tensor]:
        """The stored tensors that the model does not load, such as heads for other tasks.

        None are known before the weights are on this machine.

        Raises:
            ModelError: As in `load_empty`.
        """
        # the class of a model with code may read files in ways that nobody can follow
        if self._runs_code or not self.bytes:
            return Unloaded({})
        return self._unloaded

    @functools.cached_property
    def _unloaded(self) -> Mapping[str, Tensor]:
        with planned() as plan:
            self._from_pretrained()
        return Unloaded({key: plan.files[key] for key in plan.unloaded})

    @property
    def origin(self) -> Path | None:
        """The folder of a compressed model, to go on from: None."""
        return None

    @functools.cached_property
    def documents(self) -> dict[str, Path]:
        """Files beside the model that go with it, by their path in the folder."""
        return documents(self._path, self._hub, self.config)

    @functools.cached_property
    def card(self) -> dict[str, Any]:
        """The license and the languages, as the model's card states them."""
        return card_facts(self._path, self._hub)

    @property
    def _runs_code(self) -> bool:
        return bool(self._hub["trust_remote_code"] and getattr(self.config, "auto_map", None))

    def _from_pretrained(self) -> PreTrainedModel:
        try:
            model, info = self.auto.from_pretrained(
                self._path,
                dtype=self._dtype,
                use_safetensors=True,
                output_loading_info=True,
                **({"attn_implementation": self._attention} if self._attention else {}),
                **self._hub,
            )
        except OptimumOrderError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            token = self._hub["token"]
            reason = _first_line(error, token)
            raise ModelError(f"Cannot load the weights of '{self.id}': {reason}") from chainable(
                error, token
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"The checkpoint '{self.id}' lacks {len(missing)} weights of "
                f"{type(model).__name__}, such as '{missing[0]}': they would be random. Give a "
                "complete checkpoint."
            )
        return cast(PreTrainedModel, model.eval())

    @property
    def main_input_name(self) -> str:
        """The name of the model's input: "input_ids", "pixel_values" and so on.

        "input_ids" for a model with its own code.
        """
        classes = hf.auto_classes()[self.auto.__name__].get(self.config.model_type)
        if classes is None:
            return "input_ids"
        return cast(str, getattr(transformers, classes[0]).main_input_name)

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk in bytes, or 0 if no weight files are found."""
        folder = Path(self._path)
        if not folder.is_dir():
            revision = self.commit or self.revision
            file = try_to_load_from_cache(
                self._path, "config.json", self._hub["cache_dir"], revision=revision
            )
            if not isinstance(file, str):
                return 0
            folder = Path(file).parent
        try:
            return weight_bytes(folder)
        except ArtifactError:
            return 0


@dataclass(frozen=True)
class InMemory:
    """A model that is already loaded: copied once, and every `load` copies that copy."""

    model: PreTrainedModel
    processor: Any = None
    id: str = "in-memory"
    revision: str | None = None
    commit: str | None = None
    embedded: bool = False
    unloaded: ClassVar[Mapping[str, Tensor]] = {}
    states: ClassVar[Mapping[str, LayerState]] = {}
    origin: ClassVar[None] = None
    adapter: ClassVar[None] = None
    continues: ClassVar[None] = None
    targets: ClassVar[None] = None
    ignore: ClassVar[None] = None
    documents: ClassVar[Mapping[str, Path]] = {}
    card: ClassVar[Mapping[str, Any]] = {}
    processor_error: ClassVar[ModelError | None] = None
    """A model in memory is all there is."""

    @classmethod
    def of(cls, model: nn.Module, processor: Any = None) -> InMemory:
        """Copy the model.

        Args:
            model: A transformers model.
            processor: Its tokenizer or image processor.

        Raises:
            ModelError: If the model is not a transformers model, is already quantized, has an
                adapter, or if some of its weights are not in memory.
        """
        model = _unwrapped(model)
        made = getattr(model.config, "optimum_order", None)
        if made is not None:
            order = made.get("order") if isinstance(made, dict) else made
            raise ModelError(
                f"The model was compressed by '{order}', and in memory its masks and grids are "
                "lost: give its folder, to go on from there."
            )
        if rounds_inputs(model) or is_adapted(model):
            does = "have an adapter" if is_adapted(model) else "round their inputs"
            raise ModelError(
                f"The model is a compressed one whose layers {does}, and its masks and grids are "
                "lost in memory: save it and give the folder, to go on from there."
            )
        name = model.config.name_or_path or type(model).__name__
        refuse_quantized(model.config, name)
        copied = copy.deepcopy(model)
        for module in copied.modules():
            module._compiled_call_impl = None  # of `model.compile()`
        copied.train(False).to("cpu", memory_format=torch.contiguous_format)
        return cls(copied, processor, _public_name(name))

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.model.config

    @property
    def main_input_name(self) -> str:
        """The name of the model's input."""
        return self.model.main_input_name

    @property
    def bytes(self) -> int:
        """Size of the weights in bytes, each counted once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def load(self) -> PreTrainedModel:
        """Return a copy of the model."""
        return copy.deepcopy(self.model)


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside what torch wraps around a model.

    Raises:
        ModelError: If there is none, or it cannot be taken as it is.
    """
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, _PARALLEL):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{type(model).__name__} has an adapter, whose weights are no layers to compress: "
            "merge it first, with model = model.merge_and_unload()."
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"A transformers model is needed, got {type(model).__name__}.")
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ModelError(
            f"{len(absent)} weights of the model are not in memory, such as '{absent[0]}': it is "
            "offloaded or empty. Load it without offloading, or give its folder and low_memory."
        )
    return model


def weights_digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the sha256 over every tensor of a model, one tensor at a time.

    Args:
        model: A model, or its tensors by name. Name, dtype, shape and bytes of each tensor count.
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    logger.info("Hashing %d tensors of the model", len(tensors))

    def parts() -> Iterator[str | memoryview]:
        for name in sorted(tensors):
            tensor = tensors[name]
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
            yield tensor_bytes(tensor)

    return digest(parts())


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors, of which one at a time is read."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto" or dtype in allowed.values():
        return dtype
    if dtype not in allowed:
        raise ModelError(f"'dtype' must be one of auto, {', '.join(allowed)}, got {dtype!r}.")
    return allowed[dtype]


def _public_name(path: str) -> str:
    """Return what a manifest may call a model: of a local folder its name only."""
    return Path(path).resolve().name if is_folder(path) else path


_PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def load_processor(path: str, hub: dict[str, Any]) -> Any:
    """Return the tokenizer or image processor that comes with a model, or None if none does.

    Args:
        path: A folder or a Hub id.
        hub: `revision`, `token` and `trust_remote_code`, as `from_pretrained` takes them.

    Raises:
        ModelError: If a processor comes with the model and cannot be used.
    """
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            return auto.from_pretrained(path, **hub)
        except Exception as caught:  # a damaged file can raise anything, `Exception` itself too
            error = caught
    token = hub["token"]
    place = {name: hub.get(name) for name in ("revision", "token", "cache_dir")}
    files = {
        name: file
        for name in _PROCESSOR_FILES
        if (file := hf.cached_file(path, name, required=False, **place))
    }
    if not files:
        return None
    if files.keys() <= {"preprocessor_config.json", "processor_config.json"}:
        # the processor of a speech model may be its feature extractor alone
        with contextlib.suppress(Exception):
            return transformers.AutoFeatureExtractor.from_pretrained(path, **hub)
    name = next((name for name, file in files.items() if not _is_readable(file)), next(iter(files)))
    reason = _first_line(error, token)
    if name == "preprocessor_config.json" and find_spec("PIL") is None:
        reason = "it needs the library Pillow. Install it with pip install 'optimum-order[vision]'"
    raise ModelError(
        f"The model has a '{name}' that cannot be used: {reason.rstrip('.')}. Repair it, pass a "
        "'processor', give token ids or pixels, or use methods that need no data: magnitude, rtn, "
        "bitsandbytes."
    ) from chainable(error, token)


def _is_readable(file: str) -> bool:
    """Return whether a file of a processor is what its name says, as far as that is known."""
    try:
        if Path(file).name == "tokenizer.json":
            Tokenizer.from_file(file)
        elif file.endswith(".json"):
            json.loads(Path(file).read_text(encoding="utf-8"))
        elif file.endswith(".txt"):
            Path(file).read_text(encoding="utf-8")
    except Exception:  # tokenizers raises `Exception` itself
        return False
    return True


def _first_line(error: BaseException, token: str | None) -> str:
    return (redacted(str(error), token).strip().splitlines() or [type(error).__name__])[0][:300]
