"""Run and measure trials on one copy of a model; whoever asks stores them."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimum_order import formats
from optimum_order.engine.run import Result
from optimum_order.engine.runner import Runner
from optimum_order.errors import FormatError, ModelError
from optimum_order.evaluation import Metric, Samples
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.order import Order
from optimum_order.study.advantage import split_advantage
from optimum_order.study.trials import Row
from optimum_order.study.walks import error_correlations, input_statistics

Rows = dict[tuple[str, str, int], Mapping[str, Any]]
"""Rows by table ("trials" or "pairs"), order and draw."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Trials that one worker runs one after the other.

    Args:
        orders: An order, or the two orders of a pair.
        draw: Number of the calibration draw.
        reverse_done: Whether the reverse of the first order has been run with this draw.
    """

    orders: tuple[Order, ...]
    draw: int
    reverse_done: bool = False


class Worker:
    """Runs trials.

    Args:
        runner: The model, with its calibration draws.
        metric: The performance M.
        samples: What M is measured on.
    """

    def __init__(self, runner: Runner, metric: Metric, samples: Samples):
        self.runner = runner
        self.metric = metric
        self.samples = samples
        self._statistics: tuple[int, dict[str, Statistics]] | None = None

    def run(self, task: Task) -> Rows:
        """Run the trials of a task; beginnings are stored where the runner has room for them.

        Args:
            task: What to run.
        """
        rows: Rows = {}
        for place, order in enumerate(task.orders):
            again = place > 0 or task.reverse_done
            rows |= self.rows(order, task.draw, keep=lambda prefix: True, reverse_done=again)
        return rows

    def original(self) -> Row:
        """Measure the model before any stage."""
        self.runner.reset()
        return self._measured() | {"bytes": self._bytes(self.runner.original)}

    def rows(
        self, order: Order, draw: int, *, keep: Callable[[Order], bool], reverse_done: bool
    ) -> Rows:
        """Run and measure one order.

        Args:
            order: From `Runner.check`.
            draw: Number of the calibration draw.
            keep: Whether a beginning of the order is to be stored for orders to come.
            reverse_done: Whether the stages the other way round have been run with this draw: then
                the two are compared layer by layer.

        Returns:
            Rows by table ("trials" or "pairs"), order and draw.
        """
        node = self.runner.run(order, draw, keep=keep)
        states = node.result.states
        try:
            row = self._measured()
        except ModelError as error:  # the order broke the model: a result, not a reason to stop
            row = {"performance": None, "error": str(error)}
        if draw == 0:
            row["bytes"] = self._bytes(node.result)  # while the model holds them
        statistics = self._dense(draw)
        # a layer that was made smaller, or took the place of another, has nothing to compare with
        originals = {} if node.result.changes else self.runner.original.states
        row |= {
            "stages": [str(stage) for stage in order],
            "seconds": node.seconds,
            "cpu_seconds": node.cpu_seconds,
            "sparsity": _mean(states, "sparsity"),
            "bits": _mean(states, "bits"),
            "layer_errors": {
                name: relative_error(original.weight, states[name].weight, statistics.get(name))[0]
                for name, original in originals.items()
            },
        }
        if draw == 0 and originals:
            row["correlation"] = error_correlations(self.runner, states)
        rows: Rows = {("trials", str(order), draw): row}
        back = reverse(order)
        if reverse_done and len(order) == 2 and back != order and originals and statistics:
            # a prefix that was stored, unless the disk space was too small
            others = self.runner.run(back, draw).result.states
            rows["pairs", f"{back} | {order}", draw] = {
                name: dataclasses.astuple(
                    split_advantage(original.weight, others[name], states[name], statistics[name])
                )
                for name, original in originals.items()
            }
        return rows

    def _measured(self) -> Row:
        """Measure the model as it is now."""
        wall = time.perf_counter()
        cpu = time.process_time()
        batch_size = self.samples.batch_size
        measurement = self.runner.measure(self.metric, self.samples, batch_size=batch_size)
        return {
            "value": measurement.value,
            "performance": measurement.performance,
            "performances": measurement.performances.tolist(),
            "measure_seconds": time.perf_counter() - wall,
            "measure_cpu_seconds": time.process_time() - cpu,
        }

    def _dense(self, draw: int) -> dict[str, Statistics]:
        """Return `input_statistics`, those of the last draw remembered."""
        if self._statistics is None or self._statistics[0] != draw:
            self._statistics = draw, input_statistics(self.runner, draw)
        return self._statistics[1]

    def _bytes(self, result: Result) -> dict[str, int]:
        """Return the bytes of real weight files by format: the one of "auto", and "sparse"."""
        targets = {target.name: target for unit in result.units for target in unit.targets}
        layers = formats.Layers(targets, result.states)
        contents = formats.Contents(self.runner.model, layers)
        sizes = {}
        for name in ("auto", "sparse"):
            try:
                codec = formats.choose(contents, name)
            except FormatError:
                continue
            with tempfile.TemporaryDirectory() as folder:
                container = formats.container(codec.name)
                container.write(contents, codec, Path(folder), header={})
                written = container.files(Path(folder))
                sizes[codec.name] = sum(file.stat().st_size for file in written)
        return sizes


def reverse(order: Order) -> Order:
    """Return the stages of an order the other way round."""
    return Order(order.stages[::-1])


def _mean(states: Mapping[str, LayerState], attribute: str) -> float:
    """Return the mean of an attribute of layers over all weights."""
    total = 0.0
    weights = 0
    for state in states.values():
        total += getattr(state, attribute) * state.weight.numel()
        weights += state.weight.numel()
    return total / weights
