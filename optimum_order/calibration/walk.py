"""The walk: a model's forward on every batch at once, paused at blocks or at layers.

Each batch runs the model's own `forward` in a thread of its own, and only one thread runs at a
time. Where the forward reaches a block, the thread hands over the block's real arguments and
waits. So masks, position embeddings, per-layer inputs and whatever else an architecture computes
between blocks are always the right ones, and nothing here knows what they are.

`walk` is a generator. At each pause the weights of a block are resident and the statistics of
some layers' inputs are gathered; the caller changes these layers, then goes on. Pausing at
blocks, the walk runs a block on all batches to gather the statistics and once more with the
changed weights. Pausing at layers, the threads run the block themselves and wait in front of each
product with a layer's weight: the layer is changed right there, and one forward does.

In several processes, each walks on its share of the batches, and the statistics are those of all:
so all pause at the same places with the same statistics. What the caller makes of a layer must be
the same in all of them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.calibration.capture import Capture, Read, Watched, refuse_infinite_inputs
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.lookup import statistics_of, tied_head
from optimum_order.data.samples import placed
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.models import hf, precision
from optimum_order.models.units import Target, Unit

_PROBES = 2
"""Batches on which `Visit.outputs` runs a block."""
_HEAVY = {functional.scaled_dot_product_attention}
"""Functions that a thread of a forward leaves to the walk's thread, which has all cores."""


@dataclass(frozen=True)
class Visit:
    """One pause of a walk.

    Args:
        unit: The block whose weights are resident.
        targets: Its layers that are to be changed now.
        statistics: The inputs of these layers, by name.
        leaders: For each layer that was seen, the first layer that read the same input.
        complete: Whether this is the last pause in the block.
        probe: Runs the block as it is by now; None where the walk pauses at layers.
    """

    unit: Unit
    targets: Sequence[Target]
    statistics: Mapping[str, Statistics]
    leaders: Mapping[str, str]
    complete: bool = True
    probe: Callable[[], Tensor] | None = None

    def outputs(self) -> Tensor:
        """Run the block as it is by now on the first batches.

        Returns:
            (tokens, hidden) or (positions, channels) float32.

        Raises:
            InvariantError: If the walk does not pause at blocks.
        """
        if self.probe is None:
            raise InvariantError("Outputs of a block can be asked for where the walk pauses at it.")
        return self.probe()


class _Stop(BaseException):
    """Ends a forward whose remaining layers nobody needs; no model code catches it."""


@dataclass(frozen=True)
class _AtBlock:
    """A forward in front of a block."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _AtProduct:
    """A forward in front of a torch function, and the layers that the function multiplies."""

    reads: list[Read]
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(read.target.name for read in self.reads)

    def compute(self) -> Any:
        return self.function(*self.args, **self.kwargs)


@dataclass(frozen=True)
class _Inside:
    """The reply that has a forward run a block on its own thread, and pause at the layers."""

    call: Callable[..., Any]
    watched: Watched


class _Forward(threading.Thread):
    """One forward pass that pauses wherever `pause` is called on its thread.

    Attributes:
        arrival: Where the forward waits; None once it has ended.
    """

    def __init__(self, run: Callable[[], Any]):
        super().__init__(daemon=True)
        self.arrival: _AtBlock | _AtProduct | None = None
        self._run_model = run
        self._turn = threading.Semaphore(0)  # released to let the model go on
        self._back = threading.Semaphore(0)  # released when the model has paused or ended
        self._reply: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        self._turn.acquire()
        # Of this thread alone: a pool for each thread would keep the others from their cores.
        torch.set_num_threads(1)
        try:
            if self._error is None:
                with torch.inference_mode():
                    self._run_model()
        except _Stop:
            pass
        except BaseException as error:  # raised again by `resume`
            self._error = error
        finally:
            self.arrival = None
            self._back.release()

    def pause(self, arrival: _AtBlock | _AtProduct) -> Any:
        """On the model's thread: wait, and return what `resume` brings."""
        self.arrival = arrival
        self._back.release()
        self._turn.acquire()
        reply = self._reply
        self._reply = None
        if isinstance(reply, _Stop):
            raise _Stop  # another one: an error that a frame holds keeps all frames alive
        return reply

    def resume(self, reply: Any = None) -> None:
        """On the walk's thread: let the model go on until it pauses again or ends."""
        self._reply = reply
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """On the walk's thread: end the forward wherever it is."""
        while self.is_alive():
            self._reply = _Stop()
            self._error = self._error or _Stop()
            self._turn.release()
            self.join()


