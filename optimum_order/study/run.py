"""Run many orders of one model and store what each is worth.

A trial is one order with one calibration draw. Trials are stored as they finish, beginnings that
several orders share are computed once (`engine.runner`), and a study that is started again goes
on where it was. Several processes may run different draws of one study at once.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from optimum_order import files
from optimum_order.engine.runner import Prefixes, Runner
from optimum_order.errors import DataError, OutputError
from optimum_order.evaluation import Metric, Samples
from optimum_order.models.source import weights_digest
from optimum_order.order import Order
from optimum_order.progress import Bar
from optimum_order.study.crew import TRIES, Crew
from optimum_order.study.grid import draws_matter, references, with_parts
from optimum_order.study.trials import ORIGINAL, Trials
from optimum_order.study.worker import Task, Worker, reverse

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
        self.worker = Worker(runner, metric, samples)
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

    def run(
        self,
        orders: Iterable[Order | str],
        draws: Sequence[int] = (0,),
        *,
        prefix_bytes: int = 16 * 10**9,
        progress: bool = True,
        crew: Crew | None = None,
    ) -> None:
        """Run every order with every draw; finished trials are not run again.

        An order whose stages do not calibrate is run with draw 0 only.

        Args:
            orders: In any number of stages; each of their stages is also run alone.
            draws: Numbers of calibration draws, which share no sample.
            prefix_bytes: Disk space that shared beginnings may take while a draw runs.
            progress: Whether to show a bar on stderr.
            crew: The workers that run the trials, each with a copy of the model; None runs them
                here.

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
                self.trials.add({("trials", ORIGINAL, 0): self.worker.original()})
            if crew is not None:
                self._share(crew, left, bar)
                return
            for draw, folder in folders.items():
                self.runner.prefixes = Prefixes(folder, prefix_bytes)
                self._draw(draw, [order for number, order in left if number == draw], bar)

    def _share(self, crew: Crew, left: Sequence[tuple[int, Order]], bar: Bar) -> None:
        """Have workers run trials; store each as soon as it is finished."""
        done = self.trials.done()
        tasks = []
        remaining = dict.fromkeys(left)
        while remaining:
            draw, order = next(iter(remaining))
            back = reverse(order)
            # both directions of a pair are one task: they are compared layer by layer
            both = len(order) == 2 and back != order and (draw, back) in remaining
            task = Task(
                (order, back) if both else (order,),
                draw,
                reverse_done=(str(back), draw) in done,
            )
            tasks.append(task)
            for one in task.orders:
                del remaining[draw, one]
        for task, rows in crew.run(tasks):
            if rows is None:
                names = ", ".join(f"'{order}'" for order in task.orders)
                logger.warning(
                    "The worker that ran %s ended, %d times: the study goes on without.",
                    names,
                    TRIES,
                )
            else:
                self.trials.add(rows)
            bar.update(len(task.orders))

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
            wanted |= {(draw, reverse(order)) for order in later if len(order) == 2}
            self._trial(order, draw, wanted)
            self.runner.prefixes.drop(keep=wanted)
            bar.update()

    def _trial(self, order: Order, draw: int, wanted: set[tuple[int, Order]]) -> None:
        """Run and measure one order, and store the trial."""
        reverse_done = (str(reverse(order)), draw) in self.trials.done()
        self.trials.add(
            self.worker.rows(
                order,
                draw,
                keep=lambda prefix: (draw, prefix) in wanted,
                reverse_done=reverse_done,
            )
        )


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
