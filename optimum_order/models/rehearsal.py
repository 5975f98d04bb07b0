"""A forward without weights: which inputs a model takes, and how long a text it can read.

The parameters are on the meta device, so that products cost nothing. Everything that is computed
from the inputs alone (positions, masks, shifted ids) keeps its values, so that every index into a
table of embeddings can be compared with the rows of the table. What a model does with indices,
offsets and padding is thus seen, not guessed from its config.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from optimum_order.errors import OptimumOrderError
from optimum_order.models.source import Checkpoint, InMemory

_MOST_CALLS = 10_000
"""Calls of torch in one rehearsal: a recurrent model makes hundreds for every token."""
_SHORT = 8
"""Tokens that every model can read at once."""
_POSITIONS = {"position_embeddings", "position_embedding", "wpe", "embed_positions", "pos_embed"}
_OTHER_INPUTS = ("vision", "visual", "image", "audio", "speech")
_FACTORIES = {
    torch.arange,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.tensor,
    torch.zeros,
}


@dataclass(frozen=True)
class Overrun:
    """An index into a table of embeddings that the table does not have.

    Args:
        table: The name of the table in the model.
        rows: Its number of rows.
        index: The largest index that was looked up, or a negative one.
        is_vocabulary: Whether the table holds the token embeddings.
    """

    table: str
    rows: int
    index: int
    is_vocabulary: bool


@dataclass(frozen=True)
class Rehearsal:
    """The result of one rehearsed forward.

    Args:
        overruns: The tables that were too small.
        refusal: The message with which the forward refused its inputs, or None.
        failure: The message of any error that ended the rehearsal, or None.
    """

    overruns: Sequence[Overrun]
    refusal: str | None
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether the forward ran to its end, and found every index in its table."""
        return not self.overruns and self.failure is None


def outline(source: Checkpoint | InMemory) -> PreTrainedModel | None:
    """Return a model with its parameters on the meta device and its buffers as they are.

    Args:
        source: The model; no weight is read.

    Returns:
        The model, or None where it can only be made with its weights.
    """
    model: PreTrainedModel
    if isinstance(source, InMemory):
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            for parameter in source.model.parameters()
        }
        model = copy.deepcopy(source.model, memo)
        return model
    try:
        model = source.skeleton()
    except OptimumOrderError:
        # the error is raised again, or does not arise, where weights are loaded
        return None
    return model


def takes(model: PreTrainedModel) -> list[str]:
    """Return the names of the arguments that a model's forward takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def rehearse(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Rehearsal:
    """Run a forward without weights.

    Args:
        model: From `outline`.
        inputs: The arguments of the forward, on the CPU.
    """
    watch = _Watch(model)
    refusal = None
    failure = None
    try:
        with torch.inference_mode(), watch:
            model(**inputs)
    except _Enough:
        pass
    except Exception as error:
        failure = str(error).strip().split("\n")[0] or type(error).__name__
        if _is_refusal(error):
            refusal = failure
    return Rehearsal(watch.overruns(), refusal, failure)


def usable_length(
    model: PreTrainedModel, wanted: int, inputs: Callable[[Tensor], Mapping[str, Tensor]]
) -> int:
    """Return the number of tokens, up to `wanted`, that a model can read at once.

    Args:
        model: From `outline`.
        wanted: Tokens.
        inputs: Makes the arguments of the forward of token ids (1, tokens).
    """
    token = _plain_token(model)

    def run(length: int) -> Rehearsal:
        return rehearse(model, inputs(torch.full((1, length), token)))

    limit = min(filter(None, (wanted, stated_positions(model), table_positions(model))))
    if run(limit).passed:
        return limit
    low = min(_SHORT, limit)
    short = run(low)

    def fits(length: int) -> bool:
        rehearsal = run(length)
        # what fails for any text says nothing about the length
        return rehearsal.passed or (not rehearsal.overruns and short.failure is not None)

    if fits(limit):
        return limit
    high = limit
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def stated_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model's config states, or None."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def table_positions(model: PreTrainedModel) -> int | None:
    """Return the tokens that the smallest learned table of text positions is long enough for.

    Args:
        model: The model, on any device.

    Returns:
        The tokens, or None where no such table is known.
    """
    lengths = []
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if last not in _POSITIONS or not isinstance(module, nn.Embedding):
            continue
        if any(word in part for part in path for word in _OTHER_INPUTS):
            continue
        # BART's tables begin with rows for nothing, RoBERTa's positions count from padding + 1
        begin = getattr(module, "offset", None)
        if begin is None:
            begin = 0 if module.padding_idx is None else module.padding_idx + 1
        lengths.append(module.weight.shape[0] - begin)
    return min(lengths, default=None)


class _Enough(BaseException):
    """Ends a rehearsal that has gone on for long; no model code catches it."""


class _Watch(TorchFunctionMode):
    """Keeps what depends on no parameter on the CPU, and watches the tables that are read."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self._names = {
            id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)
        }
        self._vocabulary = _token_table(model)
        self._largest: dict[int, tuple[int, int]] = {}
        self._calls = 0

    def overruns(self) -> list[Overrun]:
        """Return the tables that were read beyond their end."""
        return [
            Overrun(self._names.get(table, "a table"), rows, index, table == self._vocabulary)
            for table, (index, rows) in self._largest.items()
            if not 0 <= index < rows
        ]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise _Enough
        if func in _FACTORIES and _is_meta(kwargs.get("device")):
            kwargs["device"] = "cpu"
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.type_as) and args[0].device.type == "cpu":
            moved = func(*args, **kwargs)
            return args[0].to(moved.dtype) if moved.device.type == "meta" else moved
        if func in (functional.embedding, torch.embedding):
            index, table = args[:2] if func is functional.embedding else (args[1], args[0])
            self._look_up(index, table)
        devices = {
            leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        if func is not Tensor.__getitem__ and "meta" in devices and len(devices) > 1:
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)

    def _look_up(self, index: Tensor, table: Tensor) -> None:
        if index.device.type == "meta" or not index.numel():
            return
        largest, _ = self._largest.get(id(table), (0, 0))
        smallest = int(index.min())
        if largest >= 0:  # of a negative index no larger one is better news
            largest = smallest if smallest < 0 else max(largest, int(index.max()))
        self._largest[id(table)] = (largest, table.shape[0])


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else tensor.to("meta")


def _is_refusal(error: Exception) -> bool:
    """Return whether the model itself refuses its inputs, not torch a tensor without values."""
    message = str(error).lower()
    if "meta" in message:
        return False
    if isinstance(error, AttributeError):
        return "nonetype" in message  # an input that is missing
    return isinstance(error, (ValueError, TypeError, KeyError))


def _token_table(model: PreTrainedModel) -> int | None:
    try:
        return id(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):
        return None


def _plain_token(model: PreTrainedModel) -> int:
    """Return a token that means nothing special to the model, such as padding."""
    config = model.config.get_text_config()
    special = set()
    for name, value in config.to_dict().items():
        if name.endswith("_id"):  # Llama 3 and GLM list several tokens that end a text
            special |= set(value) if isinstance(value, (list, tuple)) else {value}
    return next(token for token in range(len(special) + 1) if token not in special)
