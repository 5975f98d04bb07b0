"""The result of one run: `CompressedModel`."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from optimum_order import formats
from optimum_order.artifact import adapter, hub, manifest
from optimum_order.artifact import folder as artifact
from optimum_order.artifact.config import Config
from optimum_order.artifact.config import recipe as recipe_of
from optimum_order.artifact.convert import convert
from optimum_order.artifact.origin import Origin
from optimum_order.backends.base import IDLE
from optimum_order.calibration.stability import unchanged
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Result, Subject
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import ModelError
from optimum_order.evaluation import Measurement, Metric, Samples, choose
from optimum_order.files import html_table, size
from optimum_order.formats import transcode
from optimum_order.layers.state import LayerState
from optimum_order.models.memory import giving_memory_back
from optimum_order.models.source import bytes_of
from optimum_order.models.units import Target, find_units
from optimum_order.order import Order
from optimum_order.search.menu import Candidate
from optimum_order.search.plan import Plan
from optimum_order.search.selection import Attempt
from optimum_order.session import Session


@dataclass(frozen=True)
class Provenance:
    """How a compressed model came to be.

    Args:
        recipe: What was done.
        pause: Where the walk paused: "block" or "group".
        base_model: The model before, as the manifest names it.
        calibration: The calibration samples, as the manifest describes them; None without data.
        seconds: Wall time, planning included.
        plan: How the order was found, if it was "auto".
        search: How the recipe was found, if a budget was given in place of an order.
        format: The format that a recipe names, if one was carried out.
    """

    recipe: Recipe
    pause: str
    base_model: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    seconds: float
    plan: Plan | None = None
    search: Mapping[str, Any] | None = None
    format: str | None = None


class CompressedModel:
    """What `JointCompressor.compress` returns.

    Args:
        session: The model's data and settings.
        subject: The model and its layers.
        result: The layers after the run.
        provenance: How they came to be.
        tensors: The tensors of the model by name, if the model is empty.
        work: Where its states are, if they are not in memory.

    Attributes:
        model: The transformers model, its weights the dequantized values, so it runs anywhere.
        layers: Each compressed layer's state by name; of a model larger than memory, read when
            asked for.
        provenance: How they came to be.
    """

    def __init__(
        self,
        session: Session,
        subject: Subject,
        result: Result,
        provenance: Provenance,
        tensors: Mapping[str, Tensor] | None = None,
        work: WorkDir | None = None,
    ):
        self.model = subject.model
        self.provenance = provenance
        self.layers: Mapping[str, LayerState] = result.states
        self._session = session
        self._targets: dict[str, Target] = {
            target.name: target for unit in subject.units for target in unit.targets
        }
        self._records = result.records
        self._changes = result.changes
        self._tensors = tensors
        self._work = work
        self._measured: list[tuple[bool, Measurement]] = []
        """Each with whether it was measured on dense values or on the format's own modules."""
        self._saved: dict[str, Any] = {}
        self._folder: Path | None = None
        """The artifact that was loaded, if one was."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
    ) -> CompressedModel:
        """Return a model that `save_pretrained` or `optimum-order compress` saved.

        It is what it was before it was saved: its layers have their masks and grids as far as the
        format stores them, and it can be measured, run, and saved in another format.

        Args:
            path: The folder, or an id on the Hub.
            revision: Branch, tag or commit.
            token: Hub token; it is never stored or printed.
            cache_dir: The folder of downloads from the Hub.
            device: Where it is measured.

        Raises:
            ArtifactError: If there is no such model, or it is not what its manifest says.
        """
        folder = hub.locate(path, revision=revision, token=token, cache_dir=cache_dir)
        facts = manifest.load(folder)
        source = Origin(folder, revision=None, token=None, dtype="auto", trust_remote_code=False)
        length = facts.get("sequence_length")
        session = Session(source, device=device, sequence_length=length)
        stored = source.loaded()
        units = find_units(stored.model, session.targets, session.ignore)
        result = Result(dict(stored.layers.states), {})
        provenance = Provenance(
            recipe=Recipe.of(Order.parse(facts["order"]), facts["schedule"]),
            pause=facts.get("pause", "block"),
            base_model=facts["base_model"],
            calibration=facts.get("calibration"),
            seconds=0.0,
            format=facts["format"],
        )
        loaded = cls(session, Subject(stored.model, units), result, provenance)
        loaded._targets = dict(stored.layers.targets)  # embeddings and all
        loaded._folder = folder
        loaded._saved = facts
        return loaded

    @property
    def order(self) -> Any:
        """The canonical order."""
        return self.provenance.recipe.order

    @property
    def schedule(self) -> str:
        """The schedule of the run."""
        return self.provenance.recipe.schedule

    @property
    def seconds(self) -> float:
        """The wall time of the run, planning included."""
        return self.provenance.seconds

    @property
    def plan(self) -> Plan | None:
        """How the order was found, if it was "auto"."""
        return self.provenance.plan

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer or image processor that goes with the model; None without one."""
        return self._session.source.processor

    @property
    def recipe(self) -> Config:
        """The options that make this model again, as `recipe.yaml` in a saved folder has them."""
        return recipe_of({"format": "auto"} | self.manifest)

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """Return what `generate` of the transformers model returns: token ids.

        Args:
            inputs: As transformers takes them, such as `**tokenizer("Hello", return_tensors="pt")`.
            options: `max_new_tokens` and all others.
        """
        model: Any = self.model
        return model.generate(*inputs, **options)

    def __repr__(self) -> str:
        facts = [f"{len(self.layers)} layers"]
        saved = self.manifest["bytes"] if self._saved else {}
        if "per_weight_bits" in saved:
            facts.append(f"{saved['per_weight_bits']:.2f} bits/weight")
        facts += [f"{name} {figure}" for name, figure in self._figures().items()]
        return f"CompressedModel({str(self.order)!r}, {', '.join(facts)})"

    def _repr_html_(self) -> str:
        saved = self._saved.get("bytes", {})
        rows = [
            ("order", str(self.order)),
            ("schedule", self.schedule),
            ("layers", str(len(self.layers))),
            ("base model", str(self.provenance.base_model["id"])),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        rows += self._figures().items()
        if saved:
            rows.append(("weights on disk", size(saved["after"])))
            rows.append(("bits per compressed weight", f"{saved['per_weight_bits']:.2f}"))
        return html_table("CompressedModel", rows)

    def _figures(self) -> dict[str, str]:
        """Return what was measured last, by metric, for people."""
        return {
            measured.name: f"{measured.value:.4g} on {measured.source}"
            for _, measured in self._measured
        }

    def close(self) -> None:
        """Release the work dir of a run with `low_memory`: it alone holds the layers."""
        if self._work is not None:
            self._work.close()

    @property
    def sparsity(self) -> float:
        """The fraction of the compressed layers' weights that were removed."""
        pruned = 0
        total = 0
        for state in self.layers.values():
            pruned += 0 if state.pruned is None else int(state.pruned.sum())
            total += state.weight.numel()
        return pruned / total

    @property
    def manifest(self) -> dict[str, Any]:
        """What was done, to what, with which result; complete with files and bytes once saved."""
        facts = {} if self._folder is not None else self._facts() | {"metrics": self._metrics()}
        return facts | self._saved

    def evaluate(
        self,
        source: Any = "builtin",
        metric: str = "auto",
        *,
        format: str = "auto",
        unproven: bool = False,
        engine: str | None = None,
        progress: bool = True,
    ) -> Measurement:
        """Measure the compressed model, on what will load.

        Dense and compressed-tensors artifacts load to the bits of `model`, which is measured as it
        is. A bitsandbytes artifact runs on that library's own kernels, so it is saved to a
        temporary folder, loaded from there as anyone would, and measured.

        Args:
            source: As for `calibration`; all of it is used.
            metric: "perplexity", "accuracy", "fidelity", "embedding", "lm_eval:TASKS" for tasks of
                lm-eval, or "auto" for the usual one of the model's kind.
            format: The format it is to be saved in.
            unproven: As in `save_pretrained`.
            engine: As in `save_pretrained`.
            progress: Whether to show a bar on stderr.

        Raises:
            DataError: If the text or the images cannot be used.
            ModelError: If the metric says nothing about the model, or the weights are not in
                memory.
        """
        if self._tensors is not None:
            raise ModelError(
                "With 'low_memory' the weights are on the disk: save the model, load it, and "
                "measure that."
            )
        if self._folder is not None and (kind := choose(self.model, metric)).needs_reference:
            raise ModelError(
                f"'{kind.name}' compares with the model before compression, which a saved model "
                "does not hold. Name the original: JointCompressor.from_pretrained(FOLDER)"
                f".evaluate(metric='{kind.name}', reference=JointCompressor.from_pretrained("
                "ORIGINAL))."
            )
        samples = self._session.evaluation_samples(source, metric=metric)
        format, engine = self._chosen(format, engine)
        codec, _ = transcode.choose(self._contents(), format, unproven=unproven, engine=engine)

        def measure(model: PreTrainedModel) -> Measurement:
            chosen = self._session.metric(model, metric)
            return chosen.measure(model, samples, batch_size=samples.batch_size, progress=progress)

        if codec.runs_dense:
            home = self.model.device
            self.model.to(self._session.device)  # type: ignore[arg-type]
            with unchanged(self.model, "its forward"):
                measurement = measure(self.model)
            # States and model are compared when they are saved.
            self.model.to(home)  # type: ignore[arg-type]
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._save(Path(folder) / "model", format=codec.name, unproven=unproven)
                measurement = measure(type(self.model).from_pretrained(Path(folder) / "model"))
        self._measured.append((codec.runs_dense, measurement))
        return measurement

    def attempt(
        self, candidate: Candidate, metric: Metric, samples: Samples, *, engine: str | None = None
    ) -> Attempt:
        """Return what became of a recipe: the bytes that are written, and the loss.

        Args:
            candidate: The recipe that the model was compressed by.
            metric: The metric whose mean score is the loss.
            samples: What the loss is measured on; not what the model was calibrated on.
            engine: The engine that is to load the folder.

        Raises:
            FormatError: If the format of the candidate cannot hold the model.
        """
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / "model"
            written = self._save(folder, format=candidate.format, engine=engine)["bytes"]
        place = self.model.device
        self.model.to(self._session.device)  # type: ignore[arg-type]
        with unchanged(self.model, "its forward"):
            measured = metric.measure(
                self.model, samples, batch_size=samples.batch_size, progress=False
            )
        self.model.to(place)  # type: ignore[arg-type]
        bytes_ = int(written["after"])
        bits = float(written["per_weight_bits"])
        return Attempt(candidate, bytes_, bits, measured.performances, self)

    def save_pretrained(
        self,
        path: str | Path,
        format: str = "auto",
        *,
        overwrite: bool | None = None,
        unproven: bool = False,
        engine: str | None = None,
        max_shard_size: str = artifact.SHARD,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool = False,
    ) -> str:
        """Write a folder that stock `from_pretrained` loads, and `optimum-order verify` checks.

        Args:
            path: The folder; made if missing. An artifact that is there is replaced as a whole;
                any other folder that is not empty is refused.
            format: A format's name, or "auto" for the smallest that holds every layer exactly; of
                a model made under a budget, for the format that meets the budget.
            overwrite: Whether a folder with a model may be replaced; by default one of ours may.
            unproven: Whether the format may be one that is not proven to load for this
                architecture.
            engine: The engine that is to load the folder: "transformers", "peft", "vllm" or
                "llama.cpp". "auto" then takes the smallest format that was seen to load there with
                such layers, and keeps their widths.
            max_shard_size: The most that one weight file may take, such as "5GB".
            push_to_hub: Whether to upload the folder too.
            repo_id: `namespace/name` on the Hub; by default the folder's name in your namespace.
            token: Hub token; by default the one you are logged in with.
            private: Whether a new repository is private.

        Returns:
            The name of the format.

        Raises:
            HubError: If the upload fails; the folder is then there.
            FormatError: If the format cannot hold a layer exactly; the message names those that
                can. Or if it is not proven to load, in the engine if there is one.
            OutputError: If the folder cannot be written. Nothing is left half-written.
        """
        repo_id = repo_id or Path(path).resolve().name
        if push_to_hub:
            hub.check(repo_id, token)
        written = self._save(
            path,
            format=format,
            overwrite=artifact.is_ours(Path(path)) if overwrite is None else overwrite,
            unproven=unproven,
            engine=engine,
            max_shard_size=max_shard_size,
        )
        fields = ("format", "requires", "bytes", "files", "layers", "metrics")
        self._saved = {field: written[field] for field in fields}
        if push_to_hub:
            hub.push(path, repo_id, token=token, private=private)
        return str(written["format"])

    def push_to_hub(
        self,
        repo_id: str,
        format: str = "auto",
        *,
        unproven: bool = False,
        engine: str | None = None,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Save to a temporary folder and upload that, with a model card, as one commit.

        See `optimum_order.artifact.hub.push`.

        Args:
            repo_id: `namespace/name`, or `name` for your own namespace; made if missing.
            format: As in `save_pretrained`.
            unproven: As in `save_pretrained`.
            engine: As in `save_pretrained`.
            private: Whether a new repository is private. A public one is then refused.
            revision: The branch to commit to, made if missing; the main branch by default.
            create_pr: Whether to open a pull request in place of committing to the branch.
            token: Hub token; by default the one you are logged in with. It is never stored or
                printed.
            commit_message: By default the order and the format.

        Returns:
            The address of the commit or the pull request.

        Raises:
            FormatError: As in `save_pretrained`.
            HubError: If the Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model", format, unproven=unproven, engine=engine)
            return hub.push(
                Path(folder) / "model",
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
                commit_message=commit_message,
            )

    def _save(
        self,
        path: str | Path,
        *,
        format: str,
        overwrite: bool = False,
        unproven: bool = False,
        engine: str | None = None,
        max_shard_size: str = artifact.SHARD,
    ) -> dict[str, Any]:
        contents = self._contents()
        format, engine = self._chosen(format, engine)
        again = functools.partial(
            convert,
            path=path,
            format=format,
            overwrite=overwrite,
            unproven=unproven,
            engine=engine,
            max_shard_size=max_shard_size,
        )
        if self._folder is not None:
            return again(self._folder)
        # a layer's state is read where layers are looked at, not only where they are written
        memory = contextlib.nullcontext() if self._tensors is None else giving_memory_back()
        with memory:
            codec, moving = transcode.choose(contents, format, unproven=unproven, engine=engine)
            if moving:  # steps move into other weights, which those of `model` are not to follow
                with tempfile.TemporaryDirectory() as home:
                    self._save(Path(home) / "model", format=transcode.home(contents.layers))
                    return again(Path(home) / "model")
            facts = self._facts() | {"metrics": self._metrics(codec.runs_dense)}
            return artifact.save(
                contents,
                facts,
                path,
                codec=codec,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
            )

    def _chosen(self, format: str, engine: str | None) -> tuple[str, str | None]:
        """Return the format and the engine that a search chose, where none is named."""
        search = self.provenance.search
        if self.provenance.format is not None and format == "auto" and engine is None:
            return self.provenance.format, None
        if search is None or format != "auto" or engine is not None:
            return format, engine
        return str(search["format"]), search["engine"]

    def _contents(self) -> formats.Contents:
        layers = formats.Layers(self._targets, self.layers)
        source = self._session.source
        return formats.Contents(
            model=self.model,
            layers=layers,
            tensors=self._tensors,
            processor=source.processor,
            unloaded=source.unloaded,
            documents=source.documents,
            origin=source.origin,
        )

    def _metrics(self, runs_dense: bool | None = None) -> dict[str, Any]:
        """Return what was measured by name; for an artifact, on the values that load from it."""
        metrics: dict[str, Any] = {}
        for dense, after in self._measured:
            if runs_dense not in (None, dense):
                continue
            name = after.name
            if name in metrics and metrics[name]["after"]["digest"] != after.digest:
                name = f"{name} on {after.source}"
            before = self._session.measured.get((after.name, after.digest))
            metrics[name] = {"before": before and before.as_dict(), "after": after.as_dict()}
        return metrics

    def _facts(self) -> dict[str, Any]:
        session = self._session
        provenance = self.provenance
        layers = {name: self._layer_facts(name, state) for name, state in self.layers.items()}
        pruned = sum(layer["pruned"] for layer in layers.values())
        total = sum(math.prod(layer["shape"]) for layer in layers.values())
        plan = {} if provenance.plan is None else {"plan": provenance.plan.as_dict()}
        search = {} if provenance.search is None else {"search": provenance.search}
        smaller = [change.describe() for change in self._changes if not change.parameters]
        tensors = session.source.unloaded
        unloaded = {"tensors": len(tensors), "bytes": bytes_of(tensors)}
        idle = sum(any(IDLE in note for note in layer["notes"]) for layer in layers.values())
        return {
            "schema": manifest.SCHEMA,
            "base_model": provenance.base_model,
            "order": str(self.order),
            "stages": provenance.recipe.describe(),
            "schedule": self.schedule,
            "pause": provenance.pause,
            **plan,
            **search,
            **({"smaller": smaller} if smaller else {}),
            **({"continues": session.source.continues} if session.source.continues else {}),
            "calibration": provenance.calibration,
            "sequence_length": session.sequence_length,
            "seed": session.seed,
            "targets": session.targets,
            "ignore": session.ignore,
            "versions": manifest.versions(),
            "sparsity": round(pruned / total, 6),
            "coverage": {
                "weights": self.model.num_parameters(),
                "compressed": total,
                "layers": len(layers),
                "idle": idle,
            },
            "layers": layers,
            "bytes": {"before": session.source.bytes},
            **({"unloaded": unloaded} if unloaded["tensors"] else {}),
        }

    def _layer_facts(self, name: str, state: LayerState) -> dict[str, Any]:
        options = [method.options for method in self.provenance.recipe.methods]
        patterns = [getattr(option, "pattern", "none") for option in options]
        return {
            "shape": list(state.weight.shape),
            "bits": state.bits,
            "group_size": getattr(state.grid, "group_size", None),
            **({} if state.inputs is None else {"inputs": state.inputs.words}),
            **({} if state.adapter is None else {"adapter": adapter.describe(state.adapter)}),
            "sparsity": round(state.sparsity, 6),
            "pruned": 0 if state.pruned is None else int(state.pruned.sum()),
            "pattern": next((p for p in reversed(patterns) if p != "none"), None),
            "stages": [
                {
                    "stage": record.stage,
                    "relative_error": record.relative_error,
                    "measured_on": record.measured_on,
                }
                for record in self._records[name]
            ],
            "notes": list(state.notes),
            "digest": artifact.values_digest(state.weight),
        }
