"""Tasks of lm-eval: the fraction of questions that a language model answers right.

A task of EleutherAI's lm-evaluation-harness asks questions and scores each answer. The tasks are
named after a colon, `lm_eval:arc_easy,hellaswag`, or are the source: names, paths of YAML files, or
configs as dicts. Every question is one sample, so two models are compared question by question.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples
from optimum_order.errors import DataError, InvariantError, ModelError, missing_extra, redacted
from optimum_order.evaluation.base import Measurement, Metric
from optimum_order.models import precision

logger = logging.getLogger(__name__)

_QUESTIONS_PER_BATCH = 8
_LONGEST_REASON = 300
_SEED = 1234
"""Of examples in prompts, and of whatever tasks draw: lm-eval's own default."""
_PROMPT = ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot")
"""Fields of a task's config that decide what a model reads."""

Task = Any
"""`lm_eval.api.task.Task`; lm-eval is an extra."""


@dataclass(frozen=True, eq=False)
class Questions(Samples):
    """Questions of tasks, asked with the tokenizer of a model.

    Args:
        tasks: Each task by name.
        index: The task and the number in it of each question.
        processor: The tokenizer.
        source: The names of the tasks.
        note: A remark for the user, or "".
    """

    tasks: Mapping[str, Task]
    index: tuple[tuple[str, int], ...]
    processor: Any
    source: str
    note: str = ""
    unit: ClassVar[str] = "question"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Nothing: lm-eval makes what a model reads."""
        return {}

    @property
    def batch_size(self) -> int:
        return _QUESTIONS_PER_BATCH

    @property
    def sizes(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks)}

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of every question and of how the tasks put it."""
        digest = hashlib.sha256()
        for name, task in self.tasks.items():
            config = {field: getattr(task.config, field, None) for field in _PROMPT}
            plain = {field: value for field, value in config.items() if not callable(value)}
            digest.update(json.dumps([name, str(task.VERSION), plain], default=str).encode())
        documents = {name: task.eval_docs for name, task in self.tasks.items()}
        for name, number in self.index:
            row = [name, number, documents[name][number]]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Questions:
        return replace(self, index=tuple(self.index[place] for place in index.tolist()))

    def check(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise ModelError(
                f"lm-eval asks decoder-only language models, got {type(model).__name__}. Use "
                "another metric."
            )


class LMEval(Metric):
    """The mean score of questions of lm-eval, by the first metric of each task; higher is better.

    That is `acc` for most tasks of several choices, and 0 or 1 for a question.
    """

    name = "lm_eval"
    summary = "fraction of questions of lm-eval answered right; tasks follow a colon"
    higher_is_better = True
    tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks that were named; none if the source says them."""

    @classmethod
    def of(cls, named: str) -> type[Metric]:
        tasks = tuple(filter(None, (task.strip() for task in named.split(","))))
        name = (
            f"{cls.name}:{','.join(Path(task).stem if _is_file(task) else task for task in tasks)}"
        )
        return type(cls.__name__, (cls,), {"name": name, "tasks": tasks, "__doc__": cls.__doc__})

    @classmethod
    def own_samples(cls, source: Any, processor: Any, count: int | None) -> Questions:
        specs: Sequence[Any] = cls.tasks
        if not specs and source not in (None, "builtin"):
            specs = source if isinstance(source, (list, tuple)) else [source]
            specs = [part for spec in specs for part in _split(spec)]
        if not specs:
            raise DataError(
                "lm-eval needs tasks: name them after a colon, as in metric='lm_eval:arc_easy' "
                "(--metric lm_eval:arc_easy), or give them as the source (--evaluate)."
            )
        if processor is None:
            raise DataError(
                "lm-eval asks in words, and the model has no tokenizer: save one with the model."
            )
        tasks = _loaded(specs)
        index = tuple((name, n) for name in tasks for n in range(len(tasks[name].eval_docs)))
        questions = Questions(tasks, index, processor, ", ".join(tasks))
        if count is not None and count < len(index):
            return questions.take(torch.arange(count) * len(index) // count)
        return questions

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if not isinstance(samples, Questions):
            raise DataError(f"The metric '{self.name}' asks questions, got {samples.source}.")
        super().check(model, samples)

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        raise InvariantError("lm-eval answers whole tasks, and not batches of tensors.")

    def measure(
        self,
        model: PreTrainedModel,
        samples: Samples,
        *,
        batch_size: int = _QUESTIONS_PER_BATCH,
        progress: bool = True,
    ) -> Measurement:
        self.check(model, samples)
        assert isinstance(samples, Questions)
        if progress:
            logger.info("Asking %d questions: %s", len(samples), samples.source)
        training = model.training
        try:
            rows, higher = _answered(model, samples, batch_size)
        finally:
            model.train(training)
        scores: dict[tuple[str, int], float] = {}
        details: dict[str, float] = {}
        for task, answers in rows.items():
            first = _first_metric(task, answers, higher.get(task, {}))
            scores |= {(task, row["doc_id"]): float(row[first[0]]) for row in answers[first]}
            for (metric, filter), others in answers.items():
                values = [row[metric] for row in others]
                if len(values) and all(isinstance(value, (bool, int, float)) for value in values):
                    kind = "" if filter == "none" else f" ({filter})"
                    details[f"{task} {metric}{kind}"] = float(np.mean(values))
        ordered = torch.tensor([scores[place] for place in samples.index], dtype=torch.float64)
        names = tuple(f"{task}/{number}" for task, number in samples.index)
        return self.measurement(ordered, samples, details, names)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _split(spec: Any) -> list[Any]:
    """Return the tasks that a source names: a config is one, a text may name several."""
    return [part.strip() for part in spec.split(",")] if isinstance(spec, str) else [spec]


@functools.cache
def _manager(defaults: bool) -> Any:
    """Return what finds tasks; the tasks of lm-eval itself are thousands of files."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm-eval", error) from error
    return TaskManager(include_defaults=defaults)


