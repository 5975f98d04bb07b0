"""Powers of two that move from the columns of a layer into whatever makes the layer's input.

A norm that multiplies by a gain, or a layer whose rows become the columns, can take a power of two
of each column: the model then computes the same bits. Which modules can is not read from names.
Candidates are seen in one forward, tried with random powers, and believed if every output has the
same bits as before.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.data.samples import placed
from optimum_order.models import hf, precision
from optimum_order.models.units import Target, Unit

_SEED = 0
_TOKENS = 16


@dataclass(frozen=True)
class Fold:
    """A place that powers of two of columns can move to.

    Args:
        readers: The layers whose columns are meant; all that read the input.
        gains: Parameters of a norm that are multiplied, each (in,).
        writer: Or the layer whose rows are multiplied.
        rows: (in,) int64, the row or gain that makes each column.
    """

    readers: tuple[Target, ...]
    gains: tuple[nn.Parameter, ...]
    writer: Target | None
    rows: Tensor

    @property
    def layers(self) -> tuple[Target, ...]:
        """The readers, and the writer if there is one."""
        return self.readers if self.writer is None else (*self.readers, self.writer)

    def multiply(self, exponent: Tensor) -> None:
        """Multiply what makes the input by powers of two, in place; the readers stay as they are.

        Args:
            exponent: (in,) int8, equal where columns have one row.
        """
        rows = self.of_rows(exponent)
        with torch.no_grad():
            for gain in self.gains:
                gain.copy_(torch.ldexp(gain, rows.int().to(gain.device)))
            if self.writer is not None:
                view = self.writer.view
                view.copy_(torch.ldexp(view, rows.int().to(view.device)[:, None]))
                bias = getattr(self.writer.module, "bias", None)
                if isinstance(bias, Tensor):
                    bias.copy_(torch.ldexp(bias, rows.int().to(bias.device)))

    def of_rows(self, exponent: Tensor) -> Tensor:
        """Return the exponents of rows, (rows,), from those of columns."""
        exponents = torch.zeros(int(self.rows.max()) + 1, dtype=exponent.dtype)
        exponents[self.rows] = exponent.cpu()
        return exponents

    def holds(self, exponent: Tensor) -> bool:
        """Return whether columns that have one row have one exponent."""
        return torch.equal(self.of_rows(exponent)[self.rows], exponent.cpu())


@torch.no_grad()
def find_folds(
    model: PreTrainedModel, units: Sequence[Unit], sample: Mapping[str, Tensor]
) -> list[Fold]:
    """Return the folds of a model that leave every bit of its outputs alone.

    Args:
        model: In evaluation mode and in float32; its weights are changed and put back.
        units: From `find_units(model)`.
        sample: Arguments of a forward.
    """
    sample = _short(sample)
    candidates = _candidates(model, units, sample)
    expected = _outputs(model, sample)
    folds: list[Fold] = []
    taken: set[str] = set()
    for alike in candidates.values():
        alike = [fold for fold in alike if not taken & {t.name for t in fold.readers}]
        if alike and all(map(torch.equal, _tried(model, alike, sample), expected)):
            folds += alike
            taken |= {target.name for fold in alike for target in fold.readers}
    return folds


def _short(sample: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a sample with few tokens: as many show what more would."""
    lengths = {t.shape[1] for t in sample.values() if t.ndim == 2 and not t.is_floating_point()}
    if len(lengths) != 1 or any(t.ndim != 2 or t.is_floating_point() for t in sample.values()):
        return sample
    return {name: tensor[:, :_TOKENS] for name, tensor in sample.items()}


def column_sources(folds: Iterable[Fold]) -> dict[str, Tensor]:
    """Return for each reader of the folds what makes its columns, (in,) int64, by name.

    Args:
        folds: From `find_folds`. No two sources have one number.
    """
    first = 0
    sources: dict[str, Tensor] = {}
    for fold in folds:
        for target in fold.readers:
            sources[target.name] = fold.rows + first
        first += int(fold.rows.max()) + 1
    return sources


