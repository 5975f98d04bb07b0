"""The walk: a model's forward on every batch at once, stopped at each block.

Each batch runs the model's own `forward` in a thread of its own, and only one thread runs at a time. Where it
reaches a block it hands over the block's real arguments and waits. So masks, position embeddings, per-layer
inputs and whatever else an architecture computes between its blocks are always the right ones, and nothing here
knows what they are. At a block, the walk runs it on all batches to gather statistics, lets the visitor change
its weights, runs it again, and lets the threads go on with the new outputs.

A walk that was cut off starts its forwards afresh and answers for the finished blocks: with the outputs that were kept
(`Crossing`), where those are all that flows from block to block, or else by running the blocks again as they are now.
Either way the blocks to come see the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from optimum_order.calibration import precision
from optimum_order.calibration.capture import Capture
from optimum_order.calibration.spill import Spill, drop
from optimum_order.data.samples import placed
from optimum_order.errors import ModelError
from optimum_order.layers.state import tensor_bytes
from optimum_order.layers.statistics import Statistics
from optimum_order.models.units import Unit


@dataclass(frozen=True)
class Visit:
    """What the walk knows at one unit.

    Args:
        unit: Where it is.
        statistics: What is known about the input of each of the unit's layers, by name.
        leaders: For each layer that was reached, the first layer that read the same input.
        outputs: Runs the unit as it is now and returns its outputs on the first batches, (tokens, hidden) or
            (positions, channels) float32.
    """

    unit: Unit
    statistics: dict[str, Statistics]
    leaders: dict[str, str]
    outputs: Callable[[], Tensor]


Visitor = Callable[[Visit], None]


@dataclass(frozen=True)
class Crossing:
    """All that the forwards need to go on from a unit, had they been stopped there.

    Args:
        unit: The unit's name.
        outputs: What it returned for each batch: a tensor, or a tuple of tensors and None.
        arguments: sha256 of all else that the next unit was called with.
    """

    unit: str
    outputs: tuple[Any, ...]
    arguments: str


Keeper = Callable[[Unit, Callable[[], Crossing | None]], None]
Presence = Callable[[Unit | None], contextlib.AbstractContextManager]


_PROBES = 2
"""Batches on which `Visit.outputs` runs a unit."""

_ALIGNMENT = 64
"""Bytes, of all memory that torch allocates; the last bits of a product may depend on it."""


class _Stop(BaseException):
    """Ends a forward whose remaining layers nobody needs; not an Exception, so that no model code catches it."""


class _Stale(Exception):
    """The forwards do not reach the next unit as they did when a crossing was kept."""


_SIZES = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class _Watch(TorchFunctionMode):
    """Notes whether a model does anything with a unit's output but hand it to the next unit.

    It is active on the thread of a forward, where units do not run: all it sees is what happens before, between and
    after them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None
        """Of the last unit."""
        self.changed = False
        """Whether the model has computed anything from such an output."""
        self._earlier: list[weakref.ref] = []

    def replied(self, output: Any) -> None:
        self._earlier += map(weakref.ref, _tensors(self.output))
        self.output = output

    @property
    def kept(self) -> bool:
        """Whether the model holds on to the output of an earlier unit than the last."""
        last = {id(tensor) for tensor in _tensors(self.output)}
        self._earlier = [reference for reference in self._earlier if reference() is not None]
        return any(id(reference()) not in last for reference in self._earlier)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            not self.changed
            and self.output is not None
            and func not in _SIZES
            and not _is_fact(func, result)
        ):
            used = {id(tensor) for tensor in _tensors((args, kwargs))}
            self.changed = any(id(tensor) in used for tensor in _tensors(self.output))
        return result


def _is_fact(func: Callable, result: Any) -> bool:
    """Whether this is a look at a tensor's shape, dtype or the like."""
    return getattr(func, "__name__", "") == "__get__" and not isinstance(result, Tensor)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return (value,)
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (tuple, list))
        else ()
    )
    return tuple(tensor for part in parts for tensor in _tensors(part))


