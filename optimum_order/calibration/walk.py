"""The walk: a model's forward on every batch at once, stopped at each block.

Each batch runs the model's own `forward` in a thread of its own, and only one thread runs at a time. Where it
reaches a block it hands over the block's real arguments and waits. So masks, position embeddings, per-layer
inputs and whatever else an architecture computes between its blocks are always the right ones, and nothing here
knows what they are. At a block, the walk runs it on all batches to gather statistics, lets the visitor change
its weights, runs it again, and lets the threads go on with the new outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.calibration.capture import Capture
from optimum_order.errors import ModelError
from optimum_order.evaluation.samples import placed
from optimum_order.layer import Statistics
from optimum_order.targets import Unit


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


_PROBES = 2
"""Batches on which `Visit.outputs` runs a unit."""


class _Stop(BaseException):
    """Ends a forward whose remaining layers nobody needs; not an Exception, so that no model code catches it."""


class _Forward(threading.Thread):
    """One forward pass that pauses wherever `arrive` is called on its thread."""

    def __init__(self, run: Callable[[], Any]):
        super().__init__(daemon=True)
        self._run_model = run
        self._turn = threading.Semaphore(0)  # released to let the model go on
        self._back = threading.Semaphore(0)  # released when it has paused or ended
        self._reply: Any = None
        self._error: BaseException | None = None
        self.arrival: tuple[Unit, tuple, dict] | None = None
        """The unit it waits at, with the arguments it was called with; None once the forward has ended."""

    def run(self) -> None:
        self._turn.acquire()
        try:
            if self._error is None:
                with torch.inference_mode():
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
        if isinstance(self._reply, _Stop):
            raise self._reply
        reply, self._reply = self._reply, None
        return reply

    def resume(self, reply: Any = None) -> None:
        """On the walk's thread: let the model go on until it pauses again or ends."""
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


def walk(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batches: Iterable[dict[str, Tensor]],
    visit: Visitor,
    *,
    gram: bool,
) -> None:
    """Visit every unit once, in the order in which the model runs them.

    Args:
        model: In evaluation mode; its weights may be changed by `visit`.
        units: From `find_units(model)`.
        batches: Keyword arguments of the model's forward, one mapping per batch.
        visit: Called at each unit, with statistics of the inputs that earlier units, as they are by now, produce.
        gram: Whether the statistics hold `X^T X`.

    Raises:
        ModelError: If the forward does not reach each unit exactly once.
    """
    # A block is run more than once on the same arguments, which a cache would not survive.
    text_config = model.config.get_text_config()  # the config itself, but for a model of several modalities
    arguments = {"use_cache": False} if getattr(text_config, "use_cache", None) is not None else {}

    def forward(batch: dict[str, Tensor]) -> Callable[[], Any]:
        return lambda: model(**placed(batch, model), **arguments)

    forwards = [_Forward(forward(batch)) for batch in batches]
    remaining = {unit.name for unit in units}
    with torch.inference_mode(), _eager_experts(model), _headless(model, units), _paused(units, forwards):
        for each in forwards:
            each.resume()
        while remaining:
            unit = _common(forwards, remaining)
            remaining.discard(unit.name)
            call = type(unit.module).forward
            capture = Capture(unit.targets, gram=gram)
            for each in forwards:
                _, args, kwargs = each.arrival
                with capture:
                    call(unit.module, *args, **kwargs)
            # Experts that no token was routed to have no input; any other layer does, if it could be seen at all.
            if not capture.leaders and any(target.kind != "expert" for target in unit.targets):
                raise ModelError(
                    f"Running '{unit.name}' multiplied none of its weights with an input in a way that is understood "
                    f"({type(unit.module).__name__}). Leave it out with ignore=['{unit.name}*'], or use methods that "
                    "need no calibration: magnitude, rtn, bitsandbytes."
                )
            probes = [each.arrival[1:] for each in forwards[:_PROBES]]

            def outputs(unit=unit, call=call, probes=probes) -> Tensor:
                return torch.cat([_hidden(call(unit.module, *args, **kwargs)) for args, kwargs in probes])

            if not remaining:  # what comes after is nobody's input, but it must not be a unit once more
                _, args, kwargs = forwards[0].arrival
                forwards[0].resume(call(unit.module, *args, **kwargs))
                if forwards[0].arrival:
                    _common(forwards[:1], remaining)
            visit(Visit(unit, capture.statistics(), capture.leaders, outputs))
            if not remaining:
                return
            for each in forwards:
                _, args, kwargs = each.arrival
                each.resume(call(unit.module, *args, **kwargs))


def _hidden(output: Any) -> Tensor:
    """A unit's output as (tokens, hidden) float32: the tensor it returns, or the first of several.

    Of images (b, channels, h, w) each position is a token.
    """
    tensor = output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))
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
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Run fused experts one at a time, as their authors wrote them, so that each one's inputs can be seen."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "config")}
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