def _loaded(specs: Sequence[Any]) -> dict[str, Task]:
    """Return the tasks that some specs name, by name; groups give all of their tasks.

    Raises:
        DataError: If there is no such task, or its questions cannot be read.
    """
    named = any(isinstance(spec, str) and not _is_file(spec) for spec in specs)
    manager = _manager(named)
    specs = [dict(spec) if isinstance(spec, Mapping) else spec for spec in specs]
    for spec in specs:
        if isinstance(spec, str) and _is_file(spec) and not Path(spec).is_file():
            raise DataError(f"There is no file '{spec}': give a YAML task of lm-eval.")
        if isinstance(spec, str) and not _is_file(spec) and spec not in manager.task_index:
            raise DataError(
                f"lm-eval has no task '{spec}'. 'lm-eval ls tasks' lists its tasks; a file of your "
                "own ends in .yaml."
            )
    with _quiet(), _seeded():
        try:
            tasks = dict(manager.load(specs)["tasks"])
            for task in tasks.values():
                len(task.eval_docs)
                # as `lm_eval.simple_evaluate` does, which asks git about the working folder too
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
        except Exception as error:  # of a data set, of a template, of a config
            lines = redacted(str(error)).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"lm-eval cannot read the questions: {lines[0][:_LONGEST_REASON]}."
            ) from error
    return tasks


Answers = dict[tuple[str, str], list[dict[str, Any]]]
"""What lm-eval says of each question, by metric and filter."""


def _answered(
    model: PreTrainedModel, questions: Questions, batch_size: int
) -> tuple[dict[str, Answers], Mapping[str, Mapping[str, bool]]]:
    """Ask a model; return the answers by task, and whether metrics are better higher."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    numbers: dict[str, list[int]] = defaultdict(list)
    for task, number in questions.index:
        numbers[task].append(number)
    tasks = {name: questions.tasks[name] for name in numbers}
    for task in tasks.values():
        task.set_fewshot_seed(seed=_SEED)
    with _quiet(), _seeded(), precision.forwards(model.dtype, model.dtype, model.device):
        asked = HFLM(pretrained=model, tokenizer=questions.processor, batch_size=batch_size)
        results = evaluate(asked, {"tasks": tasks}, samples=dict(numbers), bootstrap_iters=0)
    answers: dict[str, Answers] = {}
    for task, rows in results["samples"].items():
        answers[task] = defaultdict(list)
        for row in rows:
            said = [leaf for leaf in tree_leaves(row["resps"]) if isinstance(leaf, float)]
            if not all(map(math.isfinite, said)):
                raise ModelError(
                    f"The answer to question {row['doc_id']} of '{task}' is not finite: the model "
                    "computes NaN or infinity. Use a milder compression, or float32 in place of "
                    "float16."
                )
            for metric in row["metrics"]:
                answers[task][metric, row["filter"]].append(row)
    return answers, results.get("higher_is_better", {})


def _first_metric(task: str, answers: Answers, higher: Mapping[str, bool]) -> tuple[str, str]:
    """Return the first metric of a task, with its filter, that scores single questions.

    Raises:
        DataError: If there is none.
    """
    for metric, filter in answers:
        values = [row[metric] for row in answers[metric, filter]]
        plain = all(isinstance(value, (bool, int, float)) for value in values)
        if plain and higher.get(metric, True):
            return metric, filter
    raise DataError(
        f"The task '{task}' of lm-eval has no metric that scores each question by a number of "
        "which more is better. Use 'perplexity', or another task."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's own bars and remarks from the screen."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Have tasks draw the same at each run, and nobody else."""
    python = random.getstate()
    numpy = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
