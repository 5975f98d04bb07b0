"""The SQLite file of a study: settings, planned trials, and the rows of finished ones."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optimum_order.errors import OutputError
from optimum_order.files import too_long

TRIALS = "trials.sqlite"
ORIGINAL = "original"
"""Stands for an order in the row of the model before compression."""

Row = dict[str, Any]
"""What a trial measured, ready for JSON."""


class Trials:
    """The trials of one study, by order and calibration draw.

    Args:
        folder: The study's folder; made if missing.
        settings: What all trials have in common; fixed once trials are planned.

    Raises:
        OutputError: If the folder cannot be written, or holds trials made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        check_folder(folder)
        with self._transaction("rwc"):
            for table in ("trials", "pairs"):
                self._db.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} "
                    "(orders TEXT, draw INTEGER, data TEXT, PRIMARY KEY (orders, draw))"
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS planned "
                "(orders TEXT, draw INTEGER, PRIMARY KEY (orders, draw))"
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
            self._refuse(_leaves(stored), _leaves(self.settings))

    def _refuse(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raise an error that names the settings that differ."""
        differing = [
            key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)
        ]
        # the settings that people choose first
        differing.sort(key=_weight)
        first, *others = differing
        more = f" ({', '.join(others)} differ too)" if others else ""
        raise OutputError(
            f"'{self.folder / TRIALS}' holds the trials of another study: '{first}' is "
            f"{_brief(before.get(first))} there and {_brief(now.get(first))} now{more}. Choose "
            f"another folder, or {_advice(first)}."
        )

    @classmethod
    def open(cls, folder: Path) -> Trials:
        """Open the trials of an existing study for reading.

        Raises:
            OutputError: If the folder has none.
        """
        if not (folder / TRIALS).is_file():
            raise OutputError(f"'{folder}' has no {TRIALS}: no study was run there.")
        trials = cls.__new__(cls)
        trials.folder = folder
        with trials._transaction("rw"):
            trials.settings = trials._stored()
            for table in ("trials", "pairs"):
                trials.rows(table)
        return trials

    @contextlib.contextmanager
    def _transaction(self, mode: str = "") -> Iterator[None]:
        """Store all changes made within, or none.

        Args:
            mode: Of SQLite; if given, the file is opened first.
        """
        try:
            if mode:
                address = f"{(self.folder / TRIALS).resolve().as_uri()}?mode={mode}"
                self._db = sqlite3.connect(address, timeout=60, isolation_level=None, uri=True)
            self._db.execute("BEGIN IMMEDIATE" if mode != "rw" else "BEGIN")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except (sqlite3.Error, ValueError) as error:
            raise OutputError(
                f"'{self.folder / TRIALS}' cannot hold a study: {error}. Choose a folder that can "
                f"be written, with room on its disk, and whose {TRIALS}, if there is one, a study "
                "has made."
            ) from error

    def note_command(self, command: str) -> None:
        """Store a command that ran a part of the study, for the report."""
        with self._transaction():
            self._db.execute("CREATE TABLE IF NOT EXISTS commands (command TEXT PRIMARY KEY)")
            self._db.execute("INSERT OR IGNORE INTO commands VALUES (?)", (command,))

    def commands(self) -> list[str]:
        """Return the commands that ran the study, oldest first."""
        if not self._has("commands"):
            return []
        rows = self._db.execute("SELECT command FROM commands ORDER BY rowid")
        return [command for (command,) in rows]

    def _has(self, table: str) -> bool:
        """Return whether the file has a table, as those of earlier versions may not."""
        tables = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,))
        return tables.fetchone() is not None

    def _stored(self) -> dict[str, Any]:
        rows = self._db.execute("SELECT key, value FROM settings")
        return {key: json.loads(value) for key, value in rows}

    def plan(self, trials: Iterable[tuple[str, int]]) -> None:
        """Store (order, draw) of trials to run, so that a report can list missing ones."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO planned VALUES (?, ?)", trials)

    def planned(self) -> list[tuple[str, int]]:
        """Return (order, draw) of every trial that was ever planned."""
        if not self._has("planned"):
            return []
        return self._db.execute("SELECT orders, draw FROM planned ORDER BY rowid").fetchall()

    def add(self, rows: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> None:
        """Store rows, all or none.

        Args:
            rows: Rows by table ("trials" or "pairs"), order and draw.

        Raises:
            OutputError: If the rows cannot be written.
        """
        with self._transaction():
            for (table, orders, draw), data in rows.items():
                text = json.dumps(data, allow_nan=False)
                self._db.execute(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",  # noqa: S608 - a name of ours
                    (orders, draw, text),
                )

    def done(self) -> set[tuple[str, int]]:
        """Return (order, draw) of every finished trial."""
        return set(self._db.execute("SELECT orders, draw FROM trials"))

    def rows(self, table: str) -> dict[tuple[str, int], Row]:
        """Return every row of "trials" or "pairs" by (order, draw), oldest first."""
        rows = self._db.execute(
            f"SELECT orders, draw, data FROM {table} ORDER BY rowid"  # noqa: S608 - a name of ours
        )
        return {(orders, draw): json.loads(data) for orders, draw, data in rows}


def check_folder(folder: Path) -> None:
    """Make the folder of a study if it is missing.

    Raises:
        OutputError: If the folder cannot be made or written.
    """
    if problem := too_long(folder):
        raise OutputError(f"The folder of the study cannot be made: {problem}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot hold a study: {error.strerror}. Choose a folder that can be "
            "written."
        ) from error


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _weight(setting: str) -> int:
    """Return a key that sorts the settings that people choose before all others."""
    if setting == "weights" or setting.endswith("digest"):
        return 2
    return int(setting.startswith("versions."))


def _advice(setting: str) -> str:
    """Return what to do about a setting that differs."""
    if setting.startswith("versions."):
        package = setting.removeprefix("versions.").replace("_", "-")
        return f"the version of {package} that the study began with"
    if setting == "threads":
        return "the same number of threads (--num-threads)"
    return "the same model and settings"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
