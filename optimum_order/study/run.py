"""Run many orders of one model and store what each is worth.

A trial is one order with one calibration draw. Trials are stored as they finish, beginnings that
several orders share are computed once (`engine.runner`), and a study that is started again goes
on where it was. Several processes may run different draws of one study at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from optimum_order import files, formats
from optimum_order.engine.run import Result
from optimum_order.engine.runner import Prefixes, Runner
from optimum_order.errors import DataError, FormatError, ModelError, OutputError
from optimum_order.evaluation import Metric, Samples
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Statistics
from optimum_order.models.source import weights_digest
from optimum_order.order import Order
from optimum_order.progress import Bar
from optimum_order.study.advantage import split_advantage
from optimum_order.study.grid import draws_matter, references, with_parts
from optimum_order.study.trials import ORIGINAL, Row, Trials
from optimum_order.study.walks import error_correlations, input_statistics

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars that transformers shows whenever it reads or writes a model."""
    logging: Any = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class Study:
    """Runs orders and stores what they are worth.

    Args:
        runner: The model, with its calibration draws.
        metric: The performance M.
        samples: What M is measured on.
        folder: Where trials are stored.
        settings: What else distinguishes this study, such as the source of the calibration.

    Raises:
        OutputError: If the folder cannot be written, or holds another study.
        ModelError: If the metric says nothing about this model.
        DataError: If there are fewer than two samples.
    """

    def __init__(
        self,
        runner: Runner,
        metric: Metric,
        samples: Samples,
        folder: str | Path,
        settings: Mapping[str, Any] | None = None,
    ):
        runner.check_metric(metric, samples)
        if len(samples) < 2:
            raise DataError(
                f"A study needs at least two {samples.unit}s to measure on, got {len(samples)} "
                f"from {samples.source}."
            )
        self.runner = runner
        self.metric = metric
        self.samples = samples
        self.folder = Path(folder)
        self.trials = Trials(
            self.folder,
            {
                "model": runner.source.id,
                "weights": weights_digest(runner.model),
                "layers": sorted(runner.original.states),
                "metric": metric.name,
                "evaluation": {
                    "source": samples.source,
                    "samples": len(samples),
                    "digest": samples.digest,
                },
                **(settings or {}),
            },
        )
        self._statistics: tuple[int, dict[str, Statistics]] | None = None

    def run(
        self,
        orders: Iterable[Order | str],
        draws: Sequence[int] = (0,),
        *,
        prefix_bytes: int = 16 * 10**9,
        progress: bool = True,
    ) -> None:
        """Run every order with every draw; finished trials are not run again.

        An order whose stages do not calibrate is run with draw 0 only.

        Args:
            orders: In any number of stages; each of their stages is also run alone.
            draws: Numbers of calibration draws, which share no sample.
            prefix_bytes: Disk space that shared beginnings may take while a draw runs.
            progress: Whether to show a bar on stderr.

        Raises:
            OrderError: If an order cannot be run on this model. Nothing is computed first.
            DataError: If calibration data is missing or too short for these draws.
            OutputError: If another process is running one of these draws, or the folder cannot be
                written.
            ModelError: If the metric of the original model is not finite. An order that breaks
                the model is a trial without a performance.
        """
        checked = with_parts(self.runner.check(Order.of(order)) for order in orders)
        reference = [self.runner.check(order) for order in references()]
        checked = list(dict.fromkeys([*checked, *reference]))
        planned = [
            (draw, order) for draw in draws for order in checked if draw == 0 or draws_matter(order)
        ]
        self.trials.plan((str(order), draw) for draw, order in planned)
        done = self.trials.done()
        left = [(draw, order) for draw, order in planned if (str(order), draw) not in done]
        logger.info("Running %d of %d trials", len(left), len(planned))
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            folders = {
                draw: stack.enter_context(_prefix_folder(self.folder, draw))
                for draw in dict.fromkeys(draws)
            }
            start = len(planned) - len(left)
            bar = stack.enter_context(
                Bar(total=len(planned), initial=start, unit="trial", disable=not progress)
            )
            if (ORIGINAL, 0) not in done:
                bar.set_description("original")
                self.runner.reset()
                row = self._measured() | {"bytes": self._bytes(self.runner.original)}
                self.trials.add({("trials", ORIGINAL, 0): row})
            for draw, folder in folders.items():
                self.runner.prefixes = Prefixes(folder, prefix_bytes)
                self._draw(draw, [order for number, order in left if number == draw], bar)

    def _draw(self, draw: int, orders: Sequence[Order], bar: Bar) -> None:
        """Run orders with one draw, and hold the prefixes that later ones need."""
        assert self.runner.prefixes is not None
        for position, order in enumerate(orders):
            bar.set_description(str(order))
            later = orders[position + 1 :]
            wanted = {
                (draw, Order(order.stages[:length]))
                for order in later
                for length in range(1, len(order))
            }
            wanted |= {(draw, _reverse(order)) for order in later if len(order) == 2}
            self._trial(order, draw, wanted)
            self.runner.prefixes.drop(keep=wanted)
            bar.update()

    def _trial(self, order: Order, draw: int, wanted: set[tuple[int, Order]]) -> None:
        """Run and measure one order, and store the trial."""
        node = self.runner.run(order, draw, keep=lambda prefix: (draw, prefix) in wanted)
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
        rows: dict[tuple[str, str, int], Mapping[str, Any]] = {("trials", str(order), draw): row}
        reverse = _reverse(order)
        is_pair = len(order) == 2 and reverse != order
        if is_pair and originals and statistics and (str(reverse), draw) in self.trials.done():
            # a prefix that was stored, unless the disk space was too small
            others = self.runner.run(reverse, draw).result.states
            rows["pairs", f"{reverse} | {order}", draw] = {
                name: dataclasses.astuple(
                    split_advantage(original.weight, others[name], states[name], statistics[name])
                )
                for name, original in originals.items()
            }
        self.trials.add(rows)

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


@contextlib.contextmanager
def _prefix_folder(folder: Path, draw: int) -> Iterator[Path]:
    """Yield a folder for the prefixes of one draw, locked; remove it once the draw is complete."""
    path = folder / "prefixes" / f"draw-{draw}"
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = files.lock(path / "lock.sqlite")
    except sqlite3.OperationalError as error:
        raise OutputError(
            f"Another process is running draw {draw} of the study in '{folder}' ({error}). Wait "
            "for it, or stop it."
        ) from error
    with contextlib.closing(lock):
        yield path
    shutil.rmtree(path)
    with contextlib.suppress(OSError):  # not empty: another draw is running
        path.parent.rmdir()


def _reverse(order: Order) -> Order:
    return Order(order.stages[::-1])


def _mean(states: Mapping[str, LayerState], attribute: str) -> float:
    """Return the mean of an attribute of layers over all weights."""
    total = 0.0
    weights = 0
    for state in states.values():
        total += getattr(state, attribute) * state.weight.numel()
        weights += state.weight.numel()
    return total / weights