class _Forward(threading.Thread):
    """One forward pass that pauses wherever `arrive` is called on its thread."""

    def __init__(self, run: Callable[[], Any], watch: _Watch | None):
        super().__init__(daemon=True)
        self.watch = watch
        self.maps: list[mmap.mmap] = []
        """Where the tensors that it waits with lie, so far as they are not in memory."""
        self._run_model = run
        self._turn = threading.Semaphore(0)  # released to let the model go on
        self._back = threading.Semaphore(0)  # released when it has paused or ended
        self._reply: Any = None
        self._error: BaseException | None = None
        self.arrival: tuple[Unit, tuple, dict] | None = None
        """The unit it waits at, with the arguments it was called with; None once the forward has ended."""

    def run(self) -> None:
        self._turn.acquire()
        # Of this thread alone: a pool of its own for each would keep all others from their processors.
        torch.set_num_threads(1)
        try:
            if self._error is None:
                with torch.inference_mode(), self.watch or contextlib.nullcontext():
                    self._run_model()
        except _Stop:
            pass
        except BaseException as error:  # handed to the caller of `resume`
            self._error = error
        finally:
            self.arrival = None
            self._back.release()

    def arrive(self, unit: Unit, args: tuple, kwargs: dict) -> Any:
        """On the model's thread: pause, and return what `resume` brings as the unit's output."""
        self.arrival = (unit, args, kwargs)
        self._back.release()
        self._turn.acquire()
        reply, self._reply = self._reply, None
        if isinstance(reply, _Stop):
            raise _Stop  # another: one that a frame knows keeps all frames alive, and their tensors
        return reply

    def resume(self, reply: Any = None) -> None:
        """On the walk's thread: let the model go on until it pauses again or ends."""
        if self.watch and self.arrival:
            self.watch.replied(reply)
        self._reply = reply
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def _paused(units: Sequence[Unit], forwards: list[_Forward]) -> Iterator[None]:
    """Replace the units' forwards by a pause; whatever happens, put them back and end every thread."""
    by_thread: dict[int, _Forward] = {}

    def pausing(unit: Unit) -> Callable:
        def forward(*args, **kwargs):
            return by_thread[threading.get_ident()].arrive(unit, args, kwargs)

        return forward

    for unit in units:
        unit.module.forward = pausing(unit)
    try:
        for forward in forwards:
            forward.start()
            by_thread[forward.ident] = forward
        yield
    finally:
        for unit in units:
            del unit.module.forward
        for forward in forwards:
            while forward.is_alive():
                forward._reply = _Stop()
                forward._error = forward._error or _Stop()
                forward._turn.release()
                forward.join()
        torch.set_num_threads(
            torch.get_num_threads()
        )  # the number that new threads begin with again


def walk(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batches: Sequence[dict[str, Tensor]],
    visit: Visitor,
    *,
    needs: Any,
    dtype: torch.dtype | None = None,
    finished: Collection[str] = (),
    crossing: Callable[[], Crossing | None] = lambda: None,
    keep: Keeper | None = None,
    there: Presence = lambda unit: contextlib.nullcontext(),
    device: torch.device | None = None,
    spill: Spill | None = None,
) -> None:
    """Visit every unit once, in the order in which the model runs them.

    Args:
        model: In evaluation mode; its weights may be changed by `visit`.
        units: From `find_units(model)`.
        batches: Keyword arguments of the model's forward, one mapping per batch.
        visit: Called at each unit, with statistics of the inputs that earlier units, as they are by now, produce.
        gram: Whether the statistics hold `X^T X`.
        dtype: To multiply in; by default what `precision.choose` takes.
        finished: Names of units that are not to be visited, because an earlier walk has, but only run as they are.
        crossing: Gives what that walk kept at one of them, so that those up to it need not be run; or None.
        keep: Called after each visit, once the model waits at the next unit, with a function that gives what would let
            a walk go on from here; None after the last unit, and where more flows on than the unit's output.
        there: A context in which a unit has its weights, or for None the model has all that is needed before and
            between units; by default, they are always there.
        device: Where units are while they are `there`, if that is not where the model is: what they read and return is
            moved, and all else stays where it is.
        spill: Where the forwards keep what they wait with; by default, in memory.

    Raises:
        OutputError: If there is no room for that.
        ModelError: If the forward does not reach each unit exactly once.
    """
    dtype = dtype or precision.choose("auto", model.dtype, device or model.device)
    try:
        _walk(
            model,
            units,
            batches,
            visit,
            needs,
            dtype,
            finished,
            crossing,
            keep,
            there,
            device,
            spill,
        )
    except _Stale:  # nothing was visited yet
        _walk(
            model,
            units,
            batches,
            visit,
            needs,
            dtype,
            finished,
            lambda: None,
            keep,
            there,
            device,
            spill,
        )


