"""The front door: `JointCompressor`, one method for each verb."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimum_order import estimate, evaluation
from optimum_order.artifact.config import ARGUMENTS, RUN, Config, of, read
from optimum_order.artifact.origin import open_checkpoint
from optimum_order.calibration.ranks import Ranks
from optimum_order.calibration.stability import check_forward
from optimum_order.compressed import CompressedModel, Provenance
from optimum_order.data.load import reads_text
from optimum_order.engine import workdir
from optimum_order.engine.choices import DType, Pause, Schedule, Strategy
from optimum_order.engine.recipe import CODED, KEPT, Recipe, canonical, with_embedding, with_options
from optimum_order.engine.run import Result, Subject, refuse, run
from optimum_order.engine.streamed import Streamed
from optimum_order.engine.workdir import FollowedWorkDir, WorkDir
from optimum_order.errors import DataError, FormatError, ModelError, OrderError, OutputError
from optimum_order.estimate import Estimate
from optimum_order.estimate.fit import check_format, predicted_bytes
from optimum_order.estimate.forecast import Forecast, forecast
from optimum_order.estimate.measuring import Measuring, measuring
from optimum_order.estimate.options import Demand, Sizes
from optimum_order.evaluation import Measurement, Samples
from optimum_order.files import html_table
from optimum_order.formats import stage_options
from optimum_order.models import hf, precision
from optimum_order.models.memory import giving_memory_back
from optimum_order.models.rehearsal import outline
from optimum_order.models.source import Checkpoint, bytes_of
from optimum_order.models.units import Unit, embedding_name
from optimum_order.order import Order, Stage
from optimum_order.search import planner
from optimum_order.search.budget import Budget, limits
from optimum_order.search.menu import Candidate, Menu
from optimum_order.search.plan import Plan, runnable
from optimum_order.search.recipes import LOOKED_AT, MOST_ATTEMPTS, Carrying, Facts, Search
from optimum_order.search.selection import Attempt, Selection
from optimum_order.search.strategies.base import Effort, Scoring
from optimum_order.session import Session
from optimum_order.study.crew import Spec, crew
from optimum_order.study.run import Study, quiet
from optimum_order.study.trials import check_folder
from optimum_order.study.worker import Worker

logger = logging.getLogger(__name__)

_SPREADING = ("balanced", "balanced_low_0", "sequential", "disk", "meta")
"""What accelerate calls ways to spread a model over devices, or places that hold no values."""
Stages = str | Order | Stage | Iterable[Stage | str]


class JointCompressor(Session):
    """Compresses one model in any number of orders; each `compress` starts from the checkpoint.

    Its arguments are those of `Session`: the model, its processor, the calibration data and the
    settings.
    """

    recipe: Config | None = None
    """What `from_config` read."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: DType = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        merge_adapter: bool = False,
        base: str | Path | None = None,
        device_map: Any = None,
        **settings: Any,
    ) -> JointCompressor:
        """Return a compressor for a Hub id, a local folder, or an embedded model (`tiny-llama`).

        Args:
            model: The id or folder; its weights must be safetensors.
            dtype: "auto" keeps the checkpoint's; else float32, bfloat16 or float16.
            revision: Branch, tag or commit.
            token: Hub token; it is never stored or printed.
            cache_dir: The folder of downloads from the Hub.
            trust_remote_code: Whether to run code that comes with the model.
            attn_implementation: "eager", "sdpa" or another of transformers.
            chat_template: A Jinja template for conversations in place of the tokenizer's; it goes
                with the result.
            merge_adapter: Whether the model is a LoRA adapter: PEFT merges it into its base model,
                and the result is compressed.
            base: The base model of that adapter. By default the id on the Hub that its config
                names; a path in a config is not followed.
            device_map: "auto" or one device, which means the same as `device`: a model is
                compressed on one device. What does not fit there is compressed block by block with
                `compress(..., low_memory=True, work_dir=...)`.
            settings: `calibration`, `calibration_samples`, `sequence_length`, `seed`,
                `calibration_dtype`, `device`, `targets`, `ignore` and `embeddings`, as in the
                class.

        Raises:
            ModelError: If there is no such model, or it cannot be compressed.
        """
        if device_map is not None:
            settings.setdefault("device", _one_device(device_map))
        checkpoint = open_checkpoint(
            model,
            merge_adapter=merge_adapter,
            base=base,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            chat_template=chat_template,
        )
        return cls(checkpoint, **settings)

    def __repr__(self) -> str:
        (_, model), *facts = self._facts()
        settings = (f"{name.replace(' ', '_')}={value}" for name, value in facts)
        return f"JointCompressor({', '.join([model, *settings])})"

    def _repr_html_(self) -> str:
        return html_table("JointCompressor", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """Return what identifies the compressor, shortly; of data in memory only the type."""
        data = self.calibration
        named = isinstance(data, (str, Path))
        source = f"'{data}'" if named else "none" if data is None else type(data).__name__
        return [
            ("model", f"'{self.source.id}'"),
            ("calibration", source),
            ("calibration samples", str(self.calibration_samples)),
            ("seed", str(self.seed)),
            ("device", str(self.device)),
        ]

    @classmethod
    def from_config(
        cls, config: str | Path | Mapping[str, Any], model: str | Path | None = None, **more: Any
    ) -> JointCompressor:
        """Return a compressor for what a recipe says; its `compress()` carries the recipe out.

        Args:
            config: A recipe.yaml, a saved model that holds one, or its options by name.
            model: The model, where the recipe names none, or another.
            more: Arguments of `from_pretrained` that count in place of the recipe's.

        Raises:
            OrderError: If the recipe cannot be read, or has an option that does not exist.
            ModelError: As in `from_pretrained`.
        """
        recipe = of(config) if isinstance(config, Mapping) else read(config)
        options = recipe.given()
        named = options.get("model")
        if model is not None and model != named:
            options.pop("revision", None)  # of another model
        model = model or named
        if model is None:
            raise ModelError("The recipe names no model: give one as the second argument.")
        arguments = {name: options[name] for name in ARGUMENTS if name in options}
        compressor = cls.from_pretrained(model, **arguments | more)
        compressor.recipe = recipe
        return compressor

    def compress(
        self,
        order: Stages | None = None,
        schedule: Schedule = "stage",
        *,
        budget: str | Budget | None = None,
        max_loss: float | None = None,
        stages: Iterable[Stage | str] | None = None,
        pause: Pause = "auto",
        work_dir: str | Path | None = None,
        resume: bool = False,
        low_memory: bool = False,
        activation_limit: int = 2**30,
        format: str = "auto",
        unproven: bool = False,
        engine: str | None = None,
        progress: bool = True,
        ranks: Ranks | None = None,
    ) -> CompressedModel:
        """Apply the stages of an order, first to last, to a fresh copy of the model.

        Args:
            order: `"wanda:0.5 > gptq:4"`, or stages; or "auto" for the order of `stages` that
                `plan` recommends. The plan is then recorded in the manifest. None for the recipe
                that `search` finds under `budget` or `max_loss`; without these for what the recipe
                of `from_config` says, and all but `work_dir`, `resume` and `progress` with it.
            budget: In place of an order: the most that the result may take, as in `search`. The
                result is saved in the format of the search unless another is named.
            max_loss: In place of an order: the most that the loss may rise, as in `search`.
            schedule: "stage" walks the whole model once per stage; "block" applies all stages to a
                block, on one capture of its inputs, before the run moves on.
            stages: What to put into an order, with "auto" only.
            pause: "block" compresses the layers of a block together, from inputs of the block as it
                was. "group" compresses the layers that share an input when the forward reaches
                them: faster, and later layers see what earlier ones became, but the activations of
                all batches are in memory. "auto" takes groups where these fit. The manifest says
                which.
            work_dir: A folder that keeps what is finished, block by block, so that a killed run can
                go on. It stays until you remove it. None keeps nothing.
            resume: Whether to go on from what `work_dir` holds; the result is bit for bit that of
                a run that was never cut off. Without it, nothing may be there.
            low_memory: Whether one block of the model at a time is in memory. Weights are read from
                the checkpoint, and the results are in `work_dir` alone: the model can be saved
                until it is closed, and measured once it is loaded from there. The values are those
                of pause="block".
            activation_limit: With `low_memory`, bytes of activations between blocks that stay in
                memory; more go to the disk.
            format: What the result is to be saved as: a format that could not hold it, or that is
                not proven to load for this architecture, is refused before anything is computed.
            unproven: Whether the format may be one that is not proven to load.
            engine: The engine that is to load the result, as in `save_pretrained`.
            progress: Whether to show a bar on stderr.
            ranks: The processes that share the work, from `Ranks.joined`, each of which calls this
                method alike. All return the same layers; rank 0 alone writes the work dir.

        Raises:
            OrderError: If the order cannot be run on this model. Nothing is computed first.
            DataError: If a stage needs calibration data that is missing or too short.
            ModelError: If the model cannot be loaded, walked or compressed.
            FormatError: If the format is refused.
            OutputError: If the work dir cannot be used: its disk is full, another process uses it,
                or it holds another run, and then the message says in what they differ.
        """
        begin = time.perf_counter()
        ranks = ranks or Ranks()
        asked = order is not None or budget is not None or max_loss is not None
        if self.recipe is not None and not asked:
            options = self.recipe.given()
            settings = {name: options[name] for name in RUN if name in options}
            more: dict[str, Any] = {"work_dir": work_dir, "resume": resume, "progress": progress}
            more["ranks"] = ranks
            compressed = self.compress(**settings, **more)
            named = self.recipe.format
            compressed.provenance = dataclasses.replace(compressed.provenance, format=named)
            return compressed
        if ranks.size > 1 and (order == "auto" or budget is not None or max_loss is not None):
            raise OrderError(
                f"One process searches for an order or a recipe, got {ranks.size}: find it first, "
                "with 'plan' or 'search', and give the order."
            )
        if budget is not None or max_loss is not None:
            if order is not None or stages is not None or schedule != "stage" or low_memory:
                raise OrderError(
                    "A budget or a 'max_loss' is given in place of an order: leave out 'order', "
                    "'stages', 'schedule' and 'low_memory'."
                )
            demand = Demand(format, engine)
            effort = Carrying(pause, None if work_dir is None else Path(work_dir), resume)
            selection = self._search(budget, max_loss, demand, effort, progress=progress)
            chosen: CompressedModel = selection.model
            return chosen
        if order is None:
            raise OrderError(
                "Say what is to be done: an order such as 'wanda:0.5 > gptq:4', a budget such as "
                "'60MB', or a 'max_loss'."
            )
        if work_dir is not None:
            workdir.check(Path(work_dir), resume=resume)
        elif resume or low_memory:
            raise OutputError(f"'{'resume' if resume else 'low_memory'}' needs a 'work_dir'.")
        checkpoint = self.source if isinstance(self.source, Checkpoint) else None
        if low_memory and checkpoint is None:
            raise ModelError(
                "A model that is in memory already cannot be compressed with 'low_memory': "
                "give its folder."
            )
        order, stages = self._made_for(order, stages, format, engine)
        plan = self._plan_for(order, stages, work_dir if resume else None, pause, progress=progress)
        # The cheapest errors first, before any weight is read.
        recipe = Recipe.of(Order.of(order) if plan is None else plan.order, schedule)
        weights = checkpoint.load_empty() if low_memory and checkpoint else None
        model = self.source.load() if weights is None else weights.model
        refuse(recipe, streams=low_memory, processes=ranks.size)
        units = self.units(model, recipe)
        _warn(recipe, units)
        after = self.outlines(model, units, recipe)
        states = self.source.states
        choice: dict[str, Any] = {"unproven": unproven, "engine": engine, "after": after}
        beside = self._beside()
        check_format(model, units, recipe, states, format, beside=beside, **choice)
        samples = self.draw() if recipe.needs_data else None
        if samples and samples.note:
            logger.warning(samples.note)
        batches = samples.inputs() if samples else []
        logger.info("Trying the model on a batch")
        hf.check_savable(model)
        if batches:
            # A model may change in its first forward only, so the outline is a new one.
            whole = model if weights is None else outline(self.source)
            if whole is not None:
                check_forward(whole, batches[0])
        begun = workdir.paused(Path(work_dir)) if work_dir is not None and resume else None
        if pause == "auto" and (begun or ranks.size > 1):
            paused = begun or "block"  # whose layers can be dealt out
        else:
            paused = self.pause_for(pause, recipe, batches, low_memory=low_memory)
        execution = dataclasses.replace(
            self.execution(model, paused, progress=progress and ranks.rank == 0), ranks=ranks
        )
        base = self.base_model(model, model.state_dict() if weights is None else weights)
        tensors = None
        memory = giving_memory_back() if low_memory else contextlib.nullcontext()
        with memory, contextlib.ExitStack() as stack:
            work = None
            if work_dir is not None:
                fingerprint = self.fingerprint(base, recipe, samples, execution, model.config)
                fingerprint["plan"] = plan and plan.as_dict()
                if ranks.rank == 0:
                    work = stack.enter_context(WorkDir(work_dir, fingerprint, resume=resume))
                ranks.wait()
                work = work or FollowedWorkDir(work_dir, fingerprint)
            if weights is not None:
                assert work is not None
                streamed = Streamed(weights, units, work, activation_limit)
                execution = dataclasses.replace(execution, residency=streamed)
            subject = Subject(model, units, batches, self.source.load)
            start = Result.of(units, self.source.states) if self.source.states else None
            logger.info("Compressing %d layers: %s", count_of(units), recipe.order)
            result = run(subject, recipe, execution, start=start, work=work)
            if weights is not None:
                targets = {target.name: target for unit in units for target in unit.targets}
                tensors = weights.overlaid(targets, result.states)
                stack.pop_all()  # the states are read from there until the result is closed
        calibration = None
        if samples is not None:
            calibration = samples.describe() | precision.describe(
                execution.matmul_dtype(model), self.device
            )
            if ranks.size > 1:
                calibration["processes"] = ranks.size
        provenance = Provenance(
            recipe=recipe,
            pause=paused,
            base_model=base,
            calibration=calibration,
            seconds=time.perf_counter() - begin,
            plan=plan,
        )
        subject = dataclasses.replace(subject, batches=(), units=result.units)
        return CompressedModel(
            self, subject, result, provenance, tensors, work if tensors is not None else None
        )

    def check_format(
        self,
        order: Stages,
        format: str,
        *,
        stages: Iterable[Stage | str] | None = None,
        unproven: bool = False,
        engine: str | None = None,
    ) -> str:
        """Refuse a format that `compress` would refuse. No weight is read.

        Args:
            order: As in `compress`.
            format: What the result is to be saved as.
            stages: As in `compress`; then only what no order of them could be saved as is refused.
            unproven: Whether the format may be one that is not proven to load.
            engine: The engine that is to load the result.

        Returns:
            The name of the format; for an engine that of the one that "auto" will take for the
            first order that can be saved.

        Raises:
            OrderError, ModelError: As in `compress`.
            FormatError: If the format is refused.
        """
        if engine is None and format in ("auto", "dense"):
            return format
        order, stages = self._made_for(order, stages, format, engine)
        orders = [Order.of(order)] if stages is None else runnable(stages, canonical)[0]
        recipes = [Recipe.of(candidate) for candidate in orders]
        model = estimate.empty(self.source)
        units = self.units(model, *recipes)
        states = self.source.states
        beside = self._beside()
        choice: dict[str, Any] = {"unproven": unproven, "engine": engine}
        chosen: list[str] = []
        refusals = []
        for recipe in recipes:
            choice["after"] = self.outlines(model, units, recipe)
            try:
                chosen.append(
                    check_format(model, units, recipe, states, format, beside=beside, **choice)
                )
            except FormatError as error:
                refusals.append(error)
        if not chosen:
            raise refusals[0]
        return chosen[0]

    def _made_for(
        self,
        order: Stages,
        stages: Iterable[Stage | str] | None,
        format: str,
        engine: str | None,
    ) -> tuple[Stages, Iterable[Stage | str] | None]:
        """Return an order and stages as embeddings are to be, with the options of a format.

        Args:
            order: As in `compress`.
            stages: As in `compress`.
            format: What the result is to be saved as.
            engine: The engine that is to load the result.
        """
        options = stage_options(format, engine)
        if stages is None and order != "auto":
            return with_options(self.whole(Order.of(order)), options), None
        if self.embeddings != KEPT:
            raise OrderError(
                "Which order is best is asked of stages that are all given: leave out 'embeddings' "
                "(--embeddings), and name the embedding in a stage, such as "
                "'rtn(bits=8, targets=*embed_tokens)'."
            )
        return order, stages if stages is None else [*with_options(Order(stages), options)]

    def _plan_for(
        self,
        order: Stages,
        stages: Iterable[Stage | str] | None,
        resumed: str | Path | None,
        pause: Pause,
        *,
        progress: bool,
    ) -> Plan | None:
        """Return the plan of a run with order="auto", that of the work dir if it is resumed."""
        if (stages is not None) != (order == "auto"):
            raise OrderError(
                "Give 'stages' with order='auto' (--order auto), and with no other order: "
                "they are what it is made of."
            )
        if stages is None:
            return None
        stages = list(stages)
        if resumed is not None:
            # A work dir of another run is refused when all is known that runs are compared by.
            with contextlib.suppress(KeyError, TypeError, OrderError):
                plan = Plan.from_dict(workdir.read_fingerprint(Path(resumed))["plan"])
                if plan.order in runnable(stages, canonical)[0]:
                    return plan
        return self.plan(stages, pause=pause, progress=progress)

    def estimate(
        self,
        order: Stages,
        schedule: Schedule = "stage",
        *,
        pause: Pause = "auto",
        format: str = "auto",
    ) -> estimate.Estimate:
        """Return what `compress` would take, and the size of what comes out. No weight is read.

        Args:
            order: As in `compress`, but not "auto".
            schedule: As in `compress`.
            pause: As in `compress`.
            format: What the result is to be saved as.

        Raises:
            OrderError, DataError, ModelError: As in `compress`.
            FormatError: If the format could not hold the result.
        """
        order, _ = self._made_for(order, None, format, None)
        recipe = Recipe.of(Order.of(order), schedule)
        model = estimate.empty(self.source)
        units = self.units(model, recipe)
        _warn(recipe, units)
        after = self.outlines(model, units, recipe)
        begin = time.perf_counter()
        batches = self.draw().inputs() if recipe.needs_data else []
        drawing = time.perf_counter() - begin
        paused = self.pause_for(pause, recipe, batches, low_memory=False)
        execution = dataclasses.replace(self.execution(model, paused), device=self.device)
        beside = self._beside()
        result = estimate.estimate(
            model, units, recipe, batches, execution, format=format, beside=beside, after=after
        )
        return dataclasses.replace(
            result,
            before=self.source.bytes or result.before,
            loading=result.loading + drawing,
            steps=tuple(step.carrying(bytes_of(self.source.unloaded)) for step in result.steps),
        )

    def result_bytes(self, order: Stages, format: str = "auto") -> int | None:
        """Return the bytes of the weight files of a result. No weight and no data is read.

        Args:
            order: As in `compress`, but not "auto".
            format: What the result is to be saved as.

        Returns:
            The bytes, as far as shapes tell them; None where they do not.

        Raises:
            OrderError, ModelError, FormatError: As in `compress`.
        """
        order, _ = self._made_for(order, None, format, None)
        recipe = Recipe.of(Order.of(order))
        model = estimate.empty(self.source)
        units = self.units(model, recipe)
        after = self.outlines(model, units, recipe)
        beside = {"processor": self.source.processor, "unloaded": self.source.unloaded}
        return predicted_bytes(
            model, units, recipe, self.source.states, format, beside=beside, after=after
        )

    def forecast(
        self,
        orders: Iterable[str | Order],
        *,
        draws: int = 1,
        evaluation_samples: int | None = None,
    ) -> Forecast:
        """Return what running and measuring many orders would take. No weight is read.

        Args:
            orders: The orders, such as those of a study.
            draws: Calibration draws.
            evaluation_samples: What each model is measured on, as in `study`.

        Raises:
            OrderError, DataError, ModelError: As in `estimate`.
        """
        checked = [canonical(Order.of(order)) for order in orders]
        estimates = self._estimates(checked)
        runs = {order: draws if Recipe.of(order).needs_data else 1 for order in checked}
        tokens = None
        if reads_text(self.source):
            tokens = float((evaluation_samples or self.usual_samples) * self.sequence_length)
        parameters = estimate.empty(self.source).num_parameters()
        return forecast(runs, estimates, tokens, parameters)

    def _estimates(self, orders: Iterable[Order]) -> dict[str, Estimate]:
        """Return what one stage of each method in some orders takes, by the method's name."""
        stages = {stage.method: stage for order in orders for stage in order}
        return {name: self.estimate(Order((stage,))) for name, stage in stages.items()}

    def forecast_search(
        self,
        budget: str | Budget | None = None,
        *,
        max_loss: float | None = None,
        format: str = "auto",
        engine: str | None = None,
    ) -> Forecast:
        """Return what a search would take at most. No weight is read.

        Args:
            budget: As in `search`, as all others.
            max_loss: The most that the loss may rise.
            format: The format of the result.
            engine: The engine that is to load the result.

        Returns:
            The forecast of the recipes that take longest, as many as a search carries out.

        Raises:
            OrderError, DataError, FormatError: As in `search`.
        """
        demand = Demand(format, engine)
        search = self._searching(*limits(budget, max_loss), demand, progress=False)
        whole = search.menu.whole or (lambda order: order)
        orders = list(dict.fromkeys(whole(one.order) for one in search.candidates()))
        seconds = {name: one.seconds for name, one in self._estimates(orders).items()}
        orders.sort(key=lambda order: sum(seconds[stage.method] for stage in order), reverse=True)
        return self.forecast(orders[:MOST_ATTEMPTS], evaluation_samples=self.calibration_samples)

    def forecast_evaluation(
        self, source: Any = "builtin", metric: str = "auto", *, samples: int | None = None
    ) -> Measuring:
        """Return what `evaluate` would take. No weight is read.

        Args:
            source: As in `evaluate`, as all others.
            metric: The metric.
            samples: Windows from all over the text, or images.

        Raises:
            DataError, ModelError: As in `evaluate`; also if what a forward takes cannot be told
                from shapes.
        """
        model = estimate.empty(self.source)
        chosen = evaluation.choose(model, metric)
        read = self.evaluation_samples(source, samples, metric)
        if not chosen.needs_reference:
            chosen().check(model, read)
        return measuring(model, read, self.device, models=1 + chosen.needs_reference)

    def evaluate(
        self,
        source: Any = "builtin",
        metric: str = "auto",
        *,
        samples: int | None = None,
        reference: JointCompressor | None = None,
        progress: bool = True,
    ) -> Measurement:
        """Measure the model before compression; remembered, and put into later manifests.

        To measure a saved model by "fidelity" or "embedding", give its original as `reference`.

        Args:
            source: As for `calibration`; or "literature" for WikiText-2 as papers measure on it.
            metric: "perplexity", "accuracy", "fidelity", "embedding", "lm_eval:TASKS" for tasks of
                lm-eval, or "auto" for the usual one of the model's kind.
            samples: Windows from all over the text, or images; by default all of them.
            reference: The original that "fidelity" and "embedding" compare with; such a figure is
                not remembered. By default this model itself, which differs by rounding alone.
            progress: Whether to show a bar on stderr.

        Raises:
            DataError: If the text or the images cannot be used.
            ModelError: If the metric says nothing about the model.
        """
        chosen_samples = self.evaluation_samples(source, samples, metric)
        model = self.source.load()
        model.to(self.device)  # type: ignore[arg-type]
        original = None if reference is None else reference.source
        chosen = self.metric(model, metric, original)

        def measured() -> Measurement:
            size = chosen_samples.batch_size
            return chosen.measure(model, chosen_samples, batch_size=size, progress=progress)

        if reference is not None and chosen.needs_reference:
            return measured()
        key = (chosen.name, chosen_samples.digest)
        if key not in self.measured:
            self.measured[key] = measured()
        return self.measured[key]

    def plan(
        self,
        stages: Iterable[Stage | str],
        strategy: Strategy = "auto",
        *,
        metric: str = "auto",
        evaluation: Any = "builtin",
        evaluation_samples: int | None = None,
        draws: int = 1,
        pause: Pause = "auto",
        progress: bool = True,
    ) -> Plan:
        """Rank every order of some stages.

        Args:
            stages: 2 to 5 of them, such as `["wanda:0.5", "gptq(bits=4, group_size=64)"]`.
            strategy: "auto" tries every order on a few layers and samples until one is surely
                ahead; "measure" runs them in full; "pih" and "proxy" are the rules of thumb of
                `optimum_order.search.planner`.
            metric: The performance M, as in `evaluate`.
            evaluation: What M is measured on, as in `evaluate`.
            evaluation_samples: Windows from all over the text, or images; by default 64 or 1000,
                or all of them if they are fewer.
            draws: Disjoint calibration draws that "measure" runs.
            pause: Where runs in full pause, as in `compress`.
            progress: Whether to show bars on stderr.

        Raises:
            OrderError: If there are too few or too many stages, or one cannot be run on this model.
            DataError: If the calibration or evaluation data is missing or too short.
            ModelError: If the metric says nothing about the model.
        """
        stages = list(stages)
        orders, _ = runnable(stages, canonical)  # the cheapest error first
        if draws < 1 or (evaluation_samples is not None and evaluation_samples < 4):
            raise DataError(
                "A plan needs a calibration draw or more and four samples or more to score with; "
                f"got {draws=}, {evaluation_samples=}."
            )
        with quiet():
            recipes = [Recipe.of(order) for order in orders]
            paused = self.shared_pause(pause, recipes)
            runner = self.runner(recipes[0], pause=paused, progress=False)
            chosen = self.metric(runner.model, metric)
            samples = self.evaluation_samples(
                evaluation, evaluation_samples or self.usual_samples, metric
            )
            if self.calibration is not None:
                self.draw(draws - 1)
            # Right or wrong says little about a handful of images, the distribution over classes
            # says more.
            finer = self.metric(runner.model, "fidelity") if chosen.name == "accuracy" else None
            scoring = Scoring(chosen, samples, finer)
            effort = Effort(self.calibration_samples, draws)
            return planner.plan(runner, stages, scoring, strategy, effort, progress=progress)

    def search(
        self,
        budget: str | Budget | None = None,
        *,
        max_loss: float | None = None,
        format: str = "auto",
        engine: str | None = None,
        progress: bool = True,
    ) -> Selection:
        """Find the recipe of the least loss in some bytes, or of the fewest bytes at some loss.

        At most three recipes are carried out on the whole model, and measured on calibration
        samples that were held back: the draw after the one that the recipes calibrate on.

        Args:
            budget: "60MB", the most that the weight files may take, embeddings and all side
                information included; or "2.5 bits", of a weight of the compressed layers, all side
                information included.
            max_loss: The most that the loss may rise over the original's. The loss is
                log-perplexity for language models, else the distance in nats of `fidelity`. Of the
                recipes that meet it the one of the fewest bytes is sought, within the budget if
                there is one.
            format: The format of the result; "auto" for any, with an engine any that was seen to
                load there.
            engine: The engine that is to load the result, as in `save_pretrained`.
            progress: Whether to show bars on stderr.

        Returns:
            The recipe, with what else was carried out in these bytes, and the compressed model.

        Raises:
            OrderError: If the budget cannot be read, is too small or needs no compression, or
                `max_loss` is not positive. Nothing is computed first.
            DataError: If there is no calibration data, or too little to hold some back.
            FormatError: If nothing can be saved as demanded.
        """
        demand = Demand(format, engine)
        return self._search(budget, max_loss, demand, Carrying(), progress=progress)

    def _search(
        self,
        budget: str | Budget | None,
        max_loss: float | None,
        demand: Demand,
        carrying: Carrying,
        *,
        progress: bool,
    ) -> Selection:
        """Carry out `search`."""
        begin = time.perf_counter()
        limit, max_loss = limits(budget, max_loss)
        carrying.check()
        search = self._searching(limit, max_loss, demand, progress=progress)
        whole = search.menu.whole
        with quiet():
            held = self.draw(1)
            if len(held) < 2:
                raise DataError(
                    "Recipes are compared on as many samples as they calibrate on, two at least: "
                    f"got calibration_samples={self.calibration_samples} (--calibration-samples)."
                )
            runner = self.runner(progress=False)
            metric = self.metric(runner.model, "auto")
            if metric.name == "accuracy":  # right or wrong says little of a loss
                metric = self.metric(runner.model, "fidelity")
            runner.check_metric(metric, held)
            batch_size = held.batch_size
            original = runner.measure(metric, held, batch_size=batch_size).performances
            seen = search.survey(runner, runner.batches(0, LOOKED_AT))
            del runner

        def make(candidate: Candidate, number: int) -> Attempt:
            compressed = self.compress(
                candidate.order if whole is None else whole(candidate.order),
                pause=carrying.pause,
                work_dir=carrying.folder(number),
                resume=carrying.resumes(number),
                format=candidate.format,
                engine=demand.engine,
                progress=progress,
            )
            return compressed.attempt(candidate, metric, held, engine=demand.engine)

        attempts = search.run(seen, original, make)
        facts = Facts(metric.name, held.unit)
        selection = search.selection(attempts, seen, original, facts)
        model: CompressedModel = selection.model
        model.provenance = dataclasses.replace(
            model.provenance,
            search=selection.as_dict(),
            seconds=time.perf_counter() - begin,
        )
        return selection

    def _searching(
        self,
        limit: Budget | None,
        max_loss: float | None,
        demand: Demand,
        *,
        progress: bool,
    ) -> Search:
        """Return a search before it looks at a weight; refuse what no recipe can meet."""
        demand.check()
        if self.calibration is None:
            raise DataError(
                "A search measures recipes on calibration data that is held back: give some "
                "(calibration=..., --calibration)."
            )
        if self.embeddings not in (KEPT, CODED):
            raise OrderError(
                "A search leaves embeddings as they are or codes them with the layers: "
                f"embeddings={KEPT} or {CODED} (--embeddings), got {self.embeddings!r}."
            )
        empty = estimate.empty(self.source)
        whole = None if self.embeddings == KEPT else self._with_embedding
        named = [Recipe.of(whole(Order("rtn:8")))] if whole else []
        units = self.units(empty, *named)
        sizes = Sizes(empty, units, self.source.states, demand, self._beside())
        return Search(Menu(sizes, whole=whole), limit, max_loss, progress=progress)

    def _with_embedding(self, order: Order) -> Order:
        """Return an order that codes the embedding with the layers, or else in 8 bits."""
        name = embedding_name(estimate.empty(self.source))
        try:
            return with_embedding(order, CODED, name)
        except OrderError:
            return with_embedding(order, "8", name)

    def study(
        self,
        orders: Iterable[str | Order],
        folder: str | Path,
        *,
        draws: int | Sequence[int] = 3,
        metric: str = "auto",
        evaluation: Any = "builtin",
        evaluation_samples: int | None = None,
        pause: Pause = "auto",
        prefix_limit: float = 16.0,
        workers: int = 1,
        cluster: str | None = None,
        command: str | None = None,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Run every order, and each of its stages alone, and write down what the numbers say.

        Trials are stored as they finish: a stopped study goes on when it is started again.

        Args:
            orders: Such as `optimum_order.study.grid.grid` gives, or any others.
            folder: Gets trials.sqlite, trials.csv, summary.json, plots and report.html; made if
                missing.
            draws: Disjoint calibration draws, each of `calibration_samples`; or their numbers, so
                that several processes may share the work of one folder.
            metric: The performance M, as in `evaluate`.
            evaluation: What M is measured on, as in `evaluate`.
            evaluation_samples: Windows from all over the text, or images; by default 64 or 1000,
                or all of them if they are fewer.
            pause: Where the runs pause, as in `compress`.
            prefix_limit: GB of disk that beginnings which orders share may take while the study
                runs; for each worker.
            workers: Processes that run the trials, each with a copy of the model; 1 runs them here.
            cluster: The address of a Ray cluster that the workers are on, or "auto"; None for
                processes of this machine.
            command: What was typed to run the study; the report shows it.
            progress: Whether to show a bar on stderr.

        Returns:
            What is in summary.json.

        Raises:
            OrderError: If an order cannot be run on this model. Nothing is computed first.
            DataError: If the calibration data is missing or too short for these draws, or nothing
                can be measured on the evaluation data.
            ModelError: If the metric says nothing about the model.
            OutputError: If the folder cannot be written, or holds another study.
        """
        from optimum_order.study import report  # draws, and only a study does

        folder = Path(folder)
        checked = [canonical(Order.of(order)) for order in orders]
        numbers = range(draws) if isinstance(draws, int) else sorted(set(draws))
        few = evaluation_samples is not None and evaluation_samples < 2
        if not checked or not numbers or min(numbers) < 0 or few or not prefix_limit >= 0:
            raise DataError(
                "A study needs an order or more, a draw or more, numbered from 0, two samples or "
                f"more to evaluate with and a limit of 0 GB or more; got {len(checked)} orders, "
                f"{draws=}, {evaluation_samples=}, {prefix_limit=}."
            )
        check_folder(folder)
        recipes = [Recipe.of(order) for order in checked]
        with quiet():
            runner = self.runner(*recipes, progress=False)
            for order in checked:
                runner.check(order)
            paused = self.shared_pause(pause, recipes)
            runner.execution = dataclasses.replace(runner.execution, pause=paused)
            chosen = self.metric(runner.model, metric)
            samples = self.evaluation_samples(
                evaluation, evaluation_samples or self.usual_samples, metric
            )
            calibration = None
            if self.calibration is not None:
                self.draw(
                    max(numbers)
                )  # all in one reading, and an error now if there is too little
                calibration = self.draw(0).describe() | {"seed": self.seed}
                calibration |= precision.describe(runner.dtype, self.device)
                if note := calibration.pop("note"):
                    logger.warning(note)
            study = Study(
                runner,
                chosen,
                samples,
                folder,
                settings=self.study_settings(runner.model, calibration, paused),
            )
            if command is not None:
                study.trials.note_command(command)
            prefix_bytes = int(prefix_limit * 10**9)
            run = functools.partial(
                study.run, checked, numbers, prefix_bytes=prefix_bytes, progress=progress
            )
            if workers == 1 and cluster is None:
                run()
            else:
                make = functools.partial(_worker, self, tuple(checked), metric, samples, paused)
                spec = Spec(make, torch.get_num_threads(), prefix_bytes)
                with contextlib.closing(crew(spec, workers, cluster)) as shared:
                    run(crew=shared)
            return report.write(study.trials, folder)


def _worker(
    session: Session, orders: Sequence[Order], metric: str, samples: Samples, pause: str
) -> Worker:
    """Return a worker of a study, in whichever process it is to work."""
    with quiet():
        runner = session.runner(*map(Recipe.of, orders), pause=pause, progress=False)
        return Worker(runner, session.metric(runner.model, metric), samples)


def _one_device(device_map: Any) -> str:
    """Return the device that a map of devices names.

    Raises:
        ModelError: If it names several, or is no map.
    """
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    places = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in named}
    strange = any(not isinstance(place, (str, int, torch.device)) for place in named)
    if strange or len(places) != 1 or places & set(_SPREADING):
        raise ModelError(
            f"A model is compressed on one device, got {device_map!r} as 'device_map'. Name it as "
            "'device' (--device), such as 'cuda:0'; what does not fit there is compressed block by "
            "block with 'low_memory' and a 'work_dir' (--low-memory)."
        )
    return places.pop()


def count_of(units: Iterable[Unit]) -> int:
    """Return the number of layers in blocks."""
    return sum(len(unit.targets) for unit in units)


def _warn(recipe: Recipe, units: Iterable[Unit]) -> None:
    """Say which stages gain nothing.

    Args:
        recipe: What is to be done.
        units: The blocks of the model.
    """
    for remark in recipe.remarks([target for unit in units for target in unit.targets]):
        logger.warning(remark)
