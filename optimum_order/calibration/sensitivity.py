"""How much the loss of a model changes with each output of its layers: one backward pass.

The loss is the divergence from the model's own predictions, so no labels are needed: where there
are logits, labels are drawn from them, and the squared gradient is the Fisher information. Where
there are none, outputs are multiplied by random signs, and the squared gradient is the curvature
of the squared error of the outputs.

Each block is run again in the backward pass, so the memory is that of one block, and of what the
blocks hand to each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from optimum_order.backends.base import Rewrite
from optimum_order.calibration.lookup import chances, tied_head
from optimum_order.data.samples import placed
from optimum_order.errors import ModelError
from optimum_order.layers.tree import tensors_in
from optimum_order.models import hf, precision
from optimum_order.models.units import Target, Unit

_WITHOUT = ("expert", "embedding")
"""Kinds of layers that are not watched: they are no modules of their own, or have no inputs."""
_SEED = 0
"""Of the labels that are drawn: the same run gives the same numbers."""


def single_samples(
    batches: Sequence[Mapping[str, Tensor]], *, last: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield the samples of batches one by one.

    Args:
        batches: Arguments of a forward, samples first.
        last: Whether to begin with the last sample.
    """
    for batch in reversed(batches) if last else batches:
        size = len(next(iter(batch.values())))
        for place in reversed(range(size)) if last else range(size):
            yield {name: tensor[place : place + 1] for name, tensor in batch.items()}