def _tried(
    model: PreTrainedModel, folds: Sequence[Fold], sample: Mapping[str, Tensor]
) -> list[Tensor]:
    """Return the outputs with random powers of two folded; the weights are put back."""
    generator = torch.Generator().manual_seed(_SEED)
    exponents = []
    for fold in folds:
        rows = torch.randint(-2, 3, (int(fold.rows.max()) + 1,), generator=generator)
        exponents.append(rows.to(torch.int8)[fold.rows])
    try:
        for fold, exponent in zip(folds, exponents, strict=True):
            move(fold, exponent)
        return _outputs(model, sample)
    finally:
        for fold, exponent in zip(folds, exponents, strict=True):
            move(fold, -exponent)


@torch.no_grad()
def move(fold: Fold, exponent: Tensor) -> None:
    """Multiply the columns that read an input by powers of two, and divide what makes the input.

    Args:
        fold: The layers.
        exponent: (in,) int8, equal where columns have one row.
    """
    fold.multiply(-exponent)
    for target in fold.readers:
        view = target.view
        view.copy_(torch.ldexp(view, exponent.int().to(view.device)))


def _outputs(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> list[Tensor]:
    with precision.forwards(model.dtype, model.dtype, model.device):
        output = model(**placed(sample, model), **hf.uncached(model))
    return [value for value in output.values() if isinstance(value, Tensor)]


def _candidates(
    model: PreTrainedModel, units: Sequence[Unit], sample: Mapping[str, Tensor]
) -> dict[Any, list[Fold]]:
    """Return what might be folded: what is alike in all blocks is one entry."""
    inputs: dict[str, int] = {}
    norms: dict[int, nn.Module] = {}
    held: list[Tensor] = []  # a freed tensor's address could come back
    with contextlib.ExitStack() as stack:
        for hook in _hooks(model, units, inputs, norms, held):
            stack.enter_context(hook)
        _outputs(model, sample)
    candidates: dict[Any, list[Fold]] = defaultdict(list)
    for unit in units:
        readers: dict[int, list[Target]] = defaultdict(list)
        for target in unit.targets:
            if target.name in inputs and target.kind in ("linear", "conv1d"):
                readers[inputs[target.name]].append(target)
        for address, targets in readers.items():
            names = tuple(target.name.removeprefix(unit.name) for target in targets)
            width = targets[0].view.shape[1]
            norm = norms.get(address)
            if norm is not None:
                gains = tuple(p for p in norm.parameters(recurse=False) if p.shape == (width,))
                fold = Fold(tuple(targets), gains, None, torch.arange(width))
                candidates[0, names].append(fold)
                continue
            for writer in unit.targets:
                if writer in targets or writer.kind not in ("linear", "conv1d"):
                    continue
                for number, rows in enumerate(_rows(model, writer.view.shape[0], width)):
                    key = (1, names, writer.name.removeprefix(unit.name), number)
                    candidates[key].append(Fold(tuple(targets), (), writer, rows))
    return dict(sorted(candidates.items()))


def _rows(model: PreTrainedModel, outputs: int, inputs: int) -> Iterator[Tensor]:
    """Yield the ways in which rows of one layer may be the columns of another."""
    if outputs == inputs:
        yield torch.arange(inputs)
        return
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (inputs // heads if heads else 0)
    if width and inputs % outputs == 0 and outputs % width == 0:
        columns = torch.arange(inputs)  # a head of keys and values serves several heads of queries
        yield columns // (width * (inputs // outputs)) * width + columns % width


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _hooks(
    model: nn.Module,
    units: Sequence[Unit],
    inputs: dict[str, int],
    norms: dict[int, nn.Module],
    held: list[Tensor],
) -> Iterator[contextlib.AbstractContextManager[None]]:
    """Yield hooks that note the address of each layer's input and of each norm's output."""

    def noting(target: Target) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[target.name] = args[0].data_ptr()
                held.append(args[0])

        return note

    def output(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            norms[result.data_ptr()] = module
            held.append(result)

    for unit in units:
        for target in unit.targets:
            yield _hooked(target.module.register_forward_pre_hook(noting(target)))
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.ndim == 1 for parameter in own):
            yield _hooked(module.register_forward_hook(output))