class _Pauses(TorchFunctionMode):
    """On the thread of a forward, inside a block: pauses in front of products with its layers."""

    def __init__(self, forward: _Forward, watched: Watched):
        super().__init__()
        self._forward = forward
        self._watched = watched

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        reads = self._watched.reads(func, args, kwargs)
        if reads or func in _HEAVY:
            return self._forward.pause(_AtProduct(reads, func, args, kwargs))
        return func(*args, **kwargs)


def walk(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    needs: Collection[type[Accumulator]],
    execution: Execution,
    wanted: Collection[str] | None = None,
    finished: Mapping[str, Callable[[], None]] | None = None,
) -> Generator[Visit, None, None]:
    """Pause at every wanted block, or at its layers, in the order in which the model runs them.

    Close the generator where the loop may be left early: `with closing(walk(...)) as visits`.

    Args:
        model: In evaluation mode; its weights may be changed at a pause.
        units: All blocks, from `find_units(model)`.
        batches: Keyword arguments of the model's forward, one mapping per batch.
        needs: The statistics to gather. They are of the inputs that earlier layers, as they are by
            now, produce.
        execution: Where and how to compute, and where to pause.
        wanted: Names of the blocks to pause at, all by default; the others are run as they are.
        finished: What changes other blocks, by name, before they are run. What compares with the
            model as it was sees them as they were.

    Raises:
        OutputError: If activations have to be written to a disk that is full.
        ModelError: If the forward does not reach each block exactly once, or multiplies a layer in
            a way that is not understood.
    """
    # A block may run more than once on the same arguments, which a cache would not survive.
    options = hf.uncached(model)

    def run(batch: Mapping[str, Tensor]) -> Callable[[], Any]:
        return lambda: model(**placed(batch, model), **options)

    mine = execution.ranks.shard(batches)
    # A rank without samples follows the walk on one that another rank counts.
    seen = mine or [{name: tensor[:1] for name, tensor in batch.items()} for batch in batches[:1]]
    forwards = [_Forward(run(batch)) for batch in seen]
    comparing = execution.pause == "group" and any(need.compares for need in needs)
    befores = [_Forward(run(batch)) for batch in seen] if comparing else []
    remaining = {unit.name for unit in units}
    missing = set(remaining if wanted is None else wanted)
    of_heads = _of_heads(model, [u for u in units if u.name in missing], batches, needs, execution)
    with (
        torch.inference_mode(),
        hf.eager_experts(model),
        _headless(model, units),
        _paused(units, [*forwards, *befores]) as originals,
    ):
        with execution.resident(None):
            walker = _Walker(model, forwards, befores, needs, execution)
            walker.of_heads = of_heads
            walker.counts = bool(mine)
            for forward in (*forwards, *befores):
                walker.resume(forward)
        while missing:
            unit = _common_block([*forwards, *befores], remaining)
            remaining.discard(unit.name)
            with execution.resident(unit):
                call = walker.calling(originals[unit.name])
                if unit.name not in missing:
                    walker.propagate(call, befores)
                    if finished and unit.name in finished:
                        finished[unit.name]()
                    walker.propagate(call, forwards)
                    continue
                missing.discard(unit.name)
                if execution.pause == "group" and _looks_up(unit):
                    walker.propagate(call, befores)
                    yield walker.lookup(unit)
                    if missing:
                        walker.propagate(call, forwards)
                elif execution.pause == "group":
                    yield from walker.layers(unit, call)
                    if not missing and any(forward.arrival for forward in forwards):
                        _common_block(forwards, remaining)  # not this block again
                else:
                    yield walker.block(unit, call, None if missing else remaining)
                    if missing:
                        walker.propagate(call, forwards)


