"""A study: many orders of the same stages on one model, measured one by one into an SQLite file.

A trial is one order with one calibration draw. Trials are stored as they finish, beginnings that several orders
share are computed once (`runner`), and a study that is started again goes on where it was. Several processes may run
different draws of one study at once. What the numbers mean is for `analysis` to say, how they look for `report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from tqdm.auto import tqdm

from optimum_order import formats
from optimum_order.backends import Backend
from optimum_order.calibration.walk import Visit, walk
from optimum_order.engine.recipe import canonical, method
from optimum_order.engine.runner import Batches, Prefixes, Runner
from optimum_order.errors import DataError, FormatError, ModelError, OrderError, OutputError
from optimum_order.evaluation import Metric, Samples
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Accumulator, Gram, Statistics
from optimum_order.models.source import weights_digest
from optimum_order.order import Order, Stage
from optimum_order.study.advantage import split_advantage

TRIALS = "trials.sqlite"
ORIGINAL = "original"
"""Stands for an order in the row of the model as it was."""
REFERENCE = "rtn"
REFERENCE_BITS = (2, 3, 4, 5, 6, 8)
"""The curve of plain quantisation that compression-equivalent ratios are read from."""

_MOST_GRAM_BYTES = 4 * 2**30


def grid(
    pruners: Sequence[Stage],
    sparsities: Sequence[float],
    quantizers: Sequence[Stage],
    bits: Sequence[int],
    *,
    simulate: bool = False,
) -> list[Order]:
    """Both orders of every pair of a pruner and a quantiser, and each stage alone.

    Args:
        pruners: Stages without their sparsity, such as `wanda`.
        sparsities: In [0, 1).
        quantizers: Stages without their bits, such as `gptq(group_size=64)`.
        bits: Widths.
        simulate: Whether pruning a quantised layer leaves its grid, as papers do it.

    Raises:
        OrderError: If there is only one pair, which is no study, or a stage cannot be run.
    """
    prune = _settings(pruners, "sparsity", map(float, sparsities))
    quantize = _settings(quantizers, "bits", bits)
    if len(prune) * len(quantize) < 2:
        raise OrderError(
            f"A grid of {len(prune)} pruning and {len(quantize)} quantising settings is {len(prune) * len(quantize)} "
            "pairs, and a study compares at least 2. Give more sparsities, bits or methods; for a single pair there is "
            "'optimum-order plan'."
        )
    pairs = [
        Order(each) for p, q in itertools.product(prune, quantize) for each in ((p, q), (q, p))
    ]
    orders = [*(Order((stage,)) for stage in [*prune, *quantize]), *pairs]
    return [off_grid(order) for order in orders] if simulate else orders


def _settings(stages: Sequence[Stage], knob: str, values: Iterable[float]) -> list[Stage]:
    """Every stage with every value of its main knob, in canonical form, each once."""
    for stage in stages:
        if stage.value is not None or knob in dict(stage.options):
            raise OrderError(f"Give '{stage}' without its {knob}, which the grid sets.")
    settings = (
        Stage(s.method, **dict(s.options) | {knob: value})
        for s, value in itertools.product(stages, values)
    )
    return list(dict.fromkeys(method(stage).stage for stage in settings))


def off_grid(order: Order) -> Order:
    """The order as papers simulate it: what prunes a quantised layer leaves its grid.

    Raises:
        OrderError: If a stage cannot be run.
    """
    return canonical(Order(_off_grid(stage) for stage in order))


def _off_grid(stage: Stage) -> Stage:
    chosen = method(stage)
    if not isinstance(chosen, Backend) or "off_grid" not in chosen.resolved:
        return stage
    defaults = {field.name: field.default for field in dataclasses.fields(chosen.Options)}
    given = {name: value for name, value in chosen.resolved.items() if value != defaults[name]}
    return Stage(stage.method, **given | {"off_grid": True})


def with_parts(orders: Iterable[Order]) -> list[Order]:
    """The orders, each once, after every stage that stands in them alone."""
    orders = list(orders)
    return list(dict.fromkeys([*(Order((stage,)) for order in orders for stage in order), *orders]))


class Trials:
    """The SQLite file of a study.

    Args:
        folder: Of the study; made if missing.
        settings: What every trial in it has in common; fixed once trials are planned.

    Raises:
        OutputError: If the folder cannot be written, or holds trials made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        check_folder(folder)
        with self._transaction("rwc"):
            for table in ("trials", "pairs"):
                self._db.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} (orders TEXT, draw INTEGER, data TEXT, "
                    "PRIMARY KEY (orders, draw))"
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS planned (orders TEXT, draw INTEGER, PRIMARY KEY (orders, draw))"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT)"
            )
            stored = self._stored() if self.planned() or self.done() else {}
            if not stored:
                self._db.execute("DELETE FROM settings")
                rows = [(key, json.dumps(value)) for key, value in self.settings.items()]
                self._db.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        if stored and stored != self.settings:
            before, now = _leaves(stored), _leaves(self.settings)
            differing = [
                key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)
            ]
            differing.sort(
                key=lambda key: key == "weights" or key.endswith("digest")
            )  # what people chose first
            more = f" ({', '.join(differing[1:])} differ too)" if differing[1:] else ""
            raise OutputError(
                f"'{folder / TRIALS}' holds the trials of another study: '{differing[0]}' is "
                f"{_brief(before.get(differing[0]))} there and {_brief(now.get(differing[0]))} now{more}. Choose "
                "another folder, or the same model and settings."
            )

    @classmethod
    def open(cls, folder: Path) -> Trials:
        """The trials of a study that was begun, for reading.

        Raises:
            OutputError: If there are none.
        """
        if not (folder / TRIALS).is_file():
            raise OutputError(f"'{folder}' has no {TRIALS}: no study was run there.")
        trials = cls.__new__(cls)
        trials.folder = folder
        with trials._transaction("rw"):
            trials.settings = trials._stored()
            trials.rows("trials"), trials.rows("pairs")
        return trials

    @contextlib.contextmanager
    def _transaction(self, mode: str = "") -> Iterator[None]:
        """All of what is done within, or nothing; in a file opened anew if a mode is given."""
        try:
            if mode:
                where = f"{(self.folder / TRIALS).resolve().as_uri()}?mode={mode}"
                self._db = sqlite3.connect(where, timeout=60, isolation_level=None, uri=True)
            self._db.execute("BEGIN IMMEDIATE" if mode != "rw" else "BEGIN")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except (sqlite3.Error, ValueError) as error:
            raise OutputError(
                f"'{self.folder / TRIALS}' cannot hold a study: {error}. Choose a folder that can be written, with "
                f"room on its disk, and whose {TRIALS}, if there is one, a study has made."
            ) from error

    def _stored(self) -> dict[str, Any]:
        return {
            key: json.loads(value)
            for key, value in self._db.execute("SELECT key, value FROM settings")
        }

    def plan(self, todo: Iterable[tuple[str, int]]) -> None:
        """Remember (orders, draw) of trials that are to be run, so that a report knows what is missing."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO planned VALUES (?, ?)", todo)

    def planned(self) -> list[tuple[str, int]]:
        """(orders, draw) of every trial that was ever to be run."""
        known = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'planned'").fetchone()
        return (
            self._db.execute("SELECT orders, draw FROM planned ORDER BY rowid").fetchall()
            if known
            else []
        )

    def add(self, rows: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> None:
        """Store rows, by (table, orders, draw), all of them or none.

        Raises:
            OutputError: If they cannot be written.
        """
        with self._transaction():
            for (table, orders, draw), data in rows.items():
                text = json.dumps(data, allow_nan=False)
                self._db.execute(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", (orders, draw, text)
                )

    def done(self) -> set[tuple[str, int]]:
        """(orders, draw) of every trial that is stored."""
        return set(self._db.execute("SELECT orders, draw FROM trials"))

    def rows(self, table: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Every row of "trials" or "pairs" by (orders, draw), in the order in which they were added."""
        found = self._db.execute(f"SELECT orders, draw, data FROM {table} ORDER BY rowid")
        return {(orders, draw): json.loads(data) for orders, draw, data in found}


