"""Compress a model while transformers loads it: `OptimumOrderConfig` as `quantization_config`."""

from __future__ import annotations

from typing import Any

import torch

from optimum_order.calibration.execution import PAUSES
from optimum_order.compressor import JointCompressor
from optimum_order.engine.choices import Pause, Schedule
from optimum_order.engine.recipe import Recipe
from optimum_order.errors import ModelError, OrderError, unknown
from optimum_order.models import hf
from optimum_order.models.source import load_processor
from optimum_order.order import Order

METHOD = "optimum_order_on_load"
_CHANGING = ("inputs", "reshape", "transform", "adapt")
"""Kinds of stage after which the model is another than the one that transformers is loading."""


class OptimumOrderConfig(hf.QuantizationConfigMixin):
    """Has `from_pretrained` of transformers compress the model that it loads.

    `AutoModelForCausalLM.from_pretrained(name, quantization_config=OptimumOrderConfig("gptq:4"))`
    returns an ordinary model with the compressed values. Its attribute `optimum_order` is the
    `CompressedModel`, which saves the model as small as it is. The model must fit into the memory
    of one device twice over; larger ones are for `JointCompressor`.

    Args:
        order: The stages, such as "wanda:0.5 > gptq:4". Stages that make the model smaller or
            rewrite it are refused.
        calibration: The calibration data, as `JointCompressor` takes it.
        processor: The tokenizer or image processor; by default the one that comes with the model.
        schedule: "stage" or "block".
        pause: "auto", "block" or "group".
        settings: `calibration_samples`, `sequence_length`, `seed`, `calibration_dtype`, `device`,
            `targets` and `ignore`, as `JointCompressor` takes them.

    Raises:
        OrderError: If the order cannot be read, or there is no such schedule or pause.
    """

    dequantize = True  # transformers then counts the model as an ordinary one

    def __init__(
        self,
        order: str,
        calibration: Any = None,
        processor: Any = None,
        schedule: Schedule = "stage",
        pause: Pause = "auto",
        **settings: Any,
    ):
        settings.pop("quant_method", None)
        self.quant_method: Any = METHOD
        recipe = Recipe.of(Order.of(order), schedule)
        changing = [str(one.stage) for one in recipe.methods if one.kind in _CHANGING]
        if changing:
            raise OrderError(
                f"'{changing[0]}' makes another model of the one that is being loaded: use "
                "JointCompressor.from_pretrained(...).compress(...) and save its result."
            )
        if pause not in ("auto", *PAUSES):
            raise OrderError(unknown("pause", pause, ["auto", *PAUSES]))
        self.order = str(recipe.order)
        self.schedule: Schedule = schedule
        self.pause: Pause = pause
        self.settings = settings
        self._calibration = calibration
        self._processor = processor

    def to_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON: all but data and processor."""
        names = ("quant_method", "order", "schedule", "pause")
        return {name: getattr(self, name) for name in names} | self.settings

    def compress(self, model: Any) -> None:
        """Compress a model in place.

        Args:
            model: The model, as it was loaded.

        Raises:
            OptimumOrderError: As `JointCompressor.compress`.
        """
        processor = self._processor
        needs_data = Recipe.of(Order.of(self.order)).needs_data
        if processor is None and needs_data:
            hub = {"revision": getattr(model.config, "_commit_hash", None), "token": None}
            hub |= {"trust_remote_code": False}
            processor = load_processor(model.config.name_or_path, hub)
        compressor = JointCompressor(
            model, processor, calibration=self._calibration, **self.settings
        )
        compressed = compressor.compress(self.order, self.schedule, pause=self.pause)
        values = compressed.model.state_dict()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(values[name])
        model.optimum_order = compressed


class OnLoad(hf.HfQuantizer):
    """Compresses a model when all of its weights are loaded."""

    requires_calibration = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a compressed checkpoint, and a model on several devices.

        Raises:
            ModelError: If it is one.
        """
        if self.pre_quantized:
            raise ModelError(
                "The checkpoint is quantized already: give its folder to JointCompressor, to go on "
                "from there."
            )
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        several = torch.cuda.device_count() > 1 and isinstance(device_map, str)
        if len(places) > 1 or places & {"disk", "meta"} or several:
            raise ModelError(
                f"A model is compressed on one device, got {device_map!r} as 'device_map'. Leave "
                "it out or name a device such as 'cuda:0'; what fits no device is compressed block "
                "by block by the 'compress' of a JointCompressor, with 'low_memory' and a "
                "'work_dir'."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Return the one device there is in place of "auto" and its like."""
        if isinstance(device_map, str):
            return {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        return device_map

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config: Any = self.quantization_config
        hf.forget_quantization(self, model)
        config.compress(model)
        return model

    def is_serializable(self) -> bool:
        """Return that the model can be saved, as an ordinary one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: as an ordinary one."""
        return True


hf.register_quantization(METHOD, OptimumOrderConfig, OnLoad)
