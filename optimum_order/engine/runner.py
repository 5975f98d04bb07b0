"""Many orders on one model, each shared beginning computed once: a trie over stage sequences, its nodes on disk."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from optimum_order.calibration import precision
from optimum_order.engine import run as pipeline
from optimum_order.engine import snapshot
from optimum_order.errors import ArtifactError, OutputError
from optimum_order.evaluation import Measurement, Metric, Samples
from optimum_order.models.source import Checkpoint, InMemory
from optimum_order.models.units import find_units
from optimum_order.order import Order

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Node:
    """A model after the stages of a prefix.

    Args:
        result: Its layers.
        seconds: Wall time of each stage when it was run.
        cpu_seconds: Processor time of each stage, which other work on the machine does not change.
    """

    result: pipeline.Result
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()


class Prefixes:
    """Nodes in files of one folder, the least recently used removed above a size limit.

    Args:
        folder: Made if missing, and used by one process at a time. What an earlier one left there is used again.
        limit: In bytes.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".*.partial"):  # of a process that was killed
            unfinished.unlink()
        found = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        self._sizes = OrderedDict((file, file.stat().st_size) for file in found)

    def _file(self, draw: int, order: Order) -> Path:
        return (
            self.folder
            / f"{hashlib.sha256(f'{draw}:{order}'.encode()).hexdigest()[:32]}.safetensors"
        )

    def get(self, draw: int, order: Order, device: str = "cpu") -> Node | None:
        """The node, or None if it is not kept, or is damaged."""
        file = self._file(draw, order)
        if file not in self._sizes:
            return None
        self._sizes.move_to_end(file)
        try:
            found = snapshot.load(file, device)
        except ArtifactError:  # a cache: what cannot be read is made again
            self._remove(file)
            return None
        return Node(
            pipeline.Result(found["states"], found["records"], tuple(order)),
            found["wall"],
            found["cpu"],
        )

    def put(self, draw: int, order: Order, node: Node) -> None:
        """Keep a node, unless it is larger than the limit by itself.

        Raises:
            OutputError: If it cannot be written.
        """
        file = self._file(draw, order)
        parts = {
            "states": dict(node.result.states),
            "records": node.result.records,
            "wall": node.seconds,
            "cpu": node.cpu_seconds,
        }
        try:
            self._sizes[file] = snapshot.save(parts, file)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"'{self.folder}' cannot keep what orders share: {error}. Make room on its disk, or lower the limit."
            ) from error
        self._sizes.move_to_end(file)
        while sum(self._sizes.values()) > self.limit:
            self._remove(next(iter(self._sizes)))

    def drop(self, keep: Iterable[tuple[int, Order]]) -> None:
        """Remove every node but these."""
        wanted = {self._file(*each) for each in keep}
        for file in [file for file in self._sizes if file not in wanted]:
            self._remove(file)

    def _remove(self, file: Path) -> None:
        del self._sizes[file]
        file.unlink(missing_ok=True)


class Runner:
    """Runs orders on one model in memory, always as if from the checkpoint.

    Args:
        source: The model.
        batches: Calibration inputs of a draw, by its number and, if not None, of so many samples only; None where
            there is no calibration.
        device: Where the model runs.
        targets: As in `find_units`.
        ignore: As in `find_units`.
        dtype: What calibration multiplies in, as `precision.choose` takes it.
        prefixes: Where shared beginnings are kept; None computes every order from the start.
        progress: Whether to show bars on stderr.
    """

    def __init__(
        self,
        source: Checkpoint | InMemory,
        batches: Callable[[int, int | None], Batches] | None,
        *,
        device: str = "cpu",
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        dtype: str = "auto",
        prefixes: Prefixes | None = None,
        progress: bool = True,
    ):
        self.source, self.device, self.progress, self.prefixes = source, device, progress, prefixes
        self.model = source.load()
        self.model.to(device)  # type: ignore[arg-type]  # transformers wraps it and hides its signature
        self.units = find_units(self.model, targets, ignore)
        self.dtype = precision.choose(dtype, self.model.dtype, self.model.device)
        self.original = pipeline.Result.of(self.units)
        self._batches = batches
        self._drawn: tuple[int, Batches] | None = None

    def check(self, order: Order) -> Order:
        """The canonical order, or an error if it cannot be run on this model."""
        return pipeline.check(order, self.units, "stage", calibrated=self._batches is not None)

    def batches(self, draw: int, samples: int | None = None) -> Batches:
        """Calibration inputs, none where there is no calibration; those of the last whole draw are remembered."""
        if self._batches is None:
            return []
        if samples is not None:
            return self._batches(draw, samples)
        if self._drawn is None or self._drawn[0] != draw:
            self._drawn = (draw, self._batches(draw, None))
        return self._drawn[1]

    def reset(self) -> None:
        """Give the model its original weights."""
        self.original.write(self.units)

    def run(
        self, order: Order, draw: int = 0, *, keep: Callable[[Order], bool] = lambda prefix: True
    ) -> Node:
        """The model after an order; its weights are left in `model`.

        Args:
            order: From `check`.
            draw: Which calibration draw.
            keep: Whether to keep the node of a prefix for orders to come.
        """
        node, done = Node(self.original), 0
        for length in range(len(order), 0, -1):
            if self.prefixes and (
                found := self.prefixes.get(draw, Order(order.stages[:length]), str(self.device))
            ):
                node, done = found, length
                break
        for length in range(done, len(order)):
            stage, prefix = Order((order[length],)), Order(order.stages[: length + 1])
            batches = self.batches(draw)
            wall, cpu = time.perf_counter(), time.process_time()
            result = pipeline.run(
                self.model,
                self.units,
                stage,
                batches,
                start=node.result,
                dtype=self.dtype,
                progress=self.progress,
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            node = Node(result, (*node.seconds, wall), (*node.cpu_seconds, cpu))
            if self.prefixes and keep(prefix):
                self.prefixes.put(draw, prefix, node)
        node.result.write(self.units)
        return node

    def measure(self, metric: Metric, samples: Samples, *, batch_size: int = 8) -> Measurement:
        """What the metric says of the model as it is now."""
        return metric.measure(self.model, samples, batch_size=batch_size, progress=self.progress)
