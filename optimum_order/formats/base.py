"""What a format on disk is: which layers it holds exactly, their tensors there and back, and its config.json entry."""

from __future__ import annotations

import dataclasses
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.layers.state import LayerState
from optimum_order.models import hf
from optimum_order.models.units import Target

Layers = Mapping[str, tuple[Target, LayerState]]
"""Every layer that was compressed, by name."""


class Paired(Layers):
    """Layers whose states are read when they are asked for, and not kept.

    Args:
        targets: Each layer by name.
        states: Its state by name.
    """

    def __init__(self, targets: Mapping[str, Target], states: Mapping[str, LayerState]):
        self._targets, self._states = targets, states

    def __getitem__(self, name: str) -> tuple[Target, LayerState]:
        return self._targets[name], self._states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


def outline(state: LayerState) -> LayerState:
    """A state without values: shapes, dtypes and what its grid is, in tensors on the meta device."""
    return _outline(state)


def _outline(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _outline(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


@dataclass(frozen=True)
class Piece:
    """Rows of one parameter, or of one expert in it, as they lie in one tensor of a checkpoint.

    Args:
        key: The name of the stored tensor.
        at: Where they begin in it, seen as by `as_matrix`.
        start: Where they begin in the parameter's own matrix.
        rows: How many there are.
        whole: Whether the stored tensor is a matrix that holds these rows and nothing else.
    """

    key: str
    at: int
    start: int
    rows: int
    whole: bool


@dataclass(frozen=True)
class Layout:
    """Where stock `save_pretrained` puts the parameters of a model.

    transformers keeps old checkpoints readable: it renames parameters on the way to disk, and takes fused ones
    apart, such as the experts of a Mixtral, which become `block_sparse_moe.experts.0.w1.weight` and so on.

    Args:
        model: The model; it may be empty.
        tensors: What is in it, by name.
        converted: Stored tensors named `*.weight` that are not simply one parameter under a possibly different name.
    """

    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    converted: frozenset[str] = frozenset()
    _pieces: Mapping[tuple[str, int], tuple[Piece, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None) -> Layout:
        """Ask transformers, one block at a time, by sending numbered rows through its own conversion."""
        state = model.state_dict()
        pieces: dict[tuple[str, int], list[Piece]] = {}
        converted: set[str] = set()
        for block in blocks(state):
            numbered, owners, first = {}, [], 0
            for key in block:
                tensor = state[key]
                rows = _rows(tensor.shape)
                ids = torch.arange(first, first + rows.numel(), dtype=torch.int32)
                numbered[key] = ids.view(list(rows) + [1] * (tensor.ndim - len(rows))).expand(
                    tensor.shape
                )
                owners.append((first, key, tensor.shape))
                first += rows.numel()
            for key, ids in hf.to_checkpoint(model, numbered).items():
                found = _runs(key, ids, owners)
                for owner, slot, piece in found:
                    pieces.setdefault((owner, slot), []).append(piece)
                renamed = any(ids is tensor for tensor in numbered.values())
                if key.endswith(".weight") and not renamed:
                    converted.add(key)
        ordered = {
            at: tuple(sorted(found, key=lambda piece: piece.start)) for at, found in pieces.items()
        }
        return cls(model, state if tensors is None else tensors, frozenset(converted), ordered)

    def pieces(self, name: str, target: Target) -> tuple[Piece, ...]:
        """Where a layer's matrix lies, first row to last; empty if it is not stored as whole rows."""
        found = self._pieces.get((target.parameter_name, target.expert or 0), ())
        if sum(piece.rows for piece in found) != _rows(target.parameter.shape)[-1]:
            return ()
        return found if target.rows is None else tuple(_cut(found, target.rows))


def blocks(names: Iterable[str]) -> list[list[str]]:
    """A model's tensors by block, others alone: what transformers fuses or takes apart is in one of these."""
    found: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*?\.\d+)\.", name)
        found.setdefault(block[1] if block else name, []).append(name)
    return list(found.values())


def as_matrix(tensor: Tensor) -> Tensor:
    """A stored tensor as the matrix whose rows are a layer's: (..., in), and for a convolution (out, in * kh * kw)."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor.reshape(-1, tensor.shape[-1])


def _rows(shape: torch.Size) -> torch.Size:
    """The dimensions of a tensor that count its rows: of a convolution the first, of others all but the last."""
    return shape[:1] if len(shape) in (1, 4) else shape[:-1]


def _cut(pieces: Iterable[Piece], rows: range) -> Iterator[Piece]:
    """What of these pieces lies in some rows of their parameter, which are counted from the first of them."""
    for piece in pieces:
        first, last = max(piece.start, rows.start), min(piece.start + piece.rows, rows.stop)
        if first < last:
            yield Piece(
                piece.key,
                piece.at + first - piece.start,
                first - rows.start,
                last - first,
                whole=False,
            )


def _runs(key: str, ids: Tensor, owners: list) -> list[tuple[str, int, Piece]]:
    """Which parameters' rows a stored tensor consists of: (parameter, slot of its first dimension, piece)."""
    if ids.ndim < 2 or not ids.numel():
        return []
    column, row = as_matrix(ids)[:, 0], ids.shape[len(_rows(ids.shape)) :]
    starts = [0, *(torch.nonzero(column.diff() != 1).flatten() + 1).tolist(), len(column)]
    found = []
    for begin, end in itertools.pairwise(starts):
        at = begin
        while at < end:
            value = int(column[at])
            first, owner, shape = next(o for o in reversed(owners) if o[0] <= value)
            if len(shape) < 2 or shape[len(_rows(shape)) :] != row:
                break  # transposed: these are no rows
            slot, start = divmod(value - first, _rows(shape)[-1])
            rows = min(end - at, _rows(shape)[-1] - start)
            whole = ids.ndim == 2 and rows == len(column)
            found.append((owner, slot, Piece(key, at, start, rows, whole)))
            at += rows
    return found


class Format(ABC):
    """One way to hold compressed layers on disk that stock transformers reads.

    A subclass is one file. `decode(encode(state), scheme(state))` gives back the weight and the grid bit for bit, and
    `pruned` if the format stores masks, as "sparse" does; otherwise it is None, whatever was pruned. A layer that the
    format does not encode is stored dense beside those it does.
    """

    name: ClassVar[str]
    """What `--format` calls it, and the `quant_method` that config.json gives."""
    summary: ClassVar[str]
    """What it is, in one line."""
    tensors: ClassVar[tuple[str, ...]]
    """The local names a layer's tensors may have."""
    runs_dense: ClassVar[bool] = True
    """Whether transformers computes with the decoded weights, so that a dense model measures what will load."""
    stock: ClassVar[bool] = True
    """Whether stock transformers loads it with nothing else installed; "auto" takes no other."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What must be installed to load it, besides torch and transformers."""
    import_first: ClassVar[str | None] = None
    """The module, if any, that has to be imported before transformers can load it."""

    @abstractmethod
    def why_not(self, target: Target, state: LayerState) -> str | None:
        """Why this layer cannot be held exactly, as the end of a sentence, or None if it can."""

    @abstractmethod
    def why_not_model(self, layout: Layout, layers: Layers) -> str | None:
        """Why the layers that it encodes cannot be held together in this model, as a sentence, or None if they can.

        Args:
            layout: Of the model.
            layers: Those that it encodes, their states without values: see `outline`.
        """

    def encodes(self, state: LayerState) -> bool:
        """Whether this layer is stored as other tensors than its plain weight."""
        return state.grid is not None

    @abstractmethod
    def scheme(self, state: LayerState) -> dict[str, Any]:
        """What config.json has to say about an encoded layer before its tensors can be read."""

    @abstractmethod
    def encode(self, state: LayerState) -> dict[str, Tensor]:
        """The tensors that stand for a layer, by local name: "weight", "weight_packed", "weight_scale" and so on."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LayerState:
        """The layer again.

        Raises:
            ArtifactError: If the tensors do not fit together; they come from a file nobody has checked.
        """

    @abstractmethod
    def quantization_config(self, layout: Layout, layers: Layers) -> dict[str, Any] | None:
        """What goes under that name into config.json, with no key that is not the format's own.

        Args:
            layout: Of the model.
            layers: As in `why_not_model`.
        """

    @abstractmethod
    def scheme_in(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """What a config.json says about the encoded layer known by these names, in the model and in the checkpoint.

        Raises:
            ArtifactError: If it says nothing.
        """


def quantized(layers: Layers) -> dict[str, tuple[Target, LayerState]]:
    """Those layers that lie on a grid."""
    return {
        name: (target, state) for name, (target, state) in layers.items() if state.grid is not None
    }
