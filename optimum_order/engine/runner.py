"""Many orders on one model, each shared beginning computed once: a trie over stages, on disk."""

from __future__ import annotations

import functools
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from optimum_order import files
from optimum_order.backends.base import COMPRESSING
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.stability import check_forward, unchanged
from optimum_order.data.samples import Samples
from optimum_order.engine import snapshot
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.reshape import outlines, redo
from optimum_order.engine.run import Result, Subject, run
from optimum_order.errors import ArtifactError, OutputError
from optimum_order.evaluation import Measurement, Metric
from optimum_order.layers.state import LayerState
from optimum_order.models.sizes import Structure
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

    result: Result
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()


class Prefixes:
    """Nodes in files of one folder; above a size limit the least recently used is removed.

    Args:
        folder: Made if missing, and used by one process at a time. Nodes of an earlier process
            are used again.
        limit: In bytes.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if files.is_unfinished(file):  # by a process that was killed
                file.unlink()
        nodes = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        self._sizes = OrderedDict((file, file.stat().st_size) for file in nodes)

    def _file(self, draw: int, order: Order) -> Path:
        return self.folder / f"{files.digest([f'{draw}:{order}'])[:32]}.safetensors"

    def get(self, draw: int, order: Order, device: str = "cpu") -> Node | None:
        """Return the node of a prefix, or None if there is none that can be read.

        Args:
            draw: The calibration draw.
            order: The prefix.
            device: Where the tensors go.
        """
        file = self._file(draw, order)
        if file not in self._sizes:
            return None
        self._sizes.move_to_end(file)
        try:
            parts = snapshot.load(file, device)
        except ArtifactError:  # a cache: what cannot be read is made again
            self._remove(file)
            return None
        result = Result(parts["states"], parts["records"], tuple(order), parts["changes"])
        return Node(result, parts["wall"], parts["cpu"])

    def put(self, draw: int, order: Order, node: Node) -> None:
        """Store a node, unless it is larger than the limit by itself.

        Args:
            draw: The calibration draw.
            order: The prefix.
            node: The model after it.

        Raises:
            OutputError: If the node cannot be written.
        """
        file = self._file(draw, order)
        parts = {
            "states": dict(node.result.states),
            "records": node.result.records,
            "changes": node.result.changes,
            "wall": node.seconds,
            "cpu": node.cpu_seconds,
        }
        try:
            self._sizes[file] = snapshot.save(parts, file)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"'{self.folder}' cannot keep what orders share: {error}. Make room on its disk, "
                "or lower the limit."
            ) from error
        self._sizes.move_to_end(file)
        while sum(self._sizes.values()) > self.limit:
            self._remove(next(iter(self._sizes)))

    def drop(self, keep: Iterable[tuple[int, Order]]) -> None:
        """Remove every node but those of some (draw, prefix)."""
        wanted = {self._file(draw, order) for draw, order in keep}
        for file in [file for file in self._sizes if file not in wanted]:
            self._remove(file)

    def _remove(self, file: Path) -> None:
        del self._sizes[file]
        file.unlink(missing_ok=True)


class Runner:
    """Runs orders on one model in memory, always as if from the checkpoint.

    Args:
        source: The model.
        batches: Gives the calibration inputs of a draw, by its number and, if not None, of so many
            samples only; None where there is no calibration.
        execution: Where and how to compute. The model is on its device as a whole.
        targets: As in `find_units`.
        ignore: As in `find_units`.
        embeddings: As in `find_units`.
        prefixes: Where shared beginnings are stored; None computes every order from the start.
    """

    def __init__(
        self,
        source: Checkpoint | InMemory,
        batches: Callable[[int, int | None], Batches] | None,
        execution: Execution | None = None,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        embeddings: Sequence[str] = (),
        prefixes: Prefixes | None = None,
    ):
        self.source = source
        self.prefixes = prefixes
        self.model = source.load()
        execution = execution or Execution()
        self.model.to(execution.device or "cpu")  # type: ignore[arg-type]
        self.dtype = execution.matmul_dtype(self.model)
        self.execution = replace(execution, device=None, dtype=self.dtype)
        self._find = functools.partial(
            find_units, targets=targets, ignore=ignore, embeddings=embeddings
        )
        self.units = self._find(self.model)
        self.original = Result.of(self.units, source.states)
        self._structure = Structure(self.model)
        self._batches = batches
        self._drawn: tuple[int, Batches] | None = None

    def check(self, order: Order) -> Order:
        """Return the canonical order.

        Raises:
            OrderError, DataError: If the order cannot be run on this model.
        """
        recipe = Recipe.of(order)
        after = [o.units for o in outlines(self.model, recipe.methods, self._find)]
        recipe.check(self.units, calibrated=self._batches is not None, after=after)
        return recipe.order

    def batches(self, draw: int, samples: int | None = None) -> Batches:
        """Return calibration inputs, none where there is no calibration.

        Those of the last whole draw are remembered.

        Args:
            draw: Number of the draw.
            samples: How many of its samples; all by default.
        """
        if self._batches is None:
            return []
        if samples is not None:
            return self._batches(draw, samples)
        if self._drawn is None or self._drawn[0] != draw:
            batches = self._batches(draw, None)
            if self._drawn is None:
                check_forward(self.model, batches[0])
            self._drawn = (draw, batches)
        return self._drawn[1]

    def reset(self) -> None:
        """Give the model its original modules and weights."""
        self._structure.restore()
        self.original.write(self.units)

    def run(
        self, order: Order, draw: int = 0, *, keep: Callable[[Order], bool] = lambda prefix: True
    ) -> Node:
        """Return the model after an order; its weights are left in `model`.

        Args:
            order: From `check`.
            draw: Which calibration draw.
            keep: Whether to store the node of a prefix for orders to come.
        """
        node = Node(self.original)
        done = 0
        if self.prefixes:
            for length in range(len(order), 0, -1):
                stored = self.prefixes.get(
                    draw, Order(order.stages[:length]), str(self.model.device)
                )
                if stored:
                    node = stored
                    done = length
                    break
        before = self._before(order, draw, done)
        self._structure.restore()
        units = redo(self.model, self.units, node.result.changes)
        node.result.units = units
        for length in range(done, len(order)):
            recipe = Recipe.of(Order((order[length],)))
            subject = Subject(self.model, units, self.batches(draw), self.source.load, before)
            wall = time.perf_counter()
            cpu = time.process_time()
            result = run(subject, recipe, self.execution, start=node.result)
            units = result.units
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            node = Node(result, (*node.seconds, wall), (*node.cpu_seconds, cpu))
            prefix = Order(order.stages[: length + 1])
            if self.prefixes and keep(prefix):
                self.prefixes.put(draw, prefix, node)
        node.result.write(units)
        return node

    def _before(self, order: Order, draw: int, done: int) -> Mapping[str, LayerState] | None:
        """Return the layers before a stage compressed them, if a stage is compared with them.

        Args:
            order: The order.
            draw: Which calibration draw.
            done: Stages that are not run again.
        """
        methods = Recipe.of(order).methods
        if not any(method.reads_original for method in methods[done:]):
            return None
        rewriting = itertools.takewhile(lambda method: method.kind not in COMPRESSING, methods)
        first = len(list(rewriting))
        if not first:
            return self.original.states
        return self.run(Order(order.stages[:first]), draw).result.states

    def check_metric(self, metric: Metric, samples: Samples) -> None:
        """Refuse a metric that cannot measure the model, and a model that changes meanwhile.

        Args:
            metric: The metric.
            samples: What it is to be measured on.

        Raises:
            ModelError: If the metric does not suit the model, or a forward changes its weights.
            DataError: If the samples do not suit the model or the metric.
        """
        with unchanged(self.model, "its forward"):
            metric.check(self.model, samples)

    def measure(self, metric: Metric, samples: Samples, *, batch_size: int = 8) -> Measurement:
        """Return what a metric says of the model as it is now.

        Args:
            metric: The metric.
            samples: What it is measured on.
            batch_size: Samples in one forward.

        Raises:
            ModelError: If a forward changes the model's weights.
        """
        progress = self.execution.progress
        with unchanged(self.model, "its forward"):
            return metric.measure(self.model, samples, batch_size=batch_size, progress=progress)