class _Walker:
    """What a walk does at one block.

    Args:
        model: As `walk` has it.
        forwards: One for each batch.
        befores: One for each batch, through the model as it was when the walk began; or none.
        needs: As `walk` has them.
        execution: As `walk` has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forwards: Sequence[_Forward],
        befores: Sequence[_Forward],
        needs: Collection[type[Accumulator]],
        execution: Execution,
    ):
        self.forwards = forwards
        self.befores = dict(zip(forwards, befores, strict=False))
        self.needs = needs if befores else [need for need in needs if not need.compares]
        self.of_heads: Mapping[str, Statistics] = {}
        self.ranks = execution.ranks
        self.counts = True
        """Whether the samples are this rank's to count."""
        self.residency = execution.residency
        self.device = execution.device
        self.home = model.device
        self.model_dtype = model.dtype
        self.dtype = execution.matmul_dtype(model)
        self.multiplying = functools.partial(
            precision.forwards, self.dtype, model.dtype, self.device or self.home
        )

    def calling(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a block's forward, its arguments and outputs moved and cast where needed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.device is not None:
                args, kwargs = _moved((args, kwargs), self.device)
            output = forward(*args, **kwargs)
            output = precision.restored(output, self.model_dtype, self.device or self.home)
            return output if self.device is None else _moved(output, self.home)

        return call

    def resume(self, forward: _Forward, reply: Any = None) -> None:
        """Let a forward go on to its next block, or to its next product with a layer."""
        forward.resume(reply)
        del reply
        while isinstance(forward.arrival, _AtProduct) and not forward.arrival.reads:
            with self.multiplying():
                forward.resume(forward.arrival.compute())
        if isinstance(forward.arrival, _AtBlock):
            self.residency.rest(_tensors(forward.arrival))

    def run(self, call: Callable[..., Any], forward: _Forward) -> Any:
        """Return what the block in front of a forward makes of its arguments."""
        arrival = forward.arrival
        assert isinstance(arrival, _AtBlock)
        output = call(*arrival.args, **arrival.kwargs)
        self.residency.wake(_tensors(arrival))
        return output

    def propagate(self, call: Callable[..., Any], forwards: Iterable[_Forward]) -> None:
        """Run the block in front of forwards, and let them go on to the next."""
        with self.multiplying():
            for forward in forwards:
                self.resume(forward, self.run(call, forward))

    def block(self, unit: Unit, call: Callable[..., Any], after: Collection[str] | None) -> Visit:
        """Run a block to gather statistics.

        Args:
            unit: The block in front of all forwards.
            call: Its forward.
            after: If nobody needs the forwards afterwards, the blocks that may still follow.
        """
        capture = Capture(unit.targets, self.needs, self.dtype)
        first = None
        with self.multiplying():
            for forward in self.forwards:
                with capture if self.counts else contextlib.nullcontext():
                    output = self.run(call, forward)
                if after is not None and first is None:
                    first = output
                del output
        capture.share(self.ranks)
        statistics: Mapping[str, Statistics] = capture.statistics()
        if _looks_up(unit):
            statistics = self.lookup(unit).statistics
        else:
            _refuse_unseen(unit, [t for t in unit.targets if t.name not in capture.leaders])
        waiting = [forward.arrival for forward in self.forwards[:_PROBES]]
        arrivals = [arrival for arrival in waiting if isinstance(arrival, _AtBlock)]

        def probe() -> Tensor:
            with self.multiplying():
                outputs = [call(*arrival.args, **arrival.kwargs) for arrival in arrivals]
            return torch.cat([_hidden(output) for output in outputs])

        if after is not None:  # what follows is nobody's input, but must not be this block again
            self.resume(self.forwards[0], first)
            if self.forwards[0].arrival:
                _common_block(self.forwards[:1], after)
        return Visit(unit, unit.targets, statistics, capture.leaders, probe=probe)

    def lookup(self, unit: Unit) -> Visit:
        """Return the pause at an embedding, in front of which all forwards wait.

        Args:
            unit: The embedding.
        """
        (target,) = unit.targets
        statistics = self.of_heads.get(target.name)
        if statistics is None:  # a token looks up a row, so all errors of the row count alike
            statistics = Statistics(1, self._sums(target, {}).result().isotropic().results)
        return Visit(unit, unit.targets, {target.name: statistics}, {target.name: target.name})

    def layers(self, unit: Unit, call: Callable[..., Any]) -> Iterator[Visit]:
        """Let the forwards run a block, and pause at each of its layers.

        Args:
            unit: The block in front of all forwards.
            call: Its forward.
        """

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.multiplying(cache=False):  # weights change meanwhile
                return call(*args, **kwargs)

        reply = _Inside(inside, Watched(unit.targets))
        for forward in self.forwards:
            self.resume(forward, reply)
        # Which tokens reach an expert is not the same before and after: they have no pairs.
        alone = _Inside(inside, Watched(t for t in unit.targets if t.expert is None))
        for before in self.befores.values():
            self.resume(before, alone)
        layers = {target.name: target for target in unit.targets}
        unseen = dict(layers)
        shared = _SharedInput()
        while names := self._next_layers(unit):
            arrivals = {
                forward: forward.arrival
                for forward in self.forwards
                if isinstance(forward.arrival, _AtProduct) and forward.arrival.layers == names
            }
            targets = [layers[name] for name in names]
            if late := [target.name for target in targets if target.name not in unseen]:
                raise ModelError(
                    f"'{unit.name}' multiplies '{late[0]}' more than once, or in another order "
                    "for some batches: its input is not complete when the layer is reached. "
                    "Calibrate block by block: pause='block' (--pause block)."
                )
            statistics = {}
            leaders = {}
            for place, target in enumerate(targets):
                reads = {forward: at.reads[place] for forward, at in arrivals.items()}
                again = shared.read if all(self.ranks.gather(shared.has(reads))) else None
                leader, seen = again or (target.name, self._gather(target, reads))
                refuse_infinite_inputs(target.name, seen)
                shared.put(leader, seen, reads)
                statistics[target.name] = seen
                leaders[target.name] = leader
                del unseen[target.name]
            del reads
            self._go_ahead(arrivals)
            yield Visit(unit, targets, statistics, leaders, complete=False)
            del statistics, seen, again
            for forward, arrival in arrivals.items():
                with self.multiplying():
                    output = arrival.compute()
                self.resume(forward, output)
                del output, arrival
            del arrivals
        _refuse_unseen(unit, unseen.values())
        idle = {name: self._sums(target, {}).result() for name, target in unseen.items()}
        yield Visit(unit, list(unseen.values()), idle, {})

    def _next_layers(self, unit: Unit) -> tuple[str, ...]:
        """Return the layers in front of which forwards of any rank wait, those that come first.

        Fused experts run in the order of their numbers, each with all its layers, and a batch skips
        those that none of its tokens is routed to: the lowest number comes first.

        Args:
            unit: The block that the forwards run.

        Returns:
            The names of layers of one product; none once all forwards have left the block.
        """
        waiting = {f.arrival.layers for f in self.forwards if isinstance(f.arrival, _AtProduct)}
        everywhere = {tuple(names) for part in self.ranks.gather(sorted(waiting)) for names in part}
        place = {target.name: number for number, target in enumerate(unit.targets)}

        def turn(names: tuple[str, ...]) -> tuple[bool, int, int]:
            number = place[names[0]]
            expert = unit.targets[number].expert
            return expert is None, expert or 0, number

        return min(everywhere, key=turn, default=())

    def _gather(self, target: Target, reads: Mapping[_Forward, Read]) -> Statistics:
        """Accumulate one layer's input over all batches, of all ranks, that reach the layer."""
        sums = self._sums(target, reads if self.counts else {})
        sums.share(self.ranks)
        return sums.result()

    def _sums(self, target: Target, reads: Mapping[_Forward, Read]) -> Accumulation:
        """Accumulate one layer's input over the batches of this rank."""
        device = self.device or self.home
        sums = Accumulation(target.view.shape[1], self.needs, device, self.dtype)
        for forward, read in reads.items():
            before = self._read_before(forward, target)
            if before is None:
                for rows in read.rows():
                    sums.add(rows)
            else:
                for rows, rows_before in zip(read.rows(), before.rows(), strict=True):
                    sums.add(rows, rows_before)
        return sums

    def _read_before(self, forward: _Forward, target: Target) -> Read | None:
        """Return the input of a layer in the model as it was when the walk began."""
        before = self.befores.get(forward)
        if (
            before is None
            or not isinstance(before.arrival, _AtProduct)
            or target.expert is not None
        ):
            return None
        return next((read for read in before.arrival.reads if read.target is target), None)

    def _go_ahead(self, forwards: Iterable[_Forward]) -> None:
        """Let the model as it was run the layers that are about to be changed.

        Args:
            forwards: Those in front of these layers.
        """
        for forward in forwards:
            before = self.befores.get(forward)
            at = forward.arrival
            if before is None or not isinstance(at, _AtProduct):
                continue
            if at.reads[0].target.expert is not None:
                continue  # passed already
            if not isinstance(before.arrival, _AtProduct) or before.arrival.layers != at.layers:
                raise ModelError(
                    f"The forward multiplies '{at.layers[0]}' at another turn once earlier layers "
                    "have changed, so its inputs cannot be compared: leave 'drift' at 0."
                )
            with self.multiplying():
                output = before.arrival.compute()
            self.resume(before, output)


def _looks_up(unit: Unit) -> bool:
    """Return whether a unit is an embedding."""
    return unit.targets[0].kind == "embedding"


def _of_heads(
    model: PreTrainedModel,
    units: Iterable[Unit],
    batches: Sequence[Mapping[str, Tensor]],
    needs: Collection[type[Accumulator]],
    execution: Execution,
) -> dict[str, Statistics]:
    """Return the statistics of embeddings that are tied to a head, by name.

    A model that is streamed cannot be run as a whole: its embeddings have none.
    """
    if execution.streams:
        return {}
    dtype = execution.matmul_dtype(model)
    statistics = {}
    for target in (unit.targets[0] for unit in units if _looks_up(unit)):
        if (head := tied_head(model, target)) is not None:
            statistics[target.name] = statistics_of(
                model,
                target,
                head,
                batches,
                needs=[need for need in needs if not need.compares],
                multiplying=functools.partial(precision.forwards, dtype, model.dtype, model.device),
                dtype=dtype,
            )
    return statistics


class _SharedInput:
    """The input that was read last, and its statistics: layers that read it too share them."""

    def __init__(self) -> None:
        self.read: tuple[str, Statistics] | None = None
        """The first layer that read the input, and the statistics; None before the first."""
        self._reads: Mapping[_Forward, Read] = {}

    def has(self, reads: Mapping[_Forward, Read]) -> bool:
        """Return whether another layer reads the same input in every batch.

        That is so where no batch of this rank reaches either layer: other ranks then decide.
        """
        return (
            self.read is not None
            and self._reads.keys() == reads.keys()
            and all(self._reads[forward].same_input(read) for forward, read in reads.items())
        )

    def put(self, leader: str, statistics: Statistics, reads: Mapping[_Forward, Read]) -> None:
        """Remember an input; the one before is released."""
        self.read = leader, statistics
        self._reads = reads


def _refuse_unseen(unit: Unit, unseen: Collection[Target]) -> None:
    """Check that every layer was multiplied with an input, but for idle experts.

    A token is always routed to some expert: all of them at once cannot be idle.
    """
    idle = collections.Counter(target.parameter_name for target in unseen)
    names = [
        target.name
        for target in unseen
        if target.expert is None or idle[target.parameter_name] == len(target.parameter)
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(
            f"Running '{unit.name}' ({type(unit.module).__name__}) did not multiply "
            f"{', '.join(names[:3])}{more} with an input in a way that is understood, so nothing "
            f"can be learned about them. Leave them out with ignore=['{names[0]}'] "
            f"(--ignore {names[0]}), or "
            "use methods that need no calibration: magnitude, rtn, bitsandbytes."
        )


@contextlib.contextmanager
def _paused(
    units: Sequence[Unit], forwards: Sequence[_Forward]
) -> Iterator[dict[str, Callable[..., Any]]]:
    """Replace the blocks' forwards by a pause; in the end restore them and end every thread.

    Yields:
        The original forward of each block by name.
    """
    by_thread: dict[int, _Forward] = {}
    originals = {unit.name: unit.module.forward for unit in units}
    own = {unit.name: vars(unit.module).get("forward") for unit in units}

    def pausing(unit: Unit) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            thread = by_thread[threading.get_ident()]
            reply = thread.pause(_AtBlock(unit, args, kwargs))
            if not isinstance(reply, _Inside):
                return reply
            with _Pauses(thread, reply.watched):
                return reply.call(*args, **kwargs)

        return forward

    for unit in units:
        unit.module.forward = pausing(unit)
    try:
        for forward in forwards:
            forward.start()
            assert forward.ident is not None
            by_thread[forward.ident] = forward
        yield originals
    finally:
        for unit in units:
            # A forward of the instance, such as a hook of accelerate, is there again afterwards.
            forward_before = own[unit.name]
            if forward_before is None:
                del unit.module.forward
            else:
                unit.module.forward = forward_before
        for forward in forwards:
            forward.stop()
        torch.set_num_threads(torch.get_num_threads())  # what new threads begin with again


def _tensors(arrival: _AtBlock) -> list[Tensor]:
    leaves = tree_leaves((arrival.args, arrival.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def _hidden(output: Any) -> Tensor:
    """Return a block's output as (tokens, hidden) float32: its tensor, or the first of several.

    Of images (b, channels, h, w) each position is a token.
    """
    tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    if tensor.ndim == 4:
        tensor = tensor.movedim(1, -1)
    return tensor.flatten(0, -2).float()


def _common_block(forwards: Sequence[_Forward], remaining: Collection[str]) -> Unit:
    """Return the one block that every forward waits at."""
    units = {
        f.arrival.unit.name: f.arrival.unit for f in forwards if isinstance(f.arrival, _AtBlock)
    }
    if len(units) != 1 or any(forward.arrival is None for forward in forwards):
        raise ModelError(
            f"The model's forward does not run the blocks {', '.join(sorted(remaining)[:3])} for "
            "every input, so they cannot be calibrated. Leave them out with 'ignore'."
        )
    (unit,) = units.values()
    if unit.name not in remaining:
        raise ModelError(
            f"The model runs '{unit.name}' more than once in one forward (shared layers), which "
            "cannot be calibrated. Use methods that need no calibration: magnitude, rtn, "
            "bitsandbytes."
        )
    return unit


@contextlib.contextmanager
def _headless(model: PreTrainedModel, units: Sequence[Unit]) -> Iterator[None]:
    """End a forward where it would compute logits: they are large and nobody needs them."""

    def stop(*_: Any) -> None:
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
