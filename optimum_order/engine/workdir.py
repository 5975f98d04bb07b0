"""What a run has finished, in a folder, so that a run that was killed goes on from there.

One folder is one run, and its files are all that is known of its progress: a file is whole or not there, and nothing
else says how far the run is. `007-00012.state.safetensors` holds the layers of unit 12 as pass 7 over the model left
them, `.measured` what an allocator's pass measured there, and `.crossing` what flows on into the next unit. A file goes
only once the one that takes its place is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from optimum_order.calibration.walk import Crossing
from optimum_order.engine import snapshot
from optimum_order.errors import ArtifactError, OutputError

_FINGERPRINT, _LOCK, _PROCESS, _UNFINISHED = (
    "fingerprint.json",
    "lock.sqlite",
    "process",
    ".*.partial",
)
_OURS = {_FINGERPRINT, _PROCESS, _LOCK, f"{_LOCK}-journal"}
_FILE = re.compile(r"(?P<number>\d+)-(?P<unit>\d+)\.(?P<kind>state|measured|crossing)\.safetensors")


class WorkDir:
    """The folder of one run, for this process alone until it is closed.

    Args:
        folder: Made if missing.
        fingerprint: All that decides what the run computes, nested mappings of plain values.
        resume: Whether to go on from what is there. Otherwise nothing may be there.
        patience: Seconds of forwards that may have to be run again: activations are larger than what they are computed
            from, and kept no more often than this.

    Raises:
        OutputError: If the folder is in use or of another run, or if it has what was not asked for: a run that could be
            resumed, or nothing to resume.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        resume: bool,
        patience: float = 10.0,
    ):
        self.folder, self.patience = Path(folder), patience
        self.flowed = time.monotonic()
        """When activations were last kept."""
        check(self.folder, resume=resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise self._unwritable(error) from error
        try:
            self._open(json.loads(json.dumps(fingerprint)), resume)
        except OSError as error:
            self._release()
            if isinstance(error, OutputError):
                raise
            raise self._unwritable(error) from error
        # It copies tensors; with more than one thread of torch's it would keep those of the run from their processors.
        self._writer = ThreadPoolExecutor(1, "optimum-order-workdir", torch.set_num_threads, (1,))
        self._pending: Future | None = None

    def _open(self, fingerprint: Any, resume: bool) -> None:
        """Go on from what is there, or begin."""
        check(self.folder, resume=resume)  # once more: now nobody else can change it
        (self.folder / _PROCESS).unlink(missing_ok=True)
        for removed in self.folder.parent.glob(f".{self.folder.name}.*.old"):
            shutil.rmtree(removed, ignore_errors=True)
        for unfinished in self.folder.glob(_UNFINISHED):  # of a process that was killed
            unfinished.unlink()
        if has_progress(self.folder):
            _compare(read_fingerprint(self.folder), fingerprint, self.folder)
        else:
            file = self.folder / _FINGERPRINT
            beside = file.with_name(f".{file.name}.partial")
            beside.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
            beside.replace(file)
        (self.folder / _PROCESS).write_text(str(os.getpid()), encoding="utf-8")

    def passage(self, number: int, units: Sequence[str]) -> Passage:
        """One pass over the model.

        Args:
            number: Which, from 0.
            units: Names of all units of the model; always the same.
        """
        return Passage(self, number, units)

    def files(self, kind: str) -> dict[tuple[int, int], Path]:
        """The files of a kind by their (pass, unit)."""
        found = ((file, _FILE.fullmatch(file.name)) for file in self.folder.iterdir())
        return {
            (int(m["number"]), int(m["unit"])): file for file, m in found if m and m["kind"] == kind
        }

    def latest(self, unit: int) -> Path | None:
        """The file of what the last pass that finished a unit left there, if any did."""
        found = [(at, file) for (at, which), file in self.files("state").items() if which == unit]
        return max(found)[1] if found else None

    def read(self, file: Path, device: str = "cpu") -> Any:
        """What is in a file.

        Raises:
            OutputError: If it is damaged.
        """
        try:
            return snapshot.load(file, device)
        except ArtifactError as error:
            raise OutputError(
                f"'{file}' is damaged: remove the work dir, and start anew."
            ) from error

    def write(self, values: Mapping[Path, Any], instead_of: Sequence[Path]) -> None:
        """Begin to write files one after the other, then to remove others; once all that was begun is done: `wait`."""

        def work() -> None:
            for file, value in values.items():
                snapshot.save(value() if callable(value) else value, file, durable=True)
            for file in instead_of:
                file.unlink(missing_ok=True)

        self._pending = self._writer.submit(work)

    def wait(self) -> None:
        """Until all that was written is on the disk.

        Raises:
            OutputError: If it cannot be written. What was finished before is still there.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> OutputError:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        )
        kept = ""
        if has_progress(self.folder):
            kept = " What was finished before is kept there: make room, then go on with resume=True (--resume)."
        return OutputError(f"Cannot write the work dir '{self.folder}': {reason}.{kept}")

    def close(self) -> None:
        """Let others have the folder; if nothing was finished, there is none."""
        self._writer.shutdown()
        self._release()

    def _release(self) -> None:
        if not has_progress(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Passage:
    """One pass over the model, as the work dir keeps it.

    Args:
        work: The work dir.
        number: Which pass of the run, from 0.
        units: Names of all units of the model.
    """

    def __init__(self, work: WorkDir, number: int, units: Sequence[str]):
        self.work, self.number = work, number
        self._index = {name: index for index, name in enumerate(units)}
        done = {**work.files("state"), **work.files("measured")}
        latest = max((at for at, _ in done), default=-1)
        self._done = {unit for at, unit in done if at == number}
        self.over = number < latest
        """Whether a later pass has begun."""

    def finished(self, units: Sequence[str]) -> list[str]:
        """Those of its units that it has finished."""
        return [name for name in units if self.over or self._index[name] in self._done]

    def load(self, unit: str, device: str = "cpu") -> Any:
        """What it left of a finished unit, or None if a later pass has left something since.

        Raises:
            OutputError: If that is damaged.
        """
        index = self._index[unit]
        for kind in ("state", "measured"):
            file = self._file(index, kind)
            if file.exists():
                return self.work.read(file, device)
        if not any(at > self.number for at, which in self.work.files("state") if which == index):
            raise OutputError(
                f"The work dir '{self.work.folder}' lacks unit {index} of pass {self.number}: remove it and start anew."
            )
        return None

    def crossing(self, device: str = "cpu") -> Crossing | None:
        """What flowed out of one of its finished units, or None if that was not kept."""
        files = [file for (at, _), file in self.work.files("crossing").items() if at == self.number]
        # there are two if it was killed before the older one was removed: any will do
        return (
            self.work.read(max(files, key=lambda file: file.stat().st_mtime_ns), device)
            if files
            else None
        )

    def save(
        self,
        unit: str,
        kind: str,
        value: Any,
        crossing: Callable[[], Crossing | None] = lambda: None,
    ) -> None:
        """Keep what it did at a unit, in place of what earlier passes did there.

        Args:
            unit: The unit's name.
            kind: "state", or "measured" for what all later passes need.
            value: As `snapshot.save` takes it, or a function that gives it, called while the run goes on.
            crossing: Gives what flows on from there, or None.

        Raises:
            OutputError: If it, or what was saved before it, cannot be written.
        """
        index = self._index[unit]
        self.work.wait()
        values = {self._file(index, kind): value}
        instead_of = [
            file for (at, _), file in self.work.files("crossing").items() if at != self.number
        ]
        if kind == "state":
            instead_of += [
                file for (at, which), file in self.work.files(kind).items() if which == index
            ]
        if (
            time.monotonic() - self.work.flowed >= self.work.patience
            and (flowing := crossing()) is not None
        ):
            values[self._file(index, "crossing")] = flowing
            instead_of = [*instead_of, *self.work.files("crossing").values()]
            self.work.flowed = time.monotonic()
        self.work.write(values, [file for file in instead_of if file not in values])

    def _file(self, index: int, kind: str) -> Path:
        return self.work.folder / f"{self.number:03d}-{index:05d}.{kind}.safetensors"


def check(folder: Path, *, resume: bool) -> None:
    """Raise OutputError if a run could not use this folder."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"'{folder}' is a file; give a folder as the work dir.")
    if not folder.is_dir():
        if resume:
            raise OutputError(
                f"There is no work dir '{folder}', so nothing to resume: start without --resume."
            )
        return
    for file in sorted(folder.iterdir()):
        if (
            file.name not in _OURS
            and not _FILE.fullmatch(file.name)
            and not file.match(_UNFINISHED)
        ):
            raise OutputError(
                f"'{folder}' holds '{file.name}' and is no work dir of ours; give another folder."
            )
    if has_progress(folder) and not resume:
        raise OutputError(
            f"'{folder}' holds a run that was not finished. Go on with it with resume=True (--resume), or remove it."
        )


def has_progress(folder: Path) -> bool:
    """Whether a work dir holds anything that was finished."""
    return folder.is_dir() and any(_FILE.fullmatch(file.name) for file in folder.iterdir())


def read_fingerprint(folder: Path) -> Any:
    """What the run of a work dir was started with.

    Raises:
        OutputError: If that is damaged.
    """
    file = folder / _FINGERPRINT
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"'{file}' is missing or damaged: remove the work dir, and start anew."
        ) from error