def _walk(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batches: Sequence[dict[str, Tensor]],
    visit: Visitor,
    needs: Any,
    dtype: torch.dtype,
    finished: Collection[str],
    crossing: Callable[[], Crossing | None],
    keep: Keeper | None,
    there: Presence,
    device: torch.device | None,
    spill: Spill | None,
) -> None:
    # A block is run more than once on the same arguments, which a cache would not survive.
    text_config = (
        model.config.get_text_config()
    )  # the config itself, but for a model of several modalities
    arguments = {"use_cache": False} if getattr(text_config, "use_cache", None) is not None else {}

    def forward(batch: dict[str, Tensor]) -> Callable[[], Any]:
        return lambda: model(**placed(batch, model), **arguments)

    def resume(each: _Forward, reply: Any = None) -> None:
        each.resume(reply)
        del reply
        if spill and each.arrival:
            each.maps = spill.rest(_tensors(each.arrival[1:]))

    def calling(forward: Callable) -> Callable:
        def call(module: nn.Module, *args, **kwargs):
            if device is not None:
                args, kwargs = _moved(args, device), _moved(kwargs, device)
            output = precision.restored(
                forward(module, *args, **kwargs), model.dtype, device or home
            )
            return output if device is None else _moved(output, home)

        return call

    begun = crossing() if finished else None
    watched = bool(keep or begun)
    forwards = [_Forward(forward(batch), _Watch() if watched else None) for batch in batches]
    if begun and len(begun.outputs) != len(forwards):
        raise _Stale
    remaining = {unit.name for unit in units}
    with (
        torch.inference_mode(),
        eager_experts(model),
        _headless(model, units),
        _paused(units, forwards),
    ):
        with there(None):
            home = model.device  # where it is when it has weights
            multiplying = functools.partial(precision.forwards, dtype, model.dtype, device or home)
            for each in forwards:
                resume(each)
        while wanted := remaining.difference(finished):
            unit = _common(forwards, remaining)
            remaining.discard(unit.name)
            last = wanted == {unit.name}
            call = calling(type(unit.module).forward)
            if unit.name in finished:
                with contextlib.nullcontext() if begun else there(unit), multiplying():
                    for number, each in enumerate(forwards):
                        resume(each, begun.outputs[number] if begun else _run(call, each))
                if begun and begun.unit == unit.name:
                    if _arguments(forwards) != begun.arguments:
                        raise _Stale
                    begun = None  # its outputs live as long as the model needs them, and no longer
                continue
            with there(unit):
                capture = Capture(unit.targets, needs, dtype)
                _visit(
                    unit, call, forwards, visit, capture, multiplying, remaining if last else None
                )
                del capture
                if not last:
                    with multiplying():
                        for each in forwards:
                            resume(each, _run(call, each))
                if keep:
                    # what does not fit into memory is not worth a second copy on disk: blocks can be run again
                    flows = not last and not (spill and spill.spilled)
                    keep(
                        unit,
                        functools.partial(_crossing, unit, forwards) if flows else lambda: None,
                    )


def _visit(
    unit: Unit,
    call: Callable,
    forwards: list[_Forward],
    visit: Visitor,
    capture: Capture,
    multiplying: Callable[[], contextlib.AbstractContextManager],
    after: set[str] | None,
) -> None:
    """Have a unit visited at which all forwards wait; if it is the last, `after` are the units that may still come."""
    first = None  # what the first batch makes of the last unit
    with multiplying():
        for each in forwards:
            with capture:
                output = _run(call, each)
            if after is not None and first is None:
                first = output
            del output
    # Experts that no token was routed to have no input; any other layer does, if it could be seen at all.
    if not capture.leaders and any(target.kind != "expert" for target in unit.targets):
        raise ModelError(
            f"Running '{unit.name}' multiplied none of its weights with an input in a way that is understood "
            f"({type(unit.module).__name__}). Leave it out with ignore=['{unit.name}*'], or use methods that "
            "need no calibration: magnitude, rtn, bitsandbytes."
        )
    probes = [each.arrival[1:] for each in forwards[:_PROBES]]

    def outputs() -> Tensor:
        with multiplying():
            return torch.cat(
                [_hidden(call(unit.module, *args, **kwargs)) for args, kwargs in probes]
            )

    if after is not None:  # what comes after is nobody's input, but it must not be a unit once more
        forwards[0].resume(first)
        if forwards[0].arrival:
            _common(forwards[:1], after)
    visit(Visit(unit, capture.statistics(), capture.leaders, outputs))