def output_sensitivities(
    model: PreTrainedModel, units: Sequence[Unit], samples: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the mean squared gradient of the loss by each output of each layer.

    Args:
        model: In evaluation mode; weights and gradients of the model stay as they are.
        units: From `find_units(model)`.
        samples: Arguments of a forward, one sample each.

    Returns:
        (samples, out) float32 for each layer that is a module of its own, by name: the mean over
        the tokens of each sample. The rows of an output head, and of an embedding that is tied to
        one, have the expected square. Layers that no gradient reaches are absent.

    Raises:
        ModelError: If a gradient is NaN or infinite, or all are zero.

    Source: Hassibi & Stork 1993 (the Fisher information as the Hessian of the loss).
    """
    watched = {t.name for unit in units for t in unit.targets if t.kind not in _WITHOUT}
    sums: dict[str, list[Tensor]] = {}
    with _frozen(model), contextlib.ExitStack() as stack:
        for unit in units:
            if any(target.kind != "embedding" for target in unit.targets):
                stack.enter_context(_checkpointed(unit.module))
            for target in unit.targets:
                head = tied_head(model, target)
                if head is None and target.module is model.get_output_embeddings():
                    head = target.module
                if head is not None:
                    stack.enter_context(_predicting(target, head, sums))
                elif target.name in watched:
                    stack.enter_context(_watched(target, sums))
        for number, sample in enumerate(samples):
            generator = torch.Generator().manual_seed(_SEED + number)
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                precision.forwards(model.dtype, model.dtype, model.device),
            ):
                inputs = placed(sample, model)
                loss = divergence(model(**inputs, **hf.uncached(model)), generator)
                if loss.requires_grad:  # some layer is in a block
                    loss.backward()
    sensitivities = {
        name: torch.stack(rows) for name, rows in sums.items() if len(rows) == len(samples)
    }
    _refuse_useless(sensitivities)
    return sensitivities


def _refuse_useless(sensitivities: Mapping[str, Tensor]) -> None:
    """Refuse gradients that say nothing.

    Raises:
        ModelError: If one is NaN or infinite, or all are zero.
    """
    advice = "Do without: ecsq(rate=..., sensitivity=none), mixed_precision(bits=..., error=block)."
    for name, rows in sensitivities.items():
        if not torch.isfinite(rows).all():
            raise ModelError(
                f"The gradient of the loss by the outputs of '{name}' is NaN or infinite on the "
                f"calibration data. {advice}"
            )
    if sensitivities and not any(rows.any() for rows in sensitivities.values()):
        raise ModelError(f"The loss has no gradient by the output of any layer. {advice}")


def divergence(output: Any, generator: torch.Generator) -> Tensor:
    """Return a loss whose squared gradient is the curvature of the divergence from an output.

    Args:
        output: Of a model.
        generator: Draws labels or signs.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1:
        rows = logits.flatten(0, -2).float()
        return nn.functional.cross_entropy(rows, drawn(rows, generator), reduction="sum")
    tensor = next(t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    return (tensor * signs).sum()


@torch.no_grad()
def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class from each row of logits.

    Args:
        logits: (rows, classes).
        generator: Draws, on the CPU.

    Returns:
        (rows,) int64.
    """
    chances = logits.float().softmax(-1).cumsum(-1)
    at = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    return torch.searchsorted(chances, at * chances[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _checkpointed(module: nn.Module) -> Iterator[None]:
    """Have a block forget what is inside, and run again when the backward pass needs it.

    A block whose inputs have no gradient is where the backward pass ends.
    """
    forward = module.forward
    own = vars(module).get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        if not any(tensor.requires_grad for tensor in arguments):
            for tensor in arguments[:1]:
                tensor.requires_grad_()
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = run
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def _watched(target: Target, sums: dict[str, list[Tensor]]) -> Iterator[None]:
    """Gather the squared gradients of the outputs of a layer."""

    def output(module: nn.Module, args: Any, result: Tensor) -> None:
        if result.requires_grad:
            result.register_hook(gather)

    def gather(gradient: Tensor) -> None:
        sums.setdefault(target.name, []).append(_mean_squares(target, gradient))

    handle = target.module.register_forward_hook(output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _predicting(target: Target, head: nn.Module, sums: dict[str, list[Tensor]]) -> Iterator[None]:
    """Gather the expected squared gradients of the logits, which need no labels.

    Labels that are drawn say nothing of a token that is not among them.
    """

    def output(module: nn.Module, args: Any, logits: Tensor) -> None:
        sums.setdefault(target.name, []).append(chances(logits))

    handle = head.register_forward_hook(output)
    try:
        yield
    finally:
        handle.remove()


def _mean_squares(target: Target, gradient: Tensor) -> Tensor:
    """Return the mean square of a gradient for each output of a layer, (out,).

    Args:
        target: The layer.
        gradient: (..., out), or (samples, channels, height, width) of a convolution.
    """
    if target.kind == "conv2d":
        gradient = gradient.movedim(1, -1)
    squares = gradient.detach().float().reshape(-1, gradient.shape[-1]).square().mean(0)
    rows = target.rows
    return squares if rows is None else squares[rows.start : rows.stop]


@torch.inference_mode()
def added_losses(
    model: PreTrainedModel,
    units: Sequence[Unit],
    samples: Sequence[Mapping[str, Tensor]],
    candidates: Sequence[Rewrite],
) -> list[list[float]]:
    """Return how far a model with other weights is from the model as it is.

    Args:
        model: In evaluation mode; its weights are put back.
        units: From `find_units(model)`.
        samples: Arguments of a forward, one sample each.
        candidates: The other weights.

    Returns:
        For each candidate and sample the loss that is added: of the cross-entropy of labels that
        the model draws, or of the squared error of the output, relative to its size.
    """
    options = hf.uncached(model)

    def outputs() -> Iterator[Any]:
        for sample in samples:
            with precision.forwards(model.dtype, model.dtype, model.device):
                yield model(**placed(sample, model), **options)

    losses = []
    own = []
    for number, output in enumerate(outputs()):
        losses.append(_loss(output, number))
        own.append(losses[-1](output))
    targets = [target for unit in units for target in unit.targets]
    before = {target.name: target.read() for target in targets}
    table = []
    try:
        for candidate in candidates:
            for target in targets:
                target.write(candidate(target.name, before[target.name]))
            rows = zip(losses, outputs(), own, strict=True)
            table.append([loss(output) - base for loss, output, base in rows])
    finally:
        for target in targets:
            target.write(before[target.name])
    return table


def _loss(output: Any, number: int) -> Callable[[Any], float]:
    """Return a function that says how far another output is from this one."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1:
        generator = torch.Generator().manual_seed(_SEED + number)
        labels = drawn(logits.flatten(0, -2), generator)

        def cross_entropy(other: Any) -> float:
            rows = other.logits.flatten(0, -2).float()
            return nn.functional.cross_entropy(rows, labels).item()

        return cross_entropy
    tensor = next(t for t in tensors_in(output) if t.is_floating_point()).float()

    def squared_error(other: Any) -> float:
        apart = next(t for t in tensors_in(other) if t.is_floating_point()).float() - tensor
        return (apart.square().sum() / tensor.square().sum().clamp(min=1e-30)).item()

    return squared_error