def check_folder(folder: Path) -> None:
    """Make the folder of a study if it is missing.

    Raises:
        OutputError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot hold a study: {error.strerror}. Choose a folder that can be written."
        ) from error


def _leaves(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= (
            _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        )
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars that transformers shows for every model it reads or writes."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class Study:
    """Runs orders and stores what came of them.

    Args:
        runner: The model, with its calibration draws.
        metric: The performance M.
        samples: What it is measured on.
        folder: Where trials are stored.
        settings: What else distinguishes this study, such as where the calibration comes from.
        prefix_bytes: How much disk shared beginnings may take while a draw runs.
        batch_size: Of the metric.
        progress: Whether to show a bar on stderr.

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
        *,
        settings: Mapping[str, Any] | None = None,
        prefix_bytes: int = 16 * 10**9,
        batch_size: int = 8,
        progress: bool = True,
    ):
        metric.check(runner.model, samples)
        if len(samples) < 2:
            raise DataError(
                f"A study needs at least two {samples.unit}s to measure on, got {len(samples)} from {samples.source}."
            )
        self.runner, self.metric, self.samples = runner, metric, samples
        self.folder, self.batch_size, self.progress = Path(folder), batch_size, progress
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
        self._prefix_bytes = prefix_bytes
        self._statistics: tuple[int, dict[str, Statistics]] | None = None

    def run(self, orders: Iterable[Order | str], draws: Sequence[int] = (0,)) -> None:
        """Every order with every draw, those that are stored already left out.

        An order whose stages all do without calibration is run with draw 0 only: the others would repeat it.

        Args:
            orders: In any number of stages; each stage of them is also run alone.
            draws: Numbers of calibration draws, which share no sample.

        Raises:
            OrderError: If an order cannot be run on this model. Nothing is computed first.
            DataError: If calibration data is missing or too short for these draws.
            OutputError: If another process is running one of these draws, or the folder cannot be written.
            ModelError: If the metric of the original model is not finite. An order that breaks the model is a trial
                like any other, without a performance.
        """
        checked = with_parts(self.runner.check(Order.of(order)) for order in orders)
        reference = [self.runner.check(Order((Stage(REFERENCE, bits),))) for bits in REFERENCE_BITS]
        checked = list(dict.fromkeys([*checked, *reference]))
        todo = [
            (draw, order) for draw in draws for order in checked if draw == 0 or draws_matter(order)
        ]
        self.trials.plan((str(order), draw) for draw, order in todo)
        done = self.trials.done()
        total, left = len(todo), [each for each in todo if (str(each[1]), each[0]) not in done]
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            folders = {
                draw: stack.enter_context(_prefixes(self.folder, draw))
                for draw in dict.fromkeys(draws)
            }
            bar = stack.enter_context(
                tqdm(
                    total=total, initial=total - len(left), unit="trial", disable=not self.progress
                )
            )
            if (ORIGINAL, 0) not in done:
                bar.set_description("original")
                self.runner.reset()
                row = self._measured() | {"bytes": self._bytes(self.runner.original.states)}
                self.trials.add({("trials", ORIGINAL, 0): row})
            for draw, folder in folders.items():
                self.runner.prefixes = Prefixes(folder, self._prefix_bytes)
                self._draw(draw, [order for d, order in left if d == draw], bar)

    def _draw(self, draw: int, orders: Sequence[Order], bar: tqdm) -> None:
        for at, order in enumerate(orders):
            bar.set_description(str(order))
            later = orders[at + 1 :]
            wanted = {(draw, Order(each.stages[:n])) for each in later for n in range(1, len(each))}
            wanted |= {(draw, _reverse(each)) for each in later if len(each) == 2}
            self._trial(order, draw, wanted)
            self.runner.prefixes.drop(keep=wanted)
            bar.update()

    def _trial(self, order: Order, draw: int, wanted: set[tuple[int, Order]]) -> None:
        node = self.runner.run(order, draw, keep=lambda prefix: (draw, prefix) in wanted)
        states = node.result.states
        try:
            row = self._measured()
        except (
            ModelError
        ) as error:  # the order broke the model, which is worth knowing and no reason to stop
            row = {"performance": None, "error": str(error)}
        if draw == 0:
            row["bytes"] = self._bytes(states)  # while the model holds them
        statistics = self._dense(draw)
        row |= {
            "stages": [str(stage) for stage in order],
            "seconds": node.seconds,
            "cpu_seconds": node.cpu_seconds,
            "sparsity": _mean({name: state.sparsity for name, state in states.items()}, states),
            "bits": _mean({name: state.bits for name, state in states.items()}, states),
            "layer_errors": {
                name: relative_error(original.weight, states[name].weight, statistics.get(name))[0]
                for name, original in self.runner.original.states.items()
            },
        }
        rows = {("trials", str(order), draw): row}
        if draw == 0:
            row["correlation"] = self._correlation(states)
        reverse = _reverse(order)
        if (
            len(order) == 2
            and statistics
            and reverse != order
            and (str(reverse), draw) in self.trials.done()
        ):
            other = self.runner.run(
                reverse, draw
            ).result.states  # kept, unless there was no room for it
            rows["pairs", f"{reverse} | {order}", draw] = {
                name: dataclasses.astuple(
                    split_advantage(original.weight, other[name], states[name], statistics[name])
                )
                for name, original in self.runner.original.states.items()
            }
        self.trials.add(rows)

    def _measured(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        found = self.metric.measure(
            self.runner.model, self.samples, batch_size=self.batch_size, progress=False
        )
        return {
            "value": found.value,
            "performance": found.performance,
            "performances": found.performances.tolist(),
            "measure_seconds": time.perf_counter() - wall,
            "measure_cpu_seconds": time.process_time() - cpu,
        }

    def _dense(self, draw: int) -> dict[str, Statistics]:
        """What the original model's layers read in this draw; nothing where that would not fit in memory."""
        if self._statistics is None or self._statistics[0] != draw:
            found: dict[str, Statistics] = {}
            size = sum(
                4 * state.weight.shape[1] ** 2 for state in self.runner.original.states.values()
            )
            batches = self.runner.batches(draw)
            if batches and size <= _MOST_GRAM_BYTES:
                self.runner.reset()
                with contextlib.closing(self._walk(batches, {Gram})) as visits:
                    for visit in visits:
                        found.update(visit.statistics)
            self._statistics = draw, found
        return self._statistics[1]

    def _walk(self, batches: Batches, needs: Collection[type[Accumulator]]) -> Iterator[Visit]:
        runner = self.runner
        execution = dataclasses.replace(runner.execution, pause="block")
        return walk(runner.model, runner.units, batches, needs=needs, execution=execution)

    def _bytes(self, states: Mapping[str, LayerState]) -> dict[str, int]:
        """Size of real weight files: in the format that "auto" chooses, and in "sparse" where it fits."""
        targets = {target.name: target for unit in self.runner.units for target in unit.targets}
        contents = formats.Contents(self.runner.model, formats.Layers(targets, states))
        found = {}
        for name in ("auto", "sparse"):
            try:
                chosen = formats.choose(contents, name)
            except FormatError:
                continue
            with tempfile.TemporaryDirectory() as folder:
                container = formats.container(chosen.name)
                container.write(contents, chosen, Path(folder), header={})
                found[chosen.name] = sum(f.stat().st_size for f in container.files(Path(folder)))
        return found

    def _correlation(self, states: Mapping[str, LayerState]) -> list[list[float | None]]:
        """How the units' output errors on the original inputs correlate, (units, units); None where shapes differ.

        Each unit is compressed alone; its error is what it adds to the original output, a vector over tokens and
        hidden dimensions. Errors that were independent would have a correlation of zero.
        """
        batches = self.runner.batches(0)[:1]
        if not batches:
            return []
        errors: list[Tensor] = []

        self.runner.reset()
        with contextlib.closing(self._walk(batches, ())) as visits:
            for visit in visits:
                before = visit.outputs()
                for target in visit.targets:
                    target.write(states[target.name].weight)
                errors.append(visit.outputs() - before)
                for target in visit.targets:
                    target.write(self.runner.original.states[target.name].weight)
        return [[_cosine(a, b) for b in errors] for a in errors]


def _cosine(a: Tensor, b: Tensor) -> float | None:
    if a.shape != b.shape:
        return None
    a, b = a.flatten().double(), b.flatten().double()
    size = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a @ b).item() / size if size else None


@contextlib.contextmanager
def _prefixes(folder: Path, draw: int) -> Iterator[Path]:
    """A folder for what a draw's orders share, for this process alone; it is removed once all of them are done."""
    path = folder / "prefixes" / f"draw-{draw}"
    path.mkdir(parents=True, exist_ok=True)
    # a lock of SQLite's is one that every system has and that a killed process gives back
    lock = sqlite3.connect(path / "lock.sqlite", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise OutputError(
            f"Another process is running draw {draw} of the study in '{folder}' ({error}). Wait for it, or stop it."
        ) from error
    try:
        yield path
    finally:
        lock.close()
    shutil.rmtree(path)
    with contextlib.suppress(OSError):  # another draw is still at work
        path.parent.rmdir()


def draws_matter(order: Order) -> bool:
    """Whether calibration has a part in an order, so that it comes out otherwise with another draw."""
    return any(method(stage).needs_data for stage in order)


def _reverse(order: Order) -> Order:
    return Order(order.stages[::-1])


def _mean(values: Mapping[str, float], states: Mapping[str, LayerState]) -> float:
    """Over all weights."""
    sizes = {name: state.weight.numel() for name, state in states.items()}
    return sum(values[name] * sizes[name] for name in sizes) / sum(sizes.values())
