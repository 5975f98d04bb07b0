"""Distill the original model into the compressed one, on the masks and grids that it has.

Weights that were removed stay removed. A quantized layer learns behind its grid: the forward pass
rounds, the backward pass does not (the straight-through estimator), so that codes change and scales
do not.

Source: Hinton et al. 2015, arXiv 1503.02531 (distillation); Bengio et al. 2013, arXiv 1308.3432
(the straight-through estimator).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optimum_order.backends.base import Recovery, option
from optimum_order.errors import DataError
from optimum_order.layers.state import LayerState
from optimum_order.layers.tree import tensors_in

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel

    from optimum_order.models.units import Target

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]

_AT_ONCE = 4
"""Samples of a step."""
_HELD_BACK = 8
"""One in so many parts of the calibration data measures the model and is never learned from."""
_LOOKS = 10
"""How often the model is measured on the way."""
_WARMUP = 0.05
_LEAST_RATE = 0.1
_DIVERGED = 3.0
"""Times the first loss at which learning stops."""


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """How long, and how fast."""

    steps: int = option(
        dataclasses.MISSING, "steps of Adam", check=lambda v: v > 0, allowed="a positive integer"
    )
    rate: float = option(
        1e-4, "the largest learning rate", check=lambda v: 0 < v < 1, allowed="between 0 and 1"
    )


class Distill(Recovery):
    """Minimize the divergence of the model's predictions from those of the original.

    Where there are no logits, the squared error of the first output. The state with the least loss
    on samples that were held back is the result, so that it is never worse there.
    """

    name = "distill"
    summary = "learn from the original model, on the masks and grids that layers have"
    Options = DistillOptions
    options: DistillOptions

    @property
    def rounds(self) -> int:
        return self.options.steps

    def recover(
        self,
        model: PreTrainedModel,
        states: Mapping[str, LayerState],
        batches: Sequence[Batch],
        teacher: PreTrainedModel,
    ) -> Mapping[str, LayerState]:
        parts = [part for batch in batches for part in _split(batch)]
        held = parts[::-_HELD_BACK]
        learned = [part for part in parts if not any(part is one for one in held)]
        if not learned:
            raise DataError(
                f"Stage '{self.stage}' holds some calibration samples back and learns from the "
                f"others: give more than {_AT_ONCE} samples."
            )
        student = _Student(model, {n: s for n, s in states.items() if self.covers(n)}, teacher)
        first = best = student.measured(held)
        state = student.latents()
        optimizer = torch.optim.AdamW(
            student.parameters, lr=self.options.rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._part_of_rate)
        every = max(1, self.options.steps // _LOOKS)
        for step in range(self.options.steps):
            loss = student.step(learned[step % len(learned)], optimizer)
            schedule.step()
            self.report(f"loss {loss:.4g}, {best:.4g} on held-back samples")
            if (step + 1) % every and step + 1 < self.options.steps:
                continue
            measured = student.measured(held)
            if measured < best:
                best, state = measured, student.latents()
            if not measured < _DIVERGED * first:
                logger.warning(
                    "'%s' diverged at step %d: the loss on samples that were held back is %.4g, "
                    "and was %.4g. The best state so far is taken; choose a lower 'rate'.",
                    self.stage,
                    step + 1,
                    measured,
                    first,
                )
                break
        if not best < first:
            logger.warning(
                "'%s' found no better state: the loss on samples that were held back stays %.4g.",
                self.stage,
                first,
            )
            return {}
        student.load(state)
        note = f"{self.stage}: loss {first:.4g} to {best:.4g} on samples that were held back"
        return {
            name: dataclasses.replace(
                states[name], weight=weight, notes=(*states[name].notes, note)
            )
            for name, weight in student.weights().items()
        }

    def _part_of_rate(self, step: int) -> float:
        """Return the part of the learning rate at a step: a warm-up, then half a cosine."""
        done = step / self.options.steps
        if done < _WARMUP:
            return (done + 1 / self.options.steps) / (_WARMUP + 1 / self.options.steps)
        falling = (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP))) / 2
        return _LEAST_RATE + (1 - _LEAST_RATE) * falling


class _Student:
    """A copy of a model in float32 whose layers learn, and the model that it learns from.

    Args:
        model: The model; it is not changed.
        states: The layers that learn, by name.
        teacher: The original model; it is moved and cast.
    """

    def __init__(
        self, model: PreTrainedModel, states: Mapping[str, LayerState], teacher: PreTrainedModel
    ):
        from optimum_order.models.units import find_targets

        self.states = {name: state.to(model.device) for name, state in states.items()}
        self.model = copy.deepcopy(model)
        nn.Module.float(self.model)
        self.model.requires_grad_(False)
        self.teacher = teacher
        nn.Module.float(self.teacher)
        self.teacher.to(model.device)  # type: ignore[arg-type]
        self.teacher.eval()
        self.targets = [target for target in find_targets(self.model) if target.name in states]
        device = model.device
        self._latents = {
            name: nn.Parameter(state.weight.detach().float().to(device).clone())
            for name, state in states.items()
        }
        self._masks = {name: state.mask.to(device) for name, state in states.items()}
        # a parameter that is shared is put in place wherever it is
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[id(parameter)].append((module, name))
        self._parts: dict[int, list[Target]] = defaultdict(list)
        for target in self.targets:
            self._parts[id(target.parameter)].append(target)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned."""
        return list(self._latents.values())

    def latents(self) -> dict[str, Tensor]:
        """Return a copy of what was learned, by the name of the layer."""
        return {name: latent.detach().clone() for name, latent in self._latents.items()}

    def load(self, latents: Mapping[str, Tensor]) -> None:
        """Go back to what was learned before."""
        for name, latent in latents.items():
            self._latents[name].data.copy_(latent)

    def weights(self) -> dict[str, Tensor]:
        """Return the weight of each layer on its mask and grid, (out, in), in its own dtype."""
        return {name: self._on_grid(name) for name in self.states}

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

    def _on_grid(self, name: str) -> Tensor:
        state = self.states[name]
        weight = self._latents[name].detach().to(state.weight.dtype)
        weight = weight.masked_fill(self._masks[name], 0.0)
        if state.grid is not None:
            weight = state.grid.nearest(weight)
            weight = weight.masked_fill(self._masks[name], 0.0)
        return weight + 0.0  # no zero has a sign

    def _effective(self, name: str) -> Tensor:
        """Return a weight as the model will have it, through which its latent gets a gradient."""
        latent = self._latents[name].masked_fill(self._masks[name], 0.0)
        return latent + (self._on_grid(name).float() - latent).detach()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Have the copy compute with what was learned, until the backward pass is done."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for key, targets in self._parts.items():
                parameter = targets[0].parameter
                whole = _whole(targets, parameter.shape, self._effective)
                for module, name in self._places[key]:
                    before.append((module, name, parameter))
                    del module._parameters[name]
                    setattr(module, name, whole)
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


def _split(batch: Batch) -> list[Batch]:
    """Return a batch in parts of a few samples."""
    count = len(next(iter(batch.values())))
    return [
        {name: tensor[start : start + _AT_ONCE] for name, tensor in batch.items()}
        for start in range(0, count, _AT_ONCE)
    ]
