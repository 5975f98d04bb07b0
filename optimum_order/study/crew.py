"""Workers of a study in processes of their own: on this machine, or on a Ray cluster.

A worker has a copy of the model, and runs one task at a time. One that dies loses its task alone,
which another attempt runs again; nobody but the study itself writes into its folder.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from optimum_order.engine.runner import Prefixes
from optimum_order.errors import ModelError, RankError, missing_extra
from optimum_order.order import Order
from optimum_order.study.worker import Rows, Task, Worker

TRIES = 3
"""How often a task is run before the study goes on without."""


@dataclass(frozen=True)
class Spec:
    """What a process needs to become a worker; it can be pickled.

    Args:
        make: Gives the worker.
        threads: Threads that a worker computes with.
        prefix_bytes: Disk space that shared beginnings may take, for each worker.
    """

    make: Callable[[], Worker]
    threads: int
    prefix_bytes: int


class Post:
    """A worker where it works, with a folder of its own.

    Args:
        spec: What it is made of.
    """

    def __init__(self, spec: Spec):
        torch.set_num_threads(spec.threads)
        bars: Any = transformers.utils.logging
        bars.disable_progress_bar()
        self._folder = tempfile.TemporaryDirectory(prefix="optimum-order-")
        self._worker = spec.make()
        self._worker.runner.prefixes = Prefixes(Path(self._folder.name), spec.prefix_bytes)

    def run(self, task: Task) -> Rows:
        """Run the trials of a task."""
        return self._worker.run(task)


class Crew(ABC):
    """Workers that run tasks.

    Args:
        spec: What each is made of.
        size: How many there are.
    """

    lost: ClassVar[tuple[type[Exception], ...]]
    """The errors that say that a worker has died."""

    def __init__(self, spec: Spec, size: int):
        if size < 1:
            raise ModelError(f"A study needs a worker or more (--workers), got {size}.")
        self.spec = spec
        self.size = size

    @abstractmethod
    def submit(self, number: int, task: Task) -> Future[Rows]:
        """Have a worker run a task.

        Args:
            number: Which worker, from 0.
            task: The task.
        """

    @abstractmethod
    def replace(self, number: int) -> None:
        """Put a new worker in the place of one that has died."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Rows | None]]:
        """Run tasks in any order; a worker prefers those that begin like its last.

        Args:
            tasks: The tasks.

        Yields:
            Each task as it ends, with its rows; None once it was lost too often.

        Raises:
            RankError: If workers die before any has finished a task.
        """
        # tasks that begin alike lie together: a queue of thousands is not searched
        queue: dict[tuple[int, str], collections.deque[tuple[Task, int]]] = {}
        for task in tasks:
            queue.setdefault(_begins(task), collections.deque()).append((task, 1))
        idle = list(range(self.size))
        last: dict[int, tuple[int, str]] = {}
        running: dict[Future[Rows], tuple[int, Task, int]] = {}
        ended: list[tuple[Task, Rows | None]] = []
        finished = 0
        while queue or running or ended:
            while queue and idle:
                number = idle.pop()
                begins = last[number] if last.get(number) in queue else next(iter(queue))
                task, attempt = queue[begins].popleft()
                if not queue[begins]:
                    del queue[begins]
                last[number] = begins
                running[self.submit(number, task)] = number, task, attempt
            yield from ended  # stored while workers have work
            ended.clear()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, task, attempt = running.pop(future)
                idle.append(number)
                try:
                    rows = future.result()
                except self.lost as error:
                    self.replace(number)
                    if attempt < TRIES:
                        queue.setdefault(_begins(task), collections.deque()).append(
                            (task, attempt + 1)
                        )
                        continue
                    if not finished:
                        raise RankError(
                            f"Workers of the study end before they finish '{task.orders[0]}', "
                            f"{TRIES} times: there may be too little memory for {self.size} "
                            "(--workers)."
                        ) from error
                    ended.append((task, None))
                    continue
                finished += 1
                ended.append((task, rows))


def _begins(task: Task) -> tuple[int, str]:
    return task.draw, str(Order(task.orders[0].stages[:1]))


_post: Post | None = None


def _begin(spec: Spec) -> None:
    global _post
    _post = Post(spec)


def _run(task: Task) -> Rows:
    assert _post is not None
    return _post.run(task)


class Processes(Crew):
    """Workers on this machine: a pool of one process for each, so that none breaks another."""

    lost = (BrokenProcessPool,)

    def __init__(self, spec: Spec, size: int):
        super().__init__(spec, size)
        self._pools = [self._pool() for _ in range(size)]
        self._processes = [pool.submit(os.getpid) for pool in self._pools]
        self._last: dict[int, Future[Rows]] = {}

    def _pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, _begin, (self.spec,))

    def submit(self, number: int, task: Task) -> Future[Rows]:
        self._last[number] = self._pools[number].submit(_run, task)
        return self._last[number]

    def replace(self, number: int) -> None:
        self._pools[number].shutdown(wait=False)
        self._pools[number] = self._pool()
        self._processes[number] = self._pools[number].submit(os.getpid)

    def close(self) -> None:
        for number, pool in enumerate(self._pools):
            process = self._processes[number]
            busy = number in self._last and not self._last[number].done()
            if busy and process.done() and process.exception() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.result(), signal.SIGKILL)  # nobody waits for its task
            pool.shutdown(cancel_futures=True)


class Cluster(Crew):
    """Workers on a Ray cluster: actors, which Ray places and starts again.

    Args:
        spec: What each is made of.
        size: How many there are.
        address: Of the cluster, or "auto" for the one that this machine belongs to.
    """

    def __init__(self, spec: Spec, size: int, address: str):
        super().__init__(spec, size)
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", error) from error
        self._ray: Any = ray
        self.lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)  # type: ignore[misc]
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RankError(
                f"There is no Ray cluster at '{address}': start one with 'ray start --head', or "
                "leave out --cluster to use processes of this machine."
            ) from error
        self._actors = [self._actor() for _ in range(size)]

    def _actor(self) -> Any:
        remote = self._ray.remote(num_cpus=self.spec.threads)(Post)
        return remote.remote(self.spec)

    def submit(self, number: int, task: Task) -> Future[Rows]:
        future: Future[Rows] = self._actors[number].run.remote(task).future()
        return future

    def replace(self, number: int) -> None:
        self._actors[number] = self._actor()

    def close(self) -> None:
        self._ray.shutdown()


def crew(spec: Spec, size: int, address: str | None) -> Crew:
    """Return workers on a Ray cluster, or in processes of this machine.

    Args:
        spec: What each is made of.
        size: How many there are.
        address: Of the cluster, or "auto"; None for this machine.
    """
    return Processes(spec, size) if address is None else Cluster(spec, size, address)