def _moved(value: Any, device: torch.device) -> Any:
    """A value with the tensors in its tuples, lists and dicts on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device) for part in value)
    return (
        {key: _moved(part, device) for key, part in value.items()} if type(value) is dict else value
    )


def _run(call: Callable, forward: _Forward) -> Any:
    """What a unit returns to the forward that waits at it."""
    unit, args, kwargs = forward.arrival
    output = call(unit.module, *args, **kwargs)
    drop(forward.maps)
    return output


def _crossing(unit: Unit, forwards: list[_Forward]) -> Crossing | None:
    """What would let the forwards go on from where they wait, or None if it is more than the unit's outputs."""
    watches = [each.watch for each in forwards]
    if any(watch.changed or watch.kept or not _can_be_kept(watch.output) for watch in watches):
        return None
    arguments = _arguments(forwards)
    return (
        Crossing(unit.name, tuple(watch.output for watch in watches), arguments)
        if arguments
        else None
    )


def _can_be_kept(output: Any) -> bool:
    """Whether an output comes back from a file as it is: in its form and in how its numbers lie in memory."""
    if type(output) is tuple:
        return all(part is None or _can_be_kept(part) for part in output)
    return type(output) is Tensor and output.is_contiguous() and output.data_ptr() % _ALIGNMENT == 0


def _arguments(forwards: list[_Forward]) -> str | None:
    """sha256 of all that the units are called with where the forwards wait, but for the last unit's outputs.

    None if there is something of which nobody knows what is in it, such as a cache.
    """
    digest = hashlib.sha256()

    def take_in(value: Any, outputs: dict[int, int]) -> bool:
        if isinstance(value, Tensor):
            said = (
                f"output {outputs[id(value)]}"
                if id(value) in outputs
                else f"{value.dtype} {tuple(value.shape)}"
            )
            digest.update(said.encode())
            if id(value) not in outputs:
                digest.update(tensor_bytes(value))
            return True
        if isinstance(value, (tuple, list, dict)):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            parts = (
                [part for item in value.items() for part in item]
                if isinstance(value, dict)
                else value
            )
            return all(take_in(part, outputs) for part in parts)
        digest.update(f"{value!r};".encode())
        return value is None or isinstance(
            value, (bool, int, float, str, torch.dtype, torch.device)
        )

    for each in forwards:
        outputs = {id(tensor): number for number, tensor in enumerate(_tensors(each.watch.output))}
        if not take_in(each.arrival[1:], outputs):
            return None
    return digest.hexdigest()


def _hidden(output: Any) -> Tensor:
    """A unit's output as (tokens, hidden) float32: the tensor it returns, or the first of several.

    Of images (b, channels, h, w) each position is a token.
    """
    tensor = (
        output
        if isinstance(output, Tensor)
        else next(part for part in output if isinstance(part, Tensor))
    )
    if tensor.ndim == 4:
        tensor = tensor.movedim(1, -1)
    return tensor.flatten(0, -2).float()


def _common(forwards: list[_Forward], remaining: set[str]) -> Unit:
    """The one unit that every forward waits at."""
    arrivals = {each.arrival[0].name if each.arrival else None for each in forwards}
    if len(arrivals) != 1 or None in arrivals:
        raise ModelError(
            f"The model's forward does not run the blocks {', '.join(sorted(remaining)[:3])} for every input, so they "
            "cannot be calibrated. Leave them out with 'ignore'."
        )
    unit = forwards[0].arrival[0]
    if unit.name not in remaining:
        raise ModelError(
            f"The model runs '{unit.name}' more than once in one forward (shared layers), which cannot be calibrated. "
            "Use methods that need no calibration: magnitude, rtn, bitsandbytes."
        )
    return unit


@contextlib.contextmanager
def _headless(model: PreTrainedModel, units: Sequence[Unit]) -> Iterator[None]:
    """End a forward where it would compute logits: they are large and nobody needs them."""

    def stop(*_) -> None:
        raise _Stop

    head = model.get_output_embeddings()
    if head is None or any(unit.module is head for unit in units):
        yield
        return
    handle = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run fused experts one at a time, as their authors wrote them, so that each one's inputs can be seen."""
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(m, "is_transposed") and hasattr(m, "config")
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
