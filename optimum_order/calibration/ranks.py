"""The processes of one run: each calibrates on a share of the samples and compresses some layers.

A process alone is the case of one rank, in which every method here returns what it was given: there
is no second way through a walk or a pass. In several processes, started by torchrun or by whatever
else sets RANK and WORLD_SIZE, three things are shared:

- samples: a rank runs the model on its own, and sums over tokens are added up over all ranks, so
  that all see the statistics of all samples;
- layers: each is compressed by one rank, and its state is sent to all;
- what needs the whole model or all samples at once is done by rank 0, and its result sent to all.

Messages are JSON and the bytes of tensors, never pickled objects.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group: its functions keep the one that is there on import
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from optimum_order.errors import ModelError, RankError
from optimum_order.layers.statistics import Accumulator

_PATIENCE = datetime.timedelta(days=2)
"""The longest that a rank waits for another, which may be at work on all samples by itself. A rank
that ends is noticed at once."""


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        rank: The number of this process; rank 0 owns the work dir and the result.
        size: The number of processes.

    Attributes:
        moved: Bytes that this process has given to others or got from others, each tensor counted
            once.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size
        self.moved = 0
        self._store: Any = None
        """Values by name that all ranks see, and that outlives them where the launcher holds it."""

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Join the processes that were started together with this one, while active.

        Yields:
            The ranks: this process alone where no launcher says otherwise.

        Raises:
            ModelError: If there are fewer GPUs than processes on this machine.
            RankError: If the other processes cannot be reached.
        """
        rank, size = launched()
        if size == 1:
            yield cls()
            return
        ranks = cls(rank, size)
        with _peers("cannot be reached"):
            store, _, _ = next(rendezvous("env://"))
            ranks._store = store
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE
            )
        try:
            yield ranks
        finally:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()

    def device(self, name: str) -> str:
        """Return the device of this process: of several GPUs, each process takes one.

        Args:
            name: The device that a user asked for, or "auto".

        Raises:
            ModelError: If it is one certain GPU, or there are fewer GPUs than processes.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ModelError(
                f"{self.size} processes cannot share the device '{name}': give device='cuda' "
                "(--device cuda), of which each takes its own, or 'cpu'."
            )
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if local >= torch.cuda.device_count():
            raise ModelError(
                f"Each process takes one GPU, and for process {local + 1} of this machine there is "
                f"none among {torch.cuda.device_count()}: start fewer (--nproc-per-node), or "
                "compute on the CPU with device='cpu' (--device cpu)."
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def first_to_fail(self) -> bool:
        """Return whether no other process has reported an error yet; then this one is to.

        The other processes fail because the first did, or with the same error.
        """
        if self._store is None:
            return True
        try:
            return bool(self._store.add("optimum-order/failed", 1) == 1)
        except RuntimeError:  # whoever held the store has ended without a word
            return True

    def shard(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return this rank's share of the samples: a run of neighbors, as many as others have.

        Args:
            batches: All samples, the samples first in each tensor.

        Returns:
            Batches; with one process those that were given, and none where there are fewer samples
            than ranks before this one. Shares differ by one sample at most.
        """
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        start, stop = (sum(sizes) * part // self.size for part in (self.rank, self.rank + 1))
        mine = []
        first = 0
        for batch, size in zip(batches, sizes, strict=True):
            here = slice(max(start - first, 0), max(stop - first, 0))
            if len(range(size)[here]):
                mine.append({name: tensor[here] for name, tensor in batch.items()})
            first += size
        return mine

    def deal(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Divide work among the ranks: the most costly first, each to the rank with the least.

        Args:
            costs: Of each piece of work, by name, in any unit.

        Returns:
            The rank of each piece, in the order of `costs`; the same on all ranks.
        """
        loads = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: costs[name], reverse=True):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return {name: owners[name] for name in costs}

    def merge(self, accumulator: Accumulator) -> None:
        """Have an accumulator hold what those of all ranks have seen together.

        Args:
            accumulator: Of the same class and width on all ranks.
        """
        if self.size == 1:
            return
        with _peers(), torch.inference_mode():
            for name, reduction in accumulator.merges.items():
                tensor = getattr(accumulator, name)
                dist.all_reduce(tensor, getattr(dist.ReduceOp, reduction.upper()))
                self.moved += tensor.nbytes

    def total(self, count: int) -> int:
        """Return the sum of a number over all ranks."""
        return sum(self.gather(count))

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank has, first to last.

        Args:
            value: Plain values, as JSON holds them.
        """
        if self.size == 1:
            return [value]
        mine = _encoded(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _peers():
            dist.all_gather(lengths, torch.tensor([len(mine)]))
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        self.moved += longest * self.size
        return [_decoded(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]

    def broadcast(
        self, message: tuple[str, Mapping[str, Tensor]] | None, owner: int
    ) -> tuple[str, dict[str, Tensor]]:
        """Send a text and tensors from one rank to all.

        Args:
            message: What is sent; None on the ranks that receive.
            owner: The rank that sends.

        Returns:
            What was sent; the tensors of ranks that received are on the CPU.
        """
        if message is not None and self.size == 1:
            return message[0], dict(message[1])
        header = torch.empty(0, dtype=torch.uint8)
        tensors: dict[str, Tensor] = {}
        if message is not None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in message[1].items()}
            kinds = {
                name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                for name, tensor in tensors.items()
            }
            header = _encoded([message[0], kinds])
        length = torch.tensor([len(header)])
        with _peers():
            dist.broadcast(length, owner)
            if message is None:
                header = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(header, owner)
            text, kinds = _decoded(header)
            for name, (dtype, shape) in kinds.items():
                if message is None:
                    tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                if tensors[name].numel():
                    dist.broadcast(tensors[name].detach().view(-1).view(torch.uint8), owner)
        self.moved += len(header) + sum(tensor.nbytes for tensor in tensors.values())
        return text, tensors

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors of all ranks, in place, the values of rank 0's.

        Args:
            tensors: Of the same shapes, in the same order, on all ranks.
        """
        if self.size == 1:
            return
        with _peers(), torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().contiguous()
                dist.broadcast(values, 0)
                tensor.detach().copy_(values)
                self.moved += tensor.nbytes

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)


def launched() -> tuple[int, int]:
    """Return the rank of this process, and how many were launched together."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def _peers(problem: str = "has ended") -> Iterator[None]:
    """Say in plain words that another process is gone.

    Raises:
        RankError: If torch raises any error of its own.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are subclasses
        raise RankError(
            f"Another process of this run {problem}, so this one cannot go on. What it printed "
            "itself, if anything, says why."
        ) from error


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: Tensor) -> Any:
    return json.loads(bytes(text.numpy()))
