"""A model, its data and its settings: what all verbs of a compressor share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from optimum_order import evaluation
from optimum_order.artifact import manifest
from optimum_order.calibration.execution import PAUSES, Execution
from optimum_order.data.draws import Draws
from optimum_order.data.fit import fitted, usable_length
from optimum_order.data.load import load_evaluation, load_samples, reads_images, reads_text
from optimum_order.data.samples import Samples
from optimum_order.engine.choices import CalibrationDType, Embeddings
from optimum_order.engine.recipe import EMBEDDINGS, KEPT, Recipe, with_embedding
from optimum_order.engine.reshape import Outline, outlines
from optimum_order.engine.runner import Batches, Runner
from optimum_order.errors import DataError, ModelError, OrderError, unknown
from optimum_order.estimate.size import empty
from optimum_order.estimate.waiting import in_flight
from optimum_order.evaluation import Measurement, Metric
from optimum_order.models import precision
from optimum_order.models.rehearsal import outline
from optimum_order.models.source import Checkpoint, InMemory, weights_digest
from optimum_order.models.units import Unit, embedding_name, find_units
from optimum_order.order import Order

logger = logging.getLogger(__name__)

_LENGTH = 512
_WINDOWS = 64
_IMAGES = 1000
"""Samples that orders are compared on: enough for differences that matter, few enough for hundreds
of measurements."""


class Session:
    """A model, its calibration data and its settings.

    Args:
        model: A transformers model in memory, whose weights are copied once, or a checkpoint.
        processor: Its tokenizer or image processor; needed for text or images and saved with the
            result.
        calibration: A .txt, .csv, .json, .jsonl or .parquet path, a Hub dataset as
            `id[:config][:split][:column]`, `wikitext2`, `c4`, `ultrachat`, `builtin`, a list of
            texts or conversations, or a tensor of token ids.
            For a model that reads images a folder of images, a dataset, `builtin`, a list of PIL
            images or uint8 arrays, or a tensor of pixels. For a model that reads sounds a folder of
            .wav files, a dataset or a list of arrays. For any model the arguments of its forward,
            as a dict of tensors or a .safetensors file. None is an error only if a stage needs
            data.
        calibration_samples: Windows of text, or images.
        sequence_length: Tokens in a window, of calibration and of evaluation. By default 512, or
            all that the model can read at once where that is less.
        seed: Which windows or images are drawn.
        calibration_dtype: What calibration multiplies matrices in: "auto" takes bfloat16 for a
            float32 model where the processor has units for it; "float32" or "bfloat16" insist.
            Sums are float32, and metrics are measured on the model as it is.
        device: "auto" for a CUDA device or else the CPU, or a device such as "cuda:1".
        targets: Patterns of the layers to compress (`*.q_proj`, `re:...`); by default all layers
            inside the blocks.
        ignore: Patterns of layers to leave alone.
        embeddings: What becomes of the embedding of the input, and of a head that is tied to it,
            where no stage names it: "keep" leaves it as it is; "8", "6" or "4" rounds it to so many
            bits; "coded" has the stage that meets a rate treat it with all other layers.

    Raises:
        ModelError: If the model cannot be compressed, or there is no such device.
        DataError: If a number of samples or tokens is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel | Checkpoint,
        processor: Any = None,
        *,
        calibration: Any = None,
        calibration_samples: int = 128,
        sequence_length: int | None = None,
        seed: int = 0,
        calibration_dtype: CalibrationDType = "auto",
        device: str = "auto",
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
        embeddings: Embeddings = "keep",
    ):
        self.source: Checkpoint | InMemory
        self.source = model if isinstance(model, Checkpoint) else InMemory.of(model, processor)
        self.calibration = calibration
        if calibration is None and self.source.embedded:
            self.calibration = "builtin"
        numbers = {"calibration_samples": calibration_samples, "sequence_length": sequence_length}
        for name, value in numbers.items():
            if name == "sequence_length" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise DataError(f"'{name}' must be a positive integer, got {value!r}.")
        self.calibration_samples = calibration_samples
        self._wanted_length = sequence_length
        self.seed = seed
        self.device = _device(device)
        self.calibration_dtype = calibration_dtype
        precision.choose(calibration_dtype, torch.float32, self.device)  # an error now, if unknown
        self.targets = list(targets) if targets else self.source.targets
        self.ignore = list(ignore) if ignore else self.source.ignore
        self.embeddings = str(embeddings)
        if self.embeddings not in EMBEDDINGS:
            raise OrderError(unknown("choice for embeddings", self.embeddings, EMBEDDINGS))
        self.measured: dict[tuple[str, str], Measurement] = {}
        """The model before compression, by metric and digest of the samples."""
        self._draws = Draws(self._load, calibration_samples)

    @functools.cached_property
    def outline(self) -> PreTrainedModel | None:
        """The model without weights; None where it can only be made with them."""
        return outline(self.source)

    @functools.cached_property
    def sequence_length(self) -> int:
        """Tokens in a window: as many as were asked for, or as the model can read at once."""
        wanted = self._wanted_length or _LENGTH
        if not reads_text(self.source) or self.outline is None:
            stated = getattr(self.source.config, "max_position_embeddings", None) or wanted
            return min(wanted, stated) if stated > 0 else wanted
        return usable_length(self.outline, wanted)

    def _length(self) -> int:
        """Return the sequence length.

        Raises:
            DataError: If the user asked for more tokens than the model can read.
        """
        if self.sequence_length < (self._wanted_length or 0) and reads_text(self.source):
            raise DataError(
                f"The model '{self.source.id}' reads at most {self.sequence_length} tokens at "
                f"once, got a sequence length of {self._wanted_length}. Ask for "
                f"{self.sequence_length} or fewer (--sequence-length), or leave the length out."
            )
        return self.sequence_length

    def _fitted(self, samples: Samples) -> Samples:
        return samples if self.outline is None else fitted(samples, self.outline)

    def _load(self, samples: int) -> Samples:
        logger.info("Reading and tokenizing the calibration data")
        loaded = load_samples(
            self.source,
            self.calibration,
            samples=samples,
            length=self._length(),
            seed=self.seed,
        )
        return self._fitted(loaded)

    def draw(self, number: int = 0, samples: int | None = None) -> Samples:
        """Return a calibration draw, or its first few samples.

        Args:
            number: Which draw.
            samples: How many of its samples; all by default.

        Raises:
            DataError: If the source is too short for so many draws, or cannot be read.
        """
        return self._draws.take(number, samples)

    def evaluation_samples(
        self, source: Any, samples: int | None = None, metric: str = "auto"
    ) -> Samples:
        """Return what models are measured on.

        Args:
            source: As for `calibration`.
            samples: So many from all over the source; all by default.
            metric: The metric, which may bring samples of its own.

        Raises:
            DataError: If the source cannot be used.
            ModelError: If there is no such metric.
        """
        logger.info("Reading and tokenizing the evaluation data")
        if metric != "auto":
            own = evaluation.named(metric).own_samples(source, self.source.processor, samples)
            if own is not None:
                return own
        length = self._length()
        return self._fitted(load_evaluation(self.source, source, length=length, samples=samples))

    @property
    def usual_samples(self) -> int:
        """The number of samples that orders are compared on by default."""
        return _IMAGES if reads_images(self.source) else _WINDOWS

    def metric(
        self, model: PreTrainedModel, name: str, original: Checkpoint | InMemory | None = None
    ) -> Metric:
        """Return a metric for a model.

        Args:
            model: What will be measured.
            name: The metric, or "auto" for the usual one of the model's kind.
            original: What a metric with a reference compares with; by default the model before
                compression.

        Raises:
            ModelError: If there is no such metric, or none is usual.
        """
        chosen = evaluation.choose(model, name)
        if not chosen.needs_reference:
            return chosen()
        reference = (original or self.source).load()
        reference.to(model.device)  # type: ignore[arg-type]
        return chosen(reference)

    def execution(
        self, model: PreTrainedModel, pause: str = "block", *, progress: bool = True
    ) -> Execution:
        """Return where and how a run of this model computes.

        Args:
            model: The model of the run.
            pause: "block" or "group".
            progress: Whether to show a bar on stderr.
        """
        return Execution(
            device=None if self.device.type == "cpu" else self.device,
            dtype=precision.choose(self.calibration_dtype, model.dtype, self.device),
            pause=pause,
            progress=progress,
        )

    def pause_for(self, pause: str, recipe: Recipe, batches: Batches, *, low_memory: bool) -> str:
        """Return where a run pauses: "auto" takes groups of layers where activations fit.

        Args:
            pause: "auto", "block" or "group".
            recipe: What the run does.
            batches: Its calibration inputs.
            low_memory: Whether one block of the model is resident at a time.

        Raises:
            OrderError: If there is no such choice, or not with `low_memory`.
        """
        if pause not in ("auto", *PAUSES):
            raise OrderError(unknown("pause", pause, ["auto", *PAUSES]))
        # a recipe that needs batches and has none is refused elsewhere
        if low_memory or not recipe.needs_data or not batches:
            if pause == "group" and low_memory:
                raise OrderError(
                    "'low_memory' pauses at blocks, since the activations of all batches are in "
                    "memory otherwise: leave out pause='group' (--pause group)."
                )
            return "block"
        if pause != "auto":
            return pause
        waiting = in_flight(self.source, batches, targets=self.targets, ignore=self.ignore)
        twice = 1 + recipe.compares  # the forwards of the model as it was
        fits = waiting is not None and waiting * twice < psutil.virtual_memory().available // 2
        return "group" if fits else "block"

    def outlines(
        self, model: PreTrainedModel, units: Sequence[Unit], recipe: Recipe
    ) -> list[Outline]:
        """Check a recipe; return the model after each stage that makes it smaller.

        Args:
            model: The model before; it may be empty.
            units: Its blocks.
            recipe: What is to be done.

        Raises:
            OrderError, DataError, ModelError: If the recipe cannot be run on this model.
        """
        after = outlines(
            model,
            recipe.methods,
            lambda smaller: self.units(smaller, recipe),
            self.source.states,
        )
        calibrated = self.calibration is not None
        recipe.check(units, calibrated=calibrated, after=[one.units for one in after])
        recipe.check_start(units, self.source.states)
        return after

    def shared_pause(self, pause: str, recipes: Iterable[Recipe]) -> str:
        """Return where runs that are to be compared pause, all at the same places.

        Args:
            pause: "auto", "block" or "group".
            recipes: What the runs do.

        Raises:
            OrderError: If there is no such choice.
        """
        # the one whose forwards take most memory
        most = max(recipes, key=lambda recipe: (recipe.needs_data, recipe.compares))
        batches = [] if self.calibration is None else self.draw(0).inputs()
        return self.pause_for(pause, most, batches, low_memory=False)

    def runner(self, *recipes: Recipe, pause: str = "block", progress: bool = True) -> Runner:
        """Return what runs orders on a copy of the model, with any draw of the calibration data.

        Args:
            recipes: What it will run; it compresses the embeddings that these name.
            pause: "block" or "group".
            progress: Whether to show bars on stderr.
        """

        def batches(draw: int, samples: int | None) -> Batches:
            return self.draw(draw, samples).inputs()

        return Runner(
            self.source,
            None if self.calibration is None else batches,
            Execution(
                device=self.device,
                dtype=precision.DTYPES.get(self.calibration_dtype),  # None for "auto"
                pause=pause,
                progress=progress,
            ),
            targets=self.targets,
            ignore=self.ignore,
            embeddings=self._embeddings(recipes),
        )

    def units(self, model: PreTrainedModel, *recipes: Recipe) -> list[Unit]:
        """Return what is compressed of a model: the layers of its blocks, and named embeddings.

        Args:
            model: The model; it may be empty.
            recipes: What is to be done to the model.

        Raises:
            ModelError: As `find_units`.
        """
        return find_units(model, self.targets, self.ignore, embeddings=self._embeddings(recipes))

    def whole(self, order: Order) -> Order:
        """Return the order with what is to become of embeddings, where no stage names them.

        Args:
            order: The stages.

        Raises:
            OrderError: If the order cannot be run, or no stage could treat them.
            ModelError: If the model has no embedding.
        """
        if self.embeddings == KEPT:
            return order
        model = empty(self.source)
        name = embedding_name(model)
        if any(unit.name == name for unit in self.units(model, Recipe.of(order))):
            return order
        return with_embedding(order, self.embeddings, name)

    def _embeddings(self, recipes: Iterable[Recipe]) -> list[str]:
        """Return patterns of embeddings: what stages name, and what is compressed already."""
        return [*(pattern for recipe in recipes for pattern in recipe.named), *self.source.states]

    def _beside(self) -> dict[str, Any]:
        """Return what goes with the layers, as fields of `formats.Contents`."""
        source = self.source
        return {
            "processor": source.processor,
            "unloaded": source.unloaded,
            "origin": source.origin,
        }

    def base_model(self, model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a manifest says of the model before compression.

        Args:
            model: The model.
            tensors: Its state dict.
        """
        continues = self.source.continues
        return {
            "id": self.source.id,
            "revision": self.source.commit or self.source.revision,
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "digest": weights_digest(tensors),
            **self.source.card,
            **({"adapter": self.source.adapter} if self.source.adapter else {}),
            **({"remote_code": True} if getattr(model.config, "auto_map", None) else {}),
            **({"continues": continues["digest"]} if continues else {}),
        }

    def study_settings(
        self, model: PreTrainedModel, calibration: Mapping[str, Any] | None, pause: str
    ) -> dict[str, Any]:
        """Return what else decides the trials of a study, beside its model and its samples.

        Args:
            model: The model before compression.
            calibration: The entry of a manifest for the calibration data.
            pause: Where the runs pause. Earlier versions paused at blocks, and did not say so.
        """
        return ({"pause": pause} if pause != "block" else {}) | {
            "calibration": calibration,
            "revision": self.source.commit or self.source.revision,
            "adapter": self.source.adapter,
            "dtype": str(model.dtype).removeprefix("torch."),
            "targets": self.targets,
            "ignore": self.ignore,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": manifest.versions(),
        }

    def fingerprint(
        self,
        base: Mapping[str, Any],
        recipe: Recipe,
        samples: Samples | None,
        execution: Execution,
        config: Any,
    ) -> dict[str, Any]:
        """Return all that decides what a run computes.

        Args:
            base: From `base_model`.
            recipe: What the run does.
            samples: Its calibration samples.
            execution: Where and how it computes.
            config: The model's.
        """
        values = config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            values.pop(name, None)
        calibration = None
        if samples is not None:
            batches = len(samples.inputs())
            calibration = samples.describe() | {"note": "", "seed": self.seed, "batches": batches}
        return {
            "order": str(recipe.order),
            "schedule": recipe.schedule,
            "pause": execution.pause,
            "model": {name: base[name] for name in ("architecture", "dtype", "digest")},
            "config": values,
            "calibration": calibration,
            "calibration_dtype": str(execution.dtype),
            "targets": self.targets,
            "ignore": self.ignore,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processes": execution.ranks.size,
            "versions": manifest.versions(),
        }


def _device(name: str) -> torch.device:
    """Return a device that is there; "auto" is a CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"'device' must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    present = device.type == "cpu" or (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    )
    if not present:
        raise ModelError(
            f"There is no device '{name}' on this machine that can compress a model. "
            "Use device='cpu' (--device cpu)."
        )
    return device
