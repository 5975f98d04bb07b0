"""Learn from the original model: the loop and the student of `distill` and `refit`.

The student is a copy of the compressed model in which some tensors are computed from what is
learned, rounded as they will be stored. The backward pass does not round (the straight-through
estimator). One part of the calibration samples is never learned from, and the state that is best
there is the result.

Nothing but the start of a student is random: batches come in turn, and modules are in evaluation
mode. So what was learned, the moments of Adam and the number of the step are all that is needed to
go on where a run was cut off, with the same bits.

Source: Hinton et al. 2015, arXiv 1503.02531 (distillation); Bengio et al. 2013, arXiv 1308.3432
(the straight-through estimator).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from optimum_order.backends.base import Recovery, Workload, option
from optimum_order.errors import DataError
from optimum_order.layers.state import LayerState
from optimum_order.layers.tree import tensors_in
from optimum_order.order import Stage

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel

    from optimum_order.models.units import Target

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]

_HELD_BACK = 8
"""One in so many parts of the calibration data measures the model and is never learned from."""
_LOOKS = 10
"""How often the model is measured on the way."""
_WARMUP = 0.05
_LEAST_RATE = 0.1
_DIVERGED = 3.0
"""Times the first loss at which learning stops."""


class LearningOptions(Protocol):
    """The options that a method which learns has."""

    @property
    def steps(self) -> int:
        """Steps of Adam."""

    @property
    def rate(self) -> float:
        """The largest learning rate."""

    @property
    def batch_size(self) -> int:
        """Samples of a step."""


def steps_option(default: Any = dataclasses.MISSING) -> Any:
    """Return the field for the number of steps."""
    return option(default, "steps of Adam", check=lambda v: v > 0, allowed="a positive integer")


def rate_option(default: float) -> Any:
    """Return the field for the learning rate."""
    return option(
        default,
        "the largest learning rate",
        check=lambda v: 0 < v < 1,
        allowed="between 0 and 1",
    )


def batch_size_option() -> Any:
    """Return the field for the number of samples of a step."""
    return option(4, "samples of a step", check=lambda v: v > 0, allowed="a positive integer")


class Learning(Recovery):
    """A recovery that brings the predictions of a model nearer to those of the original.

    Where there are no logits, the squared error of the first output counts. The state with the
    least loss on samples that were held back is the result, so that it is never worse there.
    """

    options: LearningOptions

    @property
    def fewest_samples(self) -> int:
        return self.options.batch_size + 1

    @abstractmethod
    def student(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ) -> Student:
        """Return the copy of a model that learns.

        Args:
            model: The model; not to be changed.
            states: The layers that the method covers, by name.
            teacher: The original model; it may be moved and cast.
        """

    @property
    def rounds(self) -> int:
        return self.options.steps

    def on_a_part(self, part: float) -> Stage:
        steps = max(_LOOKS, round(part * self.options.steps))  # as often over each sample
        return self.stage.having("steps", steps=steps) if steps < self.options.steps else self.stage

    def workload(self, samples: int) -> Workload:
        steps, size = self.options.steps, self.options.batch_size
        looks = 1 + len(range(0, steps, max(1, steps // _LOOKS)))
        held = size * -(-samples // (size * _HELD_BACK))
        # the teacher's, the student's, and that of the student's blocks in the backward pass
        return Workload(steps, size, forward=3 * steps * size + 2 * looks * held)

    def recover(
        self,
        model: PreTrainedModel,
        states: Mapping[str, LayerState],
        batches: Sequence[Batch],
        teacher: PreTrainedModel,
    ) -> Mapping[str, LayerState]:
        parts = [part for batch in batches for part in _split(batch, self.options.batch_size)]
        held = parts[::-_HELD_BACK]
        learned = [part for part in parts if not any(part is one for one in held)]
        if not learned:
            raise DataError(
                f"Stage '{self.stage}' holds some calibration samples back and learns from the "
                f"others: give more than {self.options.batch_size} samples."
            )
        covered = {name: state for name, state in states.items() if self.covers(name)}
        student = self.student(model, covered, teacher)
        optimizer = torch.optim.AdamW(
            student.parameters, lr=self.options.rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        stored = self.stored()
        if stored is None:
            begun = 0
            first = best = student.measured(held)
            state = student.learned_so_far()
        else:
            begun, first, best, state = (stored[key] for key in ("step", "first", "best", "state"))
            student.load(stored["learned"])
            _set_moments(optimizer, student.learned, stored["moments"])
            self.report("", begun)
        if not first > 0:
            logger.warning(
                "'%s' has nothing to learn: the model predicts what the original predicts. Let "
                "it follow a stage that loses something.",
                self.stage,
            )
            return {}
        every = max(1, self.options.steps // _LOOKS)
        for step in range(begun, self.options.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.options.rate * self._part_of_rate(step)
            loss = student.step(learned[step % len(learned)], optimizer)
            self.report(f"loss {loss:.4g}, {best:.4g} on held-back samples")
            if not (step + 1) % every or step + 1 == self.options.steps:
                measured = student.measured(held)
                if measured < best:
                    best = measured
                    state = student.learned_so_far()
                if not measured < _DIVERGED * first:
                    logger.warning(
                        "'%s' diverged at step %d: the loss on samples that were held back is "
                        "%.4g, and was %.4g. The best state so far is taken; choose a lower "
                        "'rate'.",
                        self.stage,
                        step + 1,
                        measured,
                        first,
                    )
                    break
            progress = {"step": step + 1, "first": first, "best": best, "state": state}
            self.store(functools.partial(_in_between, student, optimizer, progress))
        if not best < first:
            logger.warning(
                "'%s' found no better state: the loss on samples that were held back stays %.4g.",
                self.stage,
                first,
            )
            self.parameters = {}
            return {}
        student.load(state)
        self.parameters = student.outside()
        note = f"{self.stage}: loss {first:.4g} to {best:.4g} on samples that were held back"
        return {
            name: dataclasses.replace(after, notes=(*after.notes, note))
            for name, after in student.after().items()
        }

    def _part_of_rate(self, step: int) -> float:
        """Return the part of the learning rate at a step: a warm-up, then half a cosine."""
        done = step / self.options.steps
        if done < _WARMUP:
            return (done + 1 / self.options.steps) / (_WARMUP + 1 / self.options.steps)
        falling = (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP))) / 2
        return _LEAST_RATE + (1 - _LEAST_RATE) * falling


class Student(ABC):
    """A copy of a model in float32 that learns, and the model that it learns from.

    Activations within a block are computed again in the backward pass, and not held.

    A subclass fills `learned` and says how the layers follow from it.

    Args:
        model: The model; it is not changed.
        states: The layers that change, by name.
        teacher: The original model; it is moved and cast.

    Attributes:
        learned: What Adam changes, by name.
    """

    def __init__(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ):
        from optimum_order.models.units import find_targets, find_units

        self.states = {name: state.to(model.device) for name, state in states.items()}
        self.learned: dict[str, nn.Parameter] = {}
        self.model = copy.deepcopy(model)
        nn.Module.float(self.model)
        self.model.requires_grad_(False)
        self.teacher = teacher
        nn.Module.float(self.teacher)
        self.teacher.to(model.device)  # type: ignore[arg-type]
        self.teacher.eval()
        # a parameter that is shared is put in place wherever it is
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[id(parameter)].append((module, name))
        self._parts: dict[int, list[Target]] = defaultdict(list)
        for target in find_targets(self.model):
            if target.name in states:
                self._parts[id(target.parameter)].append(target)
        # transformers' own checkpointing needs training mode, and with it dropout
        for unit in find_units(self.model):
            forward = unit.module.forward
            unit.module.forward = functools.partial(checkpoint, forward, use_reentrant=False)

    @abstractmethod
    def effective(self, name: str) -> Tensor:
        """Return a layer's weight as the model will have it, with gradients to what is learned.

        Args:
            name: Of the layer.

        Returns:
            (out, in) float32.
        """

    @abstractmethod
    def after(self) -> dict[str, LayerState]:
        """Return the layers as they are with what was learned, by name."""

    def others(self) -> dict[str, Tensor]:
        """Return other parameters as the model will have them, with gradients, by name."""
        return {}

    def outside(self) -> dict[str, Tensor]:
        """Return the values of other parameters as they are to be stored, by name."""
        return {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned."""
        return list(self.learned.values())

    def learned_so_far(self) -> dict[str, Tensor]:
        """Return a copy of what was learned, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.learned.items()}

    def load(self, learned: Mapping[str, Tensor]) -> None:
        """Go back to what was learned before."""
        for name, values in learned.items():
            self.learned[name].data.copy_(values)

    @torch.no_grad()
    def measured(self, batches: Sequence[Batch]) -> float:
        """Return the mean loss on some batches; infinity if it is not a number."""
        with self._installed():
            loss = sum(float(self._loss(batch)) for batch in batches) / len(batches)
        return loss if math.isfinite(loss) else math.inf

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
        """Learn from a batch; return the loss before."""
        with torch.inference_mode(False), torch.enable_grad():
            with self._installed():
                loss = self._loss(batch)
                loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Have the copy compute with what was learned, until the backward pass is done."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            new: list[tuple[nn.Parameter, Tensor]] = []
            for targets in self._parts.values():
                parameter = targets[0].parameter
                new.append((parameter, _whole(targets, parameter.shape, self.effective)))
            for name, tensor in self.others().items():
                new.append((self.model.get_parameter(name), tensor))
            for parameter, tensor in new:
                for module, name in self._places[id(parameter)]:
                    before.append((module, name, parameter))
                    del module._parameters[name]
                    setattr(module, name, tensor)
            yield
        finally:
            for module, name, parameter in before:
                delattr(module, name)
                module._parameters[name] = parameter

    def _loss(self, batch: Batch) -> Tensor:
        from optimum_order.data.samples import placed
        from optimum_order.models import hf

        inputs = placed(batch, self.model)
        options = hf.uncached(self.model)
        with torch.no_grad():
            wanted = self.teacher(**inputs, **options)
        output = self.model(**inputs, **options)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
            one, other = (
                next(t for t in tensors_in(outputs) if t.is_floating_point())
                for outputs in (output, wanted)
            )
            return functional.mse_loss(one, other) / other.square().mean().clamp(min=1e-30)
        divergence = functional.kl_div(
            logits.log_softmax(-1), wanted.logits.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        mask: Tensor | None = inputs.get("attention_mask")
        if mask is not None and mask.shape == divergence.shape:
            return (divergence * mask).sum() / mask.sum().clamp(min=1)
        return divergence.mean()


def _in_between(
    student: Student, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the progress, what is learned and the optimizer's tensors for each parameter."""
    learned = {name: parameter.detach() for name, parameter in student.learned.items()}
    moments = {name: dict(optimizer.state[student.learned[name]]) for name in learned}
    return {**progress, "learned": learned, "moments": moments}


def _set_moments(
    optimizer: torch.optim.Optimizer,
    learned: Mapping[str, nn.Parameter],
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give an optimizer the tensors of `_in_between`."""
    for name, parameter in learned.items():
        if mine := moments[name]:
            step = mine["step"].cpu()  # where Adam keeps the number of its steps
            optimizer.state[parameter] = dict(mine) | {"step": step}


def _whole(targets: Sequence[Target], shape: torch.Size, weight_of: Any) -> Tensor:
    """Return a whole parameter from the matrices of its layers.

    Args:
        targets: The layers: all of the parameter, its experts, or groups of its filters.
        shape: Of the parameter.
        weight_of: Gives the matrix (out, in) of a layer by name.
    """
    parts = []
    for target in targets:
        matrix = weight_of(target.name)
        parts.append(matrix.T if target.transposed else matrix)
    if targets[0].expert is not None:
        return torch.stack(parts)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def _split(batch: Batch, size: int) -> list[Batch]:
    """Return a batch in parts of `size` samples."""
    count = len(next(iter(batch.values())))
    return [
        {name: tensor[start : start + size] for name, tensor in batch.items()}
        for start in range(0, count, size)
    ]