def led_to(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a saved model is what the run of a work dir ends in: it was stopped before it could remove the folder."""
    try:
        run = read_fingerprint(folder)
        model, samples = manifest["base_model"], manifest.get("calibration") or {}
        said = (run["model"]["digest"], (run["calibration"] or {}).get("digest"))
    except (OutputError, KeyError, TypeError, AttributeError):
        return False
    same = all(
        run.get(field) == manifest.get(field)
        for field in ("order", "schedule", "targets", "ignore", "versions")
    )
    return same and said == (model.get("digest"), samples.get("digest"))


def is_ours(folder: Path) -> bool:
    """Whether it holds anything that was finished, and it was this process that last went on with it."""
    process = folder / _PROCESS
    return (
        has_progress(folder)
        and process.is_file()
        and process.read_text(encoding="utf-8") == str(os.getpid())
    )


def remove(folder: Path) -> None:
    """Remove a work dir, so that it is whole or not there.

    Raises:
        OutputError: If another process uses it.
    """
    with contextlib.closing(_locked(folder)):
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _locked(folder: Path) -> sqlite3.Connection:
    # a lock of SQLite's is one that every system has and that a killed process gives back
    lock = sqlite3.connect(folder / _LOCK, timeout=0, isolation_level=None, check_same_thread=False)
    process = folder / _PROCESS
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        who = (
            f"process {process.read_text(encoding='utf-8')}"
            if process.is_file()
            else "another process"
        )
        raise OutputError(
            f"The work dir '{folder}' is in use by {who} ({error}). Wait for it, stop it, or give another folder."
        ) from error
    return lock


def _compare(before: Any, now: Any, folder: Path, field: str = "") -> None:
    """Refuse the first field in which two fingerprints differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            _compare(before.get(key), now.get(key), folder, f"{field}.{key}" if field else key)
    elif before != now:
        raise OutputError(
            f"'{folder}' holds a run whose {field} was {before!r}, and now it is {now!r}: it cannot be resumed so. "
            "Give what it was started with, remove the folder, or give another."
        )
