"""The front door: `JointCompressor` and what it makes, `CompressedModel`."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import estimate, evaluation, formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import hub, manifest
from optimum_order.backends import canonical, method
from optimum_order.calibration import precision
from optimum_order.data.load import batch_size, inputs, samples_for
from optimum_order.engine import run as pipeline
from optimum_order.engine import workdir
from optimum_order.engine.runner import Batches, Runner
from optimum_order.engine.streamed import Streamed
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import DataError, ModelError, OrderError, OutputError
from optimum_order.evaluation import Measurement, Metric, Samples, Windows
from optimum_order.layers.state import LayerState
from optimum_order.models.lazy import Overlaid
from optimum_order.models.source import Checkpoint, InMemory, weights_digest
from optimum_order.models.units import Target, find_units
from optimum_order.order import Order, Stage
from optimum_order.search import planner
from optimum_order.search.planner import Plan
from optimum_order.study.run import Study, quiet
from optimum_order.study.trials import check_folder

logger = logging.getLogger(__name__)

_WINDOWS, _IMAGES = 64, 1000
"""What a study measures each trial on: enough for differences that matter, few enough to do it hundreds of times."""


class JointCompressor:
    """Compresses one model in as many orders as you like; each `compress` starts again from the checkpoint.

    Args:
        model: A transformers model in memory; its weights are copied once. See `from_pretrained` for the others.
        processor: Its tokenizer or image processor; needed for text or images and saved with the result.
        calibration: A .txt, .jsonl or .parquet path, a Hub dataset as `id[:config][:split][:column]`, `builtin`, a
            list of texts, or a tensor of token ids. For a model that reads images a folder of them, a dataset,
            `builtin`, a list of PIL images or uint8 arrays, or a tensor of pixels. None is an error only if a stage
            needs it.
        calibration_samples: How many windows of text, or images.
        sequence_length: Tokens in a window, of calibration and of evaluation; less where the model has fewer
            positions.
        seed: Which windows or images are drawn.
        calibration_dtype: What calibration multiplies matrices in: "auto" takes bfloat16 for a float32 model where the
            processor has units for it, several times faster; "float32" or "bfloat16" insist. Sums are float32, and
            metrics are measured on the model as it is.
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
        calibration_dtype: str = "auto",
        device: str = "auto",
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
    ):
        self.source = model if isinstance(model, Checkpoint) else InMemory.of(model, processor)
        self.calibration = (
            "builtin" if calibration is None and self.source.embedded else calibration
        )
        for name, value in (
            ("calibration_samples", calibration_samples),
            ("sequence_length", sequence_length),
        ):
            if not isinstance(value, int) or value < 1:
                raise DataError(f"'{name}' must be a positive integer, got {value!r}.")
        self.calibration_samples = calibration_samples
        positions = getattr(self.source.config, "max_position_embeddings", None) or sequence_length
        self.sequence_length = min(sequence_length, positions)
        self.seed = seed
        self.device = _device(device)
        self.calibration_dtype = calibration_dtype
        precision.choose(
            calibration_dtype, torch.float32, self.device
        )  # an error now, if it is none
        self.targets = list(targets) if targets else None
        self.ignore = list(ignore) if ignore else None
        self._measured: dict[tuple[str, str], Measurement] = {}
        self._drawn: tuple[int, Samples] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        calibration: Any = None,
        calibration_samples: int = 128,
        sequence_length: int = 512,
        seed: int = 0,
        calibration_dtype: str = "auto",
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
            calibration, calibration_samples, sequence_length, seed, calibration_dtype, device, targets, ignore: As in
                the class.

        Raises:
            ModelError: If there is no such model, or it cannot be compressed.
        """
        checkpoint = Checkpoint(
            model, revision=revision, token=token, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls(
            checkpoint,
            calibration=calibration,
            calibration_samples=calibration_samples,
            sequence_length=sequence_length,
            seed=seed,
            calibration_dtype=calibration_dtype,
            device=device,
            targets=targets,
            ignore=ignore,
        )

    def compress(
        self,
        order: str | Order | Stage | Iterable[Stage | str],
        schedule: str = "stage",
        *,
        stages: Iterable[Stage | str] | None = None,
        work_dir: str | Path | None = None,
        resume: bool = False,
        low_memory: bool = False,
        activation_limit: int = 2**30,
        progress: bool = True,
    ) -> CompressedModel:
        """Apply the stages of an order, first to last, to a fresh copy of the model.

        Args:
            order: `"wanda:0.5 > gptq:4"`, or stages; or "auto" for the order of `stages` that `plan` recommends. The
                plan is then recorded in the manifest.
            stages: What to put into an order, with "auto" only.
            schedule: "stage" walks the whole model once per stage; "block" applies all stages to a block, on one
                capture of its inputs, before moving on.
            work_dir: A folder that keeps what is finished, block by block, so that a run that was killed can go on from
                there. It stays until you remove it. None keeps nothing.
            resume: Whether to go on from what `work_dir` holds; the result is bit for bit that of a run that was never
                cut off. Without it, nothing may be there.
            low_memory: Whether to hold no more than a block of the model at a time. Its weights are read from the
                checkpoint when its turn comes, and what becomes of them is kept in `work_dir` alone: the result can be
                saved until it is closed, and measured once it is loaded from there. Its values are the same.
            activation_limit: With `low_memory`, how many bytes of activations between blocks stay in memory; more go
                to the disk.
            progress: Whether to show a bar on stderr.

        Raises:
            OrderError: If the order cannot be run on this model. Nothing is computed first.
            DataError: If a stage needs calibration data that is missing or too short.
            ModelError: If the model cannot be loaded, walked or compressed.
            OutputError: If the work dir cannot be used: its disk is full, another process uses it, or it holds another
                run, and then the message says in what they differ.
        """
        begin = time.perf_counter()
        if work_dir is not None:
            workdir.check(Path(work_dir), resume=resume)
        elif resume or low_memory:
            raise OutputError(f"'{'resume' if resume else 'low_memory'}' needs a 'work_dir'.")
        if low_memory and not isinstance(self.source, Checkpoint):
            raise ModelError(
                "A model that is in memory already cannot be compressed with 'low_memory': give its folder."
            )
        if (stages is not None) != (order == "auto"):
            raise OrderError(
                "Give 'stages' with order='auto', and with no other order: they are what it is made of."
            )
        found = None
        if stages is not None:
            stages = list(stages)
            found = self._planned(work_dir, stages) if resume else None
            found = found or self.plan(stages, progress=progress)
        order = Order.of(order) if found is None else found.order
        for stage in order:
            method(stage)  # the cheapest errors first, before any weight is read
        weights = self.source.load_empty() if low_memory else None
        model = self.source.load() if weights is None else weights.model
        units = find_units(model, self.targets, self.ignore)
        order = pipeline.check(order, units, schedule, calibrated=self.calibration is not None)
        samples = (
            self._calibration() if any(pipeline.needs_data(stage) for stage in order) else None
        )
        if samples and samples.note:
            logger.warning(samples.note)
        base = {
            "id": self.source.id,
            "revision": self.source.commit or self.source.revision,
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "digest": weights_digest(model if weights is None else weights),
        }
        batches = inputs(samples) if samples else []
        dtype = precision.choose(self.calibration_dtype, model.dtype, self.device)
        with contextlib.ExitStack() as stack:
            work = streamed = None
            if work_dir is not None:
                fingerprint = self._fingerprint(
                    base, model.config, order, schedule, samples, len(batches), str(dtype)
                )
                fingerprint |= {"plan": found and found.as_dict()}
                work = stack.enter_context(WorkDir(work_dir, fingerprint, resume=resume))
            if weights is not None:
                streamed = Streamed(weights, units, work, activation_limit)
            result = pipeline.run(
                model,
                units,
                order,
                batches,
                schedule=schedule,
                work=work,
                streamed=streamed,
                device=None if self.device.type == "cpu" else self.device,
                dtype=dtype,
                progress=progress,
            )
            tensors = None
            if weights is not None:
                targets = {target.name: target for unit in units for target in unit.targets}
                tensors = Overlaid(weights, targets, result.states)
                stack.pop_all()  # the states are read from there until the result is closed
        seconds = time.perf_counter() - begin
        multiplied = {"dtype": str(dtype).removeprefix("torch.")}
        calibration = None if samples is None else _describe(samples) | multiplied
        about = (schedule, calibration, base, seconds, found)
        return CompressedModel(
            self, model, units, result, *about, tensors, work if tensors is not None else None
        )

    @staticmethod
    def _planned(work_dir: str | Path, stages: list[Stage | str]) -> Plan | None:
        """The plan that a run of these stages was started with, if that is what the work dir holds."""
        try:
            found = Plan.from_dict(workdir.read_fingerprint(Path(work_dir))["plan"])
        except (KeyError, TypeError, OrderError):
            return None  # another run, which is refused when all is known that it is compared by
        return found if found.order in map(canonical, planner.permutations(stages)) else None

    def _fingerprint(
        self,
        base: dict[str, Any],
        config: Any,
        order: Order,
        schedule: str,
        samples: Samples | None,
        batches: int,
        calibration_dtype: str,
    ) -> dict[str, Any]:
        """All that decides what a run computes."""
        about = config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            about.pop(name, None)
        return {
            "order": str(order),
            "schedule": schedule,
            "model": {name: base[name] for name in ("architecture", "dtype", "digest")},
            "config": about,
            "calibration": samples
            and {**_describe(samples), "note": "", "seed": self.seed, "batches": batches},
            "calibration_dtype": calibration_dtype,
            "targets": self.targets,
            "ignore": self.ignore,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": manifest.versions(),
        }

    def estimate(
        self,
        order: str | Order | Stage | Iterable[Stage | str],
        schedule: str = "stage",
        *,
        format: str = "auto",
    ) -> estimate.Estimate:
        """What `compress` with the same arguments would take, and the size of what comes out. No weight is read.

        Args:
            order: As in `compress`, but not "auto".
            schedule: As in `compress`.
            format: What the result is to be saved as.

        Raises:
            OrderError, DataError, ModelError: As in `compress`.
            FormatError: If the format could not hold the result.
        """
        order = Order.of(order)
        for stage in order:
            method(stage)
        model = estimate.empty(self.source)
        units = find_units(model, self.targets, self.ignore)
        order = pipeline.check(order, units, schedule, calibrated=self.calibration is not None)
        begin = time.perf_counter()
        samples = (
            self._calibration() if any(pipeline.needs_data(stage) for stage in order) else None
        )
        drawing = time.perf_counter() - begin
        return estimate.estimate(
            model,
            units,
            order,
            inputs(samples) if samples else [],
            schedule=schedule,
            format=format,
            device=self.device,
            dtype=precision.choose(self.calibration_dtype, model.dtype, self.device),
            before=self.source.bytes,
            drawing=drawing,
        )

    def evaluate(
        self, source: Any = "builtin", metric: str = "auto", *, progress: bool = True
    ) -> Measurement:
        """Measure the model before compression; remembered, and put into the manifests of what follows.

        Args:
            source: As for `calibration`; all of it is used.
            metric: "perplexity", "accuracy", "fidelity", or "auto" for the usual one of the model's kind.
            progress: Whether to show a bar on stderr.

        Raises:
            DataError: If the text or the images cannot be used.
            ModelError: If the metric says nothing about the model.
        """
        samples = self._evaluation(source)
        model = self.source.load()
        model.to(self.device)  # type: ignore[arg-type]
        chosen = self._metric(model, metric)
        key = (chosen.name, samples.digest)
        if key not in self._measured:
            self._measured[key] = chosen.measure(
                model, samples, batch_size=batch_size(samples), progress=progress
            )
        return self._measured[key]

    def plan(
        self,
        stages: Iterable[Stage | str],
        strategy: str = "auto",
        *,
        metric: str = "auto",
        evaluation: Any = "builtin",
        evaluation_samples: int | None = None,
        draws: int = 1,
        progress: bool = True,
    ) -> Plan:
        """Rank every order of some stages.

        Args:
            stages: 2 to 5 of them, such as `["wanda:0.5", "gptq(bits=4, group_size=64)"]`.
            strategy: "auto" tries every order on a few layers and samples until one is surely ahead; "measure" runs
                them in full; "pih" and "proxy" are the rules of thumb of `optimum_order.search.planner`.
            metric: The performance M, as in `evaluate`.
            evaluation: What it is measured on, as in `evaluate`.
            evaluation_samples: How many windows from all over the text, or images; by default 64 or 1000, or all there
                are if they are fewer.
            draws: How many disjoint calibration draws "measure" runs.
            progress: Whether to show bars on stderr.

        Raises:
            OrderError: If there are too few or too many stages, or one cannot be run on this model.
            DataError: If the calibration or evaluation data is missing or too short.
            ModelError: If the metric says nothing about the model.
        """
        planner.permutations(stages := list(stages))  # the cheapest error first
        if draws < 1 or (evaluation_samples is not None and evaluation_samples < 4):
            raise DataError(
                "A plan needs a calibration draw or more and four samples or more to score with; got "
                f"{draws=}, {evaluation_samples=}."
            )
        with quiet():
            runner = self._runner(progress=False)
            by = self._metric(runner.model, metric)
            samples = self._evaluation(
                evaluation, self._usual if evaluation_samples is None else evaluation_samples
            )
            if self.calibration is not None:
                self._draw(draws - 1)
            return planner.plan(
                runner,
                stages,
                by,
                samples,
                strategy=strategy,
                # right or wrong says little about a handful of images, the distribution over classes more
                scorer=self._metric(runner.model, "fidelity") if by.name == "accuracy" else None,
                calibration_samples=self.calibration_samples,
                draws=draws,
                batch_size=batch_size(samples),
                progress=progress,
            )

    @property
    def _usual(self) -> int:
        """How many samples orders are compared on unless a user says otherwise."""
        return _IMAGES if self.source.main_input_name == "pixel_values" else _WINDOWS

    def study(
        self,
        orders: Iterable[str | Order],
        folder: str | Path,
        *,
        draws: int | Sequence[int] = 3,
        metric: str = "auto",
        evaluation: Any = "builtin",
        evaluation_samples: int | None = None,
        prefix_limit: float = 16.0,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Run every order, and each of its stages alone, and write down what the numbers say.

        Trials are stored as they finish: what was stopped goes on from there when it is started again.

        Args:
            orders: Such as `optimum_order.study.grid.grid` gives, or any others.
            folder: Gets trials.sqlite, trials.csv, summary.json, plots and report.html; made if missing.
            draws: How many disjoint calibration draws, each of `calibration_samples`; or their numbers, so that
                several processes may share the work of one folder.
            metric: The performance M, as in `evaluate`.
            evaluation: What it is measured on, as in `evaluate`.
            evaluation_samples: How many windows from all over the text, or images; by default 64 or 1000, or all there
                are if they are fewer.
            prefix_limit: How many GB of disk beginnings that orders share may take while the study runs.
            progress: Whether to show a bar on stderr.

        Returns:
            What is in summary.json.

        Raises:
            OrderError: If an order cannot be run on this model. Nothing is computed first.
            DataError: If the calibration data is missing or too short for these draws, or nothing can be measured on
                the evaluation data.
            ModelError: If the metric says nothing about the model.
            OutputError: If the folder cannot be written, or holds another study.
        """
        from optimum_order.study import report

        folder, checked = Path(folder), [canonical(Order.of(order)) for order in orders]
        numbers = range(draws) if isinstance(draws, int) else sorted(set(draws))
        few = evaluation_samples is not None and evaluation_samples < 2
        if not checked or not numbers or min(numbers) < 0 or few or not prefix_limit >= 0:
            raise DataError(
                "A study needs an order or more, a draw or more, numbered from 0, two samples or more to evaluate with "
                f"and a limit of 0 GB or more; got {len(checked)} orders, {draws=}, {evaluation_samples=}, "
                f"{prefix_limit=}."
            )
        check_folder(folder)
        with quiet():
            runner = self._runner(progress=False)
            for order in checked:
                runner.check(order)
            by = self._metric(runner.model, metric)
            samples = self._evaluation(
                evaluation, self._usual if evaluation_samples is None else evaluation_samples
            )
            calibration = None
            if self.calibration is not None:
                self._draw(
                    max(numbers)
                )  # all of them in one reading, and an error now if there is too little
                calibration = _describe(self._draw(0)) | {"seed": self.seed}
                if note := calibration.pop("note"):
                    logger.warning(note)
            found = Study(
                runner,
                by,
                samples,
                folder,
                settings={"calibration": calibration},
            )
            prefix_bytes = int(prefix_limit * 10**9)
            found.run(checked, numbers, prefix_bytes=prefix_bytes, progress=progress)
            return report.write(found.trials, folder)

    def _metric(self, model: PreTrainedModel, name: str) -> Metric:
        chosen = evaluation.choose(model, name)
        if not chosen.needs_reference:
            return chosen()
        reference = self.source.load()
        reference.to(model.device)  # type: ignore[arg-type]
        return chosen(reference)

    def _calibration(self, draw: int = 0, samples: int | None = None) -> Samples:
        return samples_for(
            self.source,
            self.calibration,
            self.source.processor,
            samples=samples or self.calibration_samples,
            length=self.sequence_length,
            seed=self.seed,
            purpose="calibration",
            draw=draw,
        )

    def _draw(self, draw: int, samples: int | None = None) -> Samples:
        """A calibration draw or its first few samples; the source is read once for all of them.

        Raises:
            DataError: If it is too short for so many draws.
        """
        size, draws = self.calibration_samples, draw + 1
        if self._drawn is None or self._drawn[0] < draws:
            found = self._calibration(samples=size * draws)
            if draws > 1 and len(found) < size * draws:
                raise DataError(
                    f"{found.source} has {len(found)} {found.unit}s, enough for {len(found) // size} disjoint draws of "
                    f"{size}, and {draws} are needed. Give more data, or ask for fewer draws or fewer {found.unit}s."
                )
            self._drawn = draws, found
        first, drawn = draw * size, self._drawn[1]
        return drawn.take(torch.arange(first, min(first + (samples or size), len(drawn))))

    def _runner(self, *, progress: bool = True) -> Runner:
        """Runs orders on a copy of the model, with any draw of the calibration data."""

        def batches(draw: int, samples: int | None) -> Batches:
            return inputs(self._draw(draw, samples))

        return Runner(
            self.source,
            None if self.calibration is None else batches,
            device=str(self.device),
            targets=self.targets,
            ignore=self.ignore,
            dtype=self.calibration_dtype,
            progress=progress,
        )

    def _evaluation(self, source: Any, samples: int | None = None) -> Samples:
        """All that a source has to evaluate with, or so many samples of it; windows of text from all over it."""
        images = self.source.main_input_name == "pixel_values"
        options = {"samples": samples if images else None, "length": self.sequence_length}
        found = samples_for(
            self.source, source, self.source.processor, **options, purpose="evaluation"
        )
        if samples is None or samples >= len(found):
            return found
        return found.take(torch.arange(samples) * len(found) // samples)


class CompressedModel:
    """What `JointCompressor.compress` makes.

    Attributes:
        model: The transformers model, its weights the dequantised values, so it runs anywhere.
        layers: Each compressed layer's name -> `LayerState`; of a model larger than the machine, read when asked for.
        order: The canonical order.
        schedule: The schedule it was run with.
        seconds: How long it took, planning included.
        plan: How the order was found, if it was "auto".
    """

    def __init__(
        self,
        compressor: JointCompressor,
        model: PreTrainedModel,
        units: list,
        result: pipeline.Result,
        schedule: str,
        calibration: dict[str, Any] | None,
        base: dict[str, Any],
        seconds: float,
        plan: Plan | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        work: WorkDir | None = None,
    ):
        self.model = model
        self.order = result.order
        self.schedule = schedule
        self.seconds = seconds
        self.plan = plan
        self.layers: Mapping[str, LayerState] = result.states
        self._compressor = compressor
        self._targets: dict[str, Target] = {
            target.name: target for unit in units for target in unit.targets
        }
        self._records = result.records
        self._calibration = calibration
        self._base = base
        self._tensors = tensors
        """What is in the model, by name, if it is empty."""
        self._work = work
        """Where its states are, if they are not in memory."""
        self._measured: list[tuple[bool, Measurement]] = []
        """Each with whether it was measured on the dense values or on the format's own modules."""
        self._saved: dict[str, Any] = {}

    def close(self) -> None:
        """Give back the work dir of a model that was compressed with `low_memory`: its layers are in there alone."""
        if self._work is not None:
            self._work.close()

    @property
    def sparsity(self) -> float:
        """The fraction of the compressed layers' weights that were removed."""
        pruned, total = 0, 0
        for state in self.layers.values():
            pruned += 0 if state.pruned is None else int(state.pruned.sum())
            total += state.weight.numel()
        return pruned / total

    @property
    def manifest(self) -> dict[str, Any]:
        """What was done, to what, with which result; complete with files and bytes once saved."""
        return self._facts() | {"metrics": self._metrics()} | self._saved

    def evaluate(
        self,
        source: Any = "builtin",
        metric: str = "auto",
        *,
        format: str = "auto",
        progress: bool = True,
    ) -> Measurement:
        """Measure the compressed model, on what will load.

        Dense and compressed-tensors artifacts load to the bits of `model`, which is measured as it is. A
        bitsandbytes artifact runs on that library's own kernels, so it is saved to a temporary folder, loaded from
        there as anyone would, and measured.

        Args:
            source: As for `calibration`; all of it is used.
            metric: "perplexity", "accuracy", "fidelity", or "auto" for the usual one of the model's kind.
            format: The format it is to be saved in.
            progress: Whether to show a bar on stderr.

        Raises:
            DataError: If the text or the images cannot be used.
            ModelError: If the metric says nothing about the model, or its weights are not in memory.
        """
        if self._tensors is not None:
            raise ModelError(
                "With 'low_memory' the weights are on the disk: save the model, load it, and measure that."
            )
        samples = self._compressor._evaluation(source)
        chosen = formats.choose(self.model, self._pairs(), format, tensors=self._tensors)

        def measure(model: PreTrainedModel) -> Measurement:
            by = self._compressor._metric(model, metric)
            return by.measure(model, samples, batch_size=batch_size(samples), progress=progress)

        if chosen.runs_dense:
            self.model.to(self._compressor.device)  # type: ignore[arg-type]
            found = measure(self.model)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._save(Path(folder) / "model", format=chosen.name)
                found = measure(type(self.model).from_pretrained(Path(folder) / "model"))
        self._measured.append((chosen.runs_dense, found))
        return found

    def save_pretrained(
        self, path: str | Path, format: str = "auto", *, overwrite: bool = False
    ) -> str:
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
        self._saved = {
            key: written[key] for key in ("format", "bytes", "files", "layers", "metrics")
        }
        return written["format"]

    def push_to_hub(
        self,
        repo_id: str,
        format: str = "auto",
        *,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Save to a temporary folder and upload that, with a model card, as one commit. See `optimum_order.artifact.hub.push`.

        Args:
            repo_id: `namespace/name`, or `name` for your own namespace; made if there is none.
            format: As in `save_pretrained`.
            private: Whether a new repository is private. One that is there and public is then refused.
            revision: The branch to commit to, made if there is none; the main branch by default.
            create_pr: Whether to open a pull request in place of committing to the branch.
            token: Hub token; by default the one you are logged in with. It is never stored or printed.
            commit_message: By default the order and the format.

        Returns:
            The address of the commit or the pull request.

        Raises:
            FormatError: As in `save_pretrained`.
            HubError: If the Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model", format)
            return hub.push(
                Path(folder) / "model",
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
                commit_message=commit_message,
            )

    def _save(self, path: str | Path, *, format: str, overwrite: bool = False) -> dict[str, Any]:
        pairs = self._pairs()
        chosen = formats.choose(self.model, pairs, format, tensors=self._tensors)
        facts = self._facts() | {"metrics": self._metrics(chosen.runs_dense)}
        processor = self._compressor.source.processor
        return artifact.save(
            self.model,
            processor,
            pairs,
            facts,
            path,
            format=chosen,
            overwrite=overwrite,
            tensors=self._tensors,
        )

    def _pairs(self) -> formats.Layers:
        return formats.Paired(self._targets, self.layers)

    def _metrics(self, runs_dense: bool | None = None) -> dict[str, Any]:
        """What was measured, by name; of an artifact only what was measured on the values that load from it."""
        before = self._compressor._measured
        found: dict[str, Any] = {}
        for dense, after in self._measured:
            if runs_dense in (None, dense):
                first = (
                    found.get(after.name, {"after": after.as_dict()})["after"]["digest"]
                    == after.digest
                )
                original = before.get((after.name, after.digest))
                found[after.name if first else f"{after.name} on {after.source}"] = {
                    "before": original and original.as_dict(),
                    "after": after.as_dict(),
                }
        return found

    def _facts(self) -> dict[str, Any]:
        compressor = self._compressor
        layers = {name: self._layer_facts(name, state) for name, state in self.layers.items()}
        pruned = sum(layer["pruned"] for layer in layers.values())
        total = sum(math.prod(layer["shape"]) for layer in layers.values())
        return {
            "schema": manifest.SCHEMA,
            "base_model": self._base,
            "order": str(self.order),
            "stages": [
                {"stage": str(stage), "method": stage.method, "options": method(stage).resolved}
                for stage in self.order
            ],
            "schedule": self.schedule,
            **({} if self.plan is None else {"plan": self.plan.as_dict()}),
            "calibration": self._calibration,
            "sequence_length": compressor.sequence_length,
            "seed": compressor.seed,
            "targets": compressor.targets,
            "ignore": compressor.ignore,
            "versions": manifest.versions(),
            "sparsity": round(pruned / total, 6),
            "layers": layers,
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


def _describe(samples: Samples) -> dict[str, Any]:
    """What a manifest says of the samples of a calibration."""
    if isinstance(samples, Windows):
        size: dict[str, Any] = {"sequence_length": samples.ids.shape[1], "tokens": samples.tokens}
    else:
        size = {"image_shape": list(samples.pixels.shape[1:])}
    about = {"source": samples.source, "samples": len(samples)}
    return about | size | {"digest": samples.digest, "note": samples.note}


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ModelError(f"'device' must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
