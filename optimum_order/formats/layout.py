"""Where the checkpoint of an architecture stores the parameters of a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.models import hf
from optimum_order.models.units import Target


@dataclass(frozen=True)
class Piece:
    """Rows of one parameter, or of one expert in a parameter, as they lie in one stored tensor.

    Args:
        key: Name of the stored tensor.
        at: First row in the stored tensor, which is read through `as_matrix`.
        start: First row in the parameter's own matrix.
        rows: Number of rows.
        whole: Whether the stored tensor is a matrix of these rows and nothing else.
    """

    key: str
    at: int
    start: int
    rows: int
    whole: bool


@dataclass(frozen=True)
class Layout:
    """Where stock `save_pretrained` puts the parameters of a model.

    transformers keeps old checkpoints readable: it renames parameters on the way to disk, and takes
    fused ones apart, such as the experts of a Mixtral, which become
    `block_sparse_moe.experts.0.w1.weight` and so on.

    Args:
        model: The model; it may be empty.
        tensors: The tensors of the model by name.
        converted: Stored tensors named `*.weight` that are more than one renamed parameter.
    """

    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    converted: frozenset[str] = frozenset()
    _pieces: Mapping[tuple[str, int], tuple[Piece, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None) -> Layout:
        """Send numbered rows through transformers' own conversion, one block at a time.

        Args:
            model: The model; it may be empty.
            tensors: The tensors of the model by name, if the model is empty.
        """
        state = model.state_dict()
        pieces: dict[tuple[str, int], list[Piece]] = {}
        converted: set[str] = set()
        for block in blocks(state):
            numbered, owners = _numbered({name: state[name] for name in block})
            for key, ids in hf.to_checkpoint(model, numbered).items():
                for owner, slot, piece in _runs(key, ids, owners):
                    pieces.setdefault((owner, slot), []).append(piece)
                renamed = any(ids is tensor for tensor in numbered.values())
                if key.endswith(".weight") and not renamed:
                    converted.add(key)
        ordered = {
            place: tuple(sorted(unordered, key=lambda piece: piece.start))
            for place, unordered in pieces.items()
        }
        return cls(model, state if tensors is None else tensors, frozenset(converted), ordered)

    def pieces(self, target: Target) -> tuple[Piece, ...]:
        """Return where the matrix of a layer lies, first row to last; empty if rows are split."""
        pieces = self._pieces.get((target.parameter_name, target.expert or 0), ())
        if sum(piece.rows for piece in pieces) != _row_shape(target.parameter.shape)[-1]:
            return ()
        return pieces if target.rows is None else tuple(_cut(pieces, target.rows))


def blocks(names: Iterable[str]) -> list[list[str]]:
    """Group tensor names by block, others alone: transformers never fuses across these groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(block[1] if block else name, []).append(name)
    return list(groups.values())


def as_matrix(tensor: Tensor) -> Tensor:
    """View a stored tensor as the matrix whose rows are a layer's.

    Args:
        tensor: (..., in), or (out, in, kh, kw) for a convolution.

    Returns:
        (rows, in), or (out, in * kh * kw) for a convolution.
    """
    return tensor.flatten(1) if tensor.ndim == 4 else tensor.reshape(-1, tensor.shape[-1])


def _row_shape(shape: torch.Size) -> torch.Size:
    """Return the dimensions that count rows: of a convolution the first, else all but the last."""
    return shape[:1] if len(shape) in (1, 4) else shape[:-1]


_Owner = tuple[int, str, torch.Size]
"""The first row number of a parameter, its name and its shape."""


def _numbered(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[_Owner]]:
    """Make tensors of these shapes in which every entry is the number of its row."""
    numbered: dict[str, Tensor] = {}
    owners: list[_Owner] = []
    first = 0
    for name, tensor in state.items():
        rows = _row_shape(tensor.shape)
        ids = torch.arange(first, first + rows.numel(), dtype=torch.int32)
        columns = [1] * (tensor.ndim - len(rows))
        numbered[name] = ids.view([*rows, *columns]).expand(tensor.shape)
        owners.append((first, name, tensor.shape))
        first += rows.numel()
    return numbered, owners


def _cut(pieces: Iterable[Piece], rows: range) -> Iterator[Piece]:
    """Yield the part of these pieces that lies in some rows of their parameter.

    Args:
        pieces: The pieces of one parameter.
        rows: The rows; the first becomes row 0.
    """
    for piece in pieces:
        first = max(piece.start, rows.start)
        last = min(piece.start + piece.rows, rows.stop)
        if first < last:
            at = piece.at + first - piece.start
            yield Piece(piece.key, at, first - rows.start, last - first, whole=False)


def _runs(key: str, ids: Tensor, owners: Sequence[_Owner]) -> list[tuple[str, int, Piece]]:
    """Return which parameters' rows a stored tensor consists of.

    Args:
        key: Name of the stored tensor.
        ids: The stored tensor, made of row numbers.
        owners: Which row numbers belong to which parameter, in ascending order.

    Returns:
        The parameter, the slot in its first dimension, and the piece, of each run of rows.
    """
    if ids.ndim < 2 or not ids.numel():
        return []
    column = as_matrix(ids)[:, 0]
    row_shape = ids.shape[len(_row_shape(ids.shape)) :]
    starts = [0, *(torch.nonzero(column.diff() != 1).flatten() + 1).tolist(), len(column)]
    runs = []
    for begin, end in itertools.pairwise(starts):
        at = begin
        while at < end:
            number = int(column[at])
            first, owner, shape = next(o for o in reversed(owners) if o[0] <= number)
            if len(shape) < 2 or shape[len(_row_shape(shape)) :] != row_shape:
                break  # a transposed parameter has no rows here
            slot, start = divmod(number - first, _row_shape(shape)[-1])
            rows = min(end - at, _row_shape(shape)[-1] - start)
            whole = ids.ndim == 2 and rows == len(column)
            runs.append((owner, slot, Piece(key, at, start, rows, whole)))
            at += rows
    return runs
