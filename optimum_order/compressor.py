"""The front door: `JointCompressor` and what it makes, `CompressedModel`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_order import artifact, formats, manifest, pipeline
from optimum_order.backends import method
from optimum_order.calibration.data import Windows, load
from optimum_order.checkpoint import Checkpoint, InMemory, weights_digest
from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Measurement
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.layer import LayerState
from optimum_order.order import Order, Stage
from optimum_order.targets import Target, find_units

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = 4096


class JointCompressor:
    """Compresses one model in as many orders as you like; each `compress` starts again from the checkpoint.

    Args:
        model: A transformers model in memory; its weights are copied once. See `from_pretrained` for the others.
        processor: Its tokenizer or image processor; needed for text and saved with the result.
        calibration: A .txt, .jsonl or .parquet path, a Hub dataset as `id[:config][:split][:column]`, `builtin`, a
            list of texts, or a tensor of token ids. None is an error only if a stage needs it.
        calibration_samples: How many windows of text.
        sequence_length: Tokens in a window, of calibration and of evaluation; less where the model has fewer
            positions.
        seed: Which windows are drawn.
        device: "auto" takes a GPU where there is one.
        targets: Patterns of the layers to compress (`*.q_proj`, `re:...`); all inside the blocks by default.
        ignore: Patterns of layers to leave alone.

    Raises:
        ModelError: If the model is not one that can be compressed.
    """

    def __init__(
        self,
        model: PreTrainedModel | Checkpoint,
        processor: Any = None,
        *,
        calibration: Any = None,
        calibration_samples: int = 128,
        sequence_length: int = 512,
        seed: int = 0,
        device: str = "auto",
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
    ):
        self.source = model if isinstance(model, Checkpoint) else InMemory.of(model, processor)
        self.calibration = "builtin" if calibration is None and self.source.embedded else calibration
        for name, value in (("calibration_samples", calibration_samples), ("sequence_length", sequence_length)):
            if not isinstance(value, int) or value < 1:
                raise DataError(f"'{name}' must be a positive integer, got {value!r}.")
        self.calibration_samples = calibration_samples
        positions = getattr(self.source.config, "max_position_embeddings", None) or sequence_length
        self.sequence_length = min(sequence_length, positions)
        self.seed = seed
        self.device = _device(device)
        self.targets = list(targets) if targets else None
        self.ignore = list(ignore) if ignore else None
        self._measured: dict[tuple[str, str], Measurement] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        calibration: Any = None,
        calibration_samples: int = 128,
        sequence_length: int = 512,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
    ) -> JointCompressor:
        """A compressor for a Hub id, a local folder, or the embedded `tiny-llama`.

        Args:
            model: The id or folder; its weights must be safetensors.
            dtype: "auto" keeps the checkpoint's; else float32, bfloat16 or float16.
            revision: Branch, tag or commit.
            token: Hub token; it is never stored or printed.
            trust_remote_code: Whether to run code that comes with the model.
            calibration, calibration_samples, sequence_length, seed, device, targets, ignore: As in the class.

        Raises:
            ModelError: If there is no such model, or it cannot be compressed.
        """
        checkpoint = Checkpoint(model, revision=revision, token=token, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(
            checkpoint,
            calibration=calibration,
            calibration_samples=calibration_samples,
            sequence_length=sequence_length,
            seed=seed,
            device=device,
            targets=targets,
            ignore=ignore,
        )

    def compress(
        self, order: str | Order | Stage | Iterable[Stage | str], schedule: str = "stage", *, progress: bool = True
    ) -> CompressedModel:
        """Apply the stages of an order, first to last, to a fresh copy of the model.

        Args:
            order: `"wanda:0.5 > gptq:4"`, or stages.
            schedule: "stage" walks the whole model once per stage; "block" applies all stages to a block, on one
                capture of its inputs, before moving on.
            progress: Whether to show a bar on stderr.

        Raises:
            OrderError: If the order cannot be run on this model. Nothing is computed first.
            DataError: If a stage needs calibration data that is missing or too short.
            ModelError: If the model cannot be loaded, walked or compressed.
        """
        begin = time.perf_counter()
        order = Order.of(order)
        for stage in order:
            method(stage)  # the cheapest errors first, before any weight is read
        model = self.source.load()
        units = find_units(model, self.targets, self.ignore)
        order = pipeline.check(order, units, schedule, calibrated=self.calibration is not None)
        windows = self._windows() if any(_needs_data(stage) for stage in order) else None
        if windows and windows.note:
            logger.warning(windows.note)
        base = {
            "id": self.source.id,
            "revision": self.source.commit or self.source.revision,
            "architecture": type(model).__name__,
            "digest": weights_digest(model),
        }
        model.to(self.device)  # type: ignore[arg-type]  # transformers wraps it and hides its signature
        size = max(1, _TOKENS_PER_BATCH // self.sequence_length)
        batches = list(windows.batches(size)) if windows else []
        result = pipeline.run(model, units, order, batches, schedule=schedule, progress=progress)
        seconds = time.perf_counter() - begin
        return CompressedModel(self, model, units, result, schedule, windows, base, seconds)

    def evaluate(self, source: Any = "builtin", *, progress: bool = True) -> Measurement:
        """Perplexity of the model before compression; remembered, and put into the manifests of what follows.

        Raises:
            DataError: If the text cannot be used.
            ModelError: If the model has no language-model head.
        """
        windows = self._evaluation(source)
        key = ("perplexity", windows.digest)
        if key not in self._measured:
            model = self.source.load()
            model.to(self.device)  # type: ignore[arg-type]
            self._measured[key] = Perplexity().measure(model, windows, progress=progress)
        return self._measured[key]

    def _windows(self) -> Windows:
        return load(
            self.calibration,
            self.source.processor,
            samples=self.calibration_samples,
            length=self.sequence_length,
            seed=self.seed,
            purpose="calibration",
        )

    def _evaluation(self, source: Any) -> Windows:
        return load(source, self.source.processor, samples=None, length=self.sequence_length, purpose="evaluation")


class CompressedModel:
    """What `JointCompressor.compress` makes.

    Attributes:
        model: The transformers model, its weights the dequantised values, so it runs anywhere.
        layers: Each compressed layer's name -> `LayerState`.
        order: The canonical order.
        schedule: The schedule it was run with.
        seconds: How long it took.
    """

    def __init__(
        self,
        compressor: JointCompressor,
        model: PreTrainedModel,
        units: list,
        result: pipeline.Result,
        schedule: str,
        windows: Windows | None,
        base: dict[str, Any],
        seconds: float,
    ):
        self.model = model
        self.order = result.order
        self.schedule = schedule
        self.seconds = seconds
        self.layers: dict[str, LayerState] = result.states
        self._compressor = compressor
        self._targets: dict[str, Target] = {target.name: target for unit in units for target in unit.targets}
        self._records = result.records
        self._windows = windows
        self._base = base
        self._measured: list[tuple[bool, Measurement]] = []
        """Each with whether it was measured on the dense values or on the format's own modules."""
        self._saved: dict[str, Any] = {}

    @property
    def sparsity(self) -> float:
        """The fraction of the compressed layers' weights that were removed."""
        total = sum(state.weight.numel() for state in self.layers.values())
        return sum(int(s.pruned.sum()) for s in self.layers.values() if s.pruned is not None) / total

    @property
    def manifest(self) -> dict[str, Any]:
        """What was done, to what, with which result; complete with files and bytes once saved."""
        return self._facts() | {"metrics": self._metrics()} | self._saved

    def evaluate(self, source: Any = "builtin", *, format: str = "auto", progress: bool = True) -> Measurement:
        """Perplexity of the compressed model, on what will load.

        Dense and compressed-tensors artifacts load to the bits of `model`, which is measured as it is. A
        bitsandbytes artifact runs on that library's own kernels, so it is saved to a temporary folder, loaded from
        there as anyone would, and measured.

        Args:
            source: As for `calibration`; the whole text is used.
            format: The format it is to be saved in.
            progress: Whether to show a bar on stderr.
        """
        windows = self._compressor._evaluation(source)
        chosen = formats.choose(self.model, self._pairs(), format)
        if chosen.runs_dense:
            found = Perplexity().measure(self.model, windows, progress=progress)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._save(Path(folder) / "model", format=chosen.name)
                model = type(self.model).from_pretrained(Path(folder) / "model")
                found = Perplexity().measure(model, windows, progress=progress)
        self._measured.append((chosen.runs_dense, found))
        return found

    def save_pretrained(self, path: str | Path, format: str = "auto", *, overwrite: bool = False) -> str:
        """Write a folder that stock `from_pretrained` and `pipeline` load, and `optimum-order verify` checks.

        Args:
            path: The folder; made if missing, refused if not empty.
            format: A format's name, or "auto" for the smallest that holds every layer exactly.
            overwrite: Whether a folder that is not empty may be replaced.

        Returns:
            The name of the format.

        Raises:
            FormatError: If the format cannot hold a layer exactly; the message names those that can.
            OutputError: If the folder cannot be written. Nothing is left half-written.
        """
        written = self._save(path, format=format, overwrite=overwrite)
        self._saved = {key: written[key] for key in ("format", "bytes", "files", "layers", "metrics")}
        return written["format"]

    def _save(self, path: str | Path, *, format: str, overwrite: bool = False) -> dict[str, Any]:
        chosen = formats.choose(self.model, self._pairs(), format)
        facts = self._facts() | {"metrics": self._metrics(chosen.runs_dense)}
        processor = self._compressor.source.processor
        return artifact.save(self.model, processor, self._pairs(), facts, path, format=chosen, overwrite=overwrite)

    def _pairs(self) -> dict[str, tuple[Target, LayerState]]:
        return {name: (self._targets[name], state) for name, state in self.layers.items()}

    def _metrics(self, runs_dense: bool | None = None) -> dict[str, Any]:
        """What was measured, by name; of an artifact only what was measured on the values that load from it."""
        before = self._compressor._measured
        found: dict[str, Any] = {}
        for dense, after in self._measured:
            if runs_dense in (None, dense):
                first = found.get(after.name, {"after": after.as_dict()})["after"]["digest"] == after.digest
                original = before.get((after.name, after.digest))
                found[after.name if first else f"{after.name} on {after.source}"] = {
                    "before": original and original.as_dict(),
                    "after": after.as_dict(),
                }
        return found

    def _facts(self) -> dict[str, Any]:
        windows, compressor = self._windows, self._compressor
        return {
            "schema": manifest.SCHEMA,
            "base_model": self._base,
            "order": str(self.order),
            "stages": [
                {"stage": str(stage), "method": stage.method, "options": method(stage).resolved} for stage in self.order
            ],
            "schedule": self.schedule,
            "calibration": None
            if windows is None
            else {
                "source": windows.source,
                "samples": len(windows.ids),
                "sequence_length": compressor.sequence_length,
                "tokens": windows.tokens,
                "digest": windows.digest,
                "note": windows.note,
            },
            "seed": compressor.seed,
            "versions": manifest.versions(),
            "sparsity": round(self.sparsity, 6),
            "layers": {name: self._layer_facts(name, state) for name, state in self.layers.items()},
            "bytes": {"before": compressor.source.bytes},
        }

    def _layer_facts(self, name: str, state: LayerState) -> dict[str, Any]:
        patterns = [getattr(method(stage).options, "pattern", "none") for stage in self.order]
        return {
            "shape": list(state.weight.shape),
            "bits": state.bits,
            "group_size": getattr(state.grid, "group_size", None),
            "sparsity": round(state.sparsity, 6),
            "pruned": 0 if state.pruned is None else int(state.pruned.sum()),
            "pattern": next((p for p in reversed(patterns) if p != "none"), None),
            "stages": [
                {"stage": r.stage, "relative_error": r.relative_error, "measured_on": r.measured_on}
                for r in self._records[name]
            ],
            "notes": list(state.notes),
            "digest": artifact.values_digest(state.weight),
        }


def _needs_data(stage: Stage) -> bool:
    chosen = method(stage)
    return not hasattr(chosen, "needs") or bool(chosen.needs)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ModelError(f"'device' must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
