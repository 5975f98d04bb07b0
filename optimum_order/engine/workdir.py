"""The finished part of a run in a folder, so that a killed run goes on from its resume point.

One folder is one run, and its files are all that is known of the progress: a file is whole or
absent. `007-00012.state.safetensors` holds the layers of block 12 as pass 7 over the model left
them, `.measured` what an allocator's pass measured there, or all that a recovery changed;
`.learning` is how far a recovery is that is not finished. A file is removed only once the file that
takes its place is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from optimum_order import files
from optimum_order.calibration.execution import PAUSES
from optimum_order.engine import snapshot
from optimum_order.errors import ArtifactError, OutputError

_FINGERPRINT = "fingerprint.json"
_LOCK = "lock.sqlite"
_PROCESS = "process"
SECONDS_BETWEEN = 60.0
"""Seconds between two writes of what is not finished, at least."""
_TIMES_WRITING = 20
"""Times as long as the last write took, at least."""
_OURS = {_FINGERPRINT, _PROCESS, _LOCK, f"{_LOCK}-journal"}
_FILE = re.compile(r"(?P<number>\d+)-(?P<unit>\d+)\.(?P<kind>state|measured|learning)\.safetensors")
_OLD_FILE = re.compile(r"\d+-\d+\.crossing\.safetensors")
"""A file that only version 0.1.0 wrote."""


class WorkDir:
    """The folder of one run, for this process alone until it is closed.

    Args:
        folder: Made if missing.
        fingerprint: All that decides what the run computes: nested mappings of plain values.
        resume: Whether to go on from what is there. Otherwise nothing may be there.

    Raises:
        OutputError: If the folder is in use or of another run, or if it holds a run that nobody
            asked to resume, or nothing to resume.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], *, resume: bool):
        self.folder = Path(folder)
        check(self.folder, resume=resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            try:
                self._open(json.loads(json.dumps(fingerprint)), resume)
            except BaseException:
                self._release()
                raise
        except OutputError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error
        # The writer copies tensors; with more threads it would keep the run from its cores.
        self._writer = ThreadPoolExecutor(1, "optimum-order-workdir", torch.set_num_threads, (1,))
        self._pending: Future[None] | None = None

    def _open(self, fingerprint: Any, resume: bool) -> None:
        """Go on from what is there, or begin."""
        check(self.folder, resume=resume)  # once more: now nobody else can change it
        (self.folder / _PROCESS).unlink(missing_ok=True)
        for removed in files.leftovers(self.folder, "old"):
            shutil.rmtree(removed, ignore_errors=True)
        for file in self.folder.iterdir():
            if files.is_unfinished(file):  # by a process that was killed
                file.unlink()
        if has_progress(self.folder):
            before = read_fingerprint(self.folder)
            _refuse_other_version(before, fingerprint, self.folder)
            _compare(*_comparable(before, fingerprint), self.folder)
        else:
            with files.atomic(self.folder / _FINGERPRINT) as partial:
                partial.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        (self.folder / _PROCESS).write_text(str(os.getpid()), encoding="utf-8")

    def passage(self, number: int, units: Sequence[str]) -> Passage:
        """Return one pass over the model.

        Args:
            number: Which, from 0.
            units: Names of all blocks of the model; always the same.
        """
        return Passage(self, number, units)

    def files(self, kind: str) -> dict[tuple[int, int], Path]:
        """Return the files of a kind by their (pass, block)."""
        matches = ((file, _FILE.fullmatch(file.name)) for file in self.folder.iterdir())
        return {
            (int(match["number"]), int(match["unit"])): file
            for file, match in matches
            if match and match["kind"] == kind
        }

    def latest(self, unit: int) -> Path | None:
        """Return the file that the last pass which finished a block left there, if any did."""
        passes = {
            number: file for (number, which), file in self.files("state").items() if which == unit
        }
        return passes[max(passes)] if passes else None

    def read(self, file: Path, device: str = "cpu") -> Any:
        """Return the content of a file.

        Args:
            file: From `files`.
            device: Where its tensors go.

        Raises:
            OutputError: If the file is damaged.
        """
        try:
            return snapshot.load(file, device)
        except ArtifactError as error:
            raise OutputError(
                f"'{file}' is damaged: remove the work dir, and start again."
            ) from error

    def write(self, file: Path, value: Any, instead_of: Sequence[Path]) -> None:
        """Begin to write a file, then to remove others; `wait` returns once both are done.

        Args:
            file: In the folder.
            value: As `snapshot.save` takes it, or a function that gives it.
            instead_of: What the file replaces.
        """

        def work() -> None:
            snapshot.save(value() if callable(value) else value, file, durable=True)
            for old in instead_of:
                old.unlink(missing_ok=True)

        self._pending = self._writer.submit(work)

    def wait(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            OutputError: If it cannot be written. What was finished before is still there.
        """
        pending = self._pending
        self._pending = None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> OutputError:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        hint = ""
        if has_progress(self.folder):
            hint = (
                " The finished part of the run is still there: make room, then go on with "
                "resume=True (--resume)."
            )
        return OutputError(f"Cannot write the work dir '{self.folder}': {reason}.{hint}")

    def close(self) -> None:
        """Let others use the folder; if nothing was finished, remove the folder."""
        self._writer.shutdown()
        self._release()

    def _release(self) -> None:
        if not has_progress(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class FollowedWorkDir(WorkDir):
    """The folder of a run that another process of the same run owns: read, and never written.

    Args:
        folder: On a disk that all processes of the run see; the owner has opened it.
        fingerprint: All that decides what this process computes.

    Raises:
        OutputError: If the folder is not there, or the owner computes something else.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OutputError(
                f"The work dir '{folder}' is not on a disk that all processes of the run see: give "
                "a folder that is (--work-dir)."
            )
        before = read_fingerprint(self.folder)
        _compare(*_comparable(before, json.loads(json.dumps(fingerprint))), self.folder)

    def write(self, file: Path, value: Any, instead_of: Sequence[Path]) -> None:
        """Leave writing to the owner."""

    def wait(self) -> None:
        """Return at once: nothing was written."""

    def close(self) -> None:
        """Leave the folder to the owner."""


class Passage:
    """One pass over the model, as the work dir keeps it.

    Args:
        work: The work dir.
        number: Which pass of the run, from 0.
        units: Names of all blocks of the model.
    """

    def __init__(self, work: WorkDir, number: int, units: Sequence[str]):
        self.work = work
        self.number = number
        self._index = {name: index for index, name in enumerate(units)}
        finished = {**work.files("state"), **work.files("measured")}
        self._finished = {unit for at, unit in finished if at == number}
        self._over = any(at > number for at, _ in finished)
        """Whether a later pass has begun."""
        self._due = monotonic() + SECONDS_BETWEEN
        """When what is not finished is to be kept again."""

    def has(self, unit: str) -> bool:
        """Return whether the pass has finished a block."""
        return self._over or self._index[unit] in self._finished

    def load(self, unit: str, device: str = "cpu") -> Any:
        """Return what the pass left of a finished block.

        Args:
            unit: The block's name.
            device: Where tensors go.

        Returns:
            The value that was saved, or None if a later pass has left something since.

        Raises:
            OutputError: If the value is damaged or missing.
        """
        index = self._index[unit]
        for kind in ("state", "measured"):
            file = self._file(index, kind)
            if file.exists():
                return self.work.read(file, device)
        later = any(at > self.number for at, which in self.work.files("state") if which == index)
        if not later:
            raise OutputError(
                f"The work dir '{self.work.folder}' lacks block {index} of pass {self.number}: "
                "remove it and start again."
            )
        return None

    def save(self, unit: str, kind: str, value: Any, *, keep: bool = False) -> None:
        """Keep what the pass did at a block, in place of what earlier passes did there.

        Args:
            unit: The block's name.
            kind: "state", or "measured" for what all later passes need.
            value: As `snapshot.save` takes it, or a function that gives it, called while the run
                goes on.
            keep: Whether what earlier passes did there stays as well.

        Raises:
            OutputError: If the value, or what was saved before it, cannot be written.
        """
        index = self._index[unit]
        self.work.wait()
        file = self._file(index, kind)
        old = self.work.files(kind) if kind == "state" and not keep else {}
        replaced = [path for (_, which), path in old.items() if which == index and path != file]
        self.work.write(file, value, [*replaced, self._file(index, "learning")])

    def unfinished(self, unit: str, device: str = "cpu") -> Any:
        """Return what `save_unfinished` wrote last for a part; None if there is none.

        Args:
            unit: The part's name.
            device: Where tensors go.

        Raises:
            OutputError: If the file is damaged.
        """
        file = self._file(self._index[unit], "learning")
        return self.work.read(file, device) if file.exists() else None

    def save_unfinished(self, unit: str, value: Callable[[], Any]) -> None:
        """Keep how far a part is, if it was not kept for a while; `save` removes it.

        Args:
            unit: The part's name.
            value: Gives what `snapshot.save` takes. All of it is on the disk on return.

        Raises:
            OutputError: If it cannot be written.
        """
        begun = monotonic()
        if begun < self._due:
            return
        self.work.write(self._file(self._index[unit], "learning"), value, [])
        self.work.wait()
        written = monotonic()
        self._due = written + max(SECONDS_BETWEEN, _TIMES_WRITING * (written - begun))

    def _file(self, index: int, kind: str) -> Path:
        return self.work.folder / f"{self.number:03d}-{index:05d}.{kind}.safetensors"


def check(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that a run could not use.

    Args:
        folder: The work dir.
        resume: Whether the run goes on from what is there.

    Raises:
        OutputError: If the folder is a file, is not a work dir, or holds a run that nobody asked
            to resume, or nothing to resume.
    """
    if problem := files.too_long(folder):
        raise OutputError(f"The work dir cannot be made: {problem}")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"'{folder}' is a file; give a folder as the work dir.")
    if not folder.is_dir():
        if resume:
            raise OutputError(
                f"There is no work dir '{folder}', so nothing to resume: start without --resume."
            )
        return
    for file in sorted(folder.iterdir()):
        if _OLD_FILE.fullmatch(file.name):
            raise OutputError(
                f"'{folder}' is a work dir of optimum-order 0.1.0, which this version cannot "
                "resume: finish it with 0.1.0, remove the folder, or give another."
            )
        if not (file.name in _OURS or _FILE.fullmatch(file.name) or files.is_unfinished(file)):
            raise OutputError(
                f"'{folder}' holds '{file.name}' and is no work dir of ours; give another folder."
            )
    if has_progress(folder) and not resume:
        raise OutputError(
            f"'{folder}' holds a run that was not finished. Go on with it with resume=True "
            "(--resume), or remove it."
        )


def has_progress(folder: Path) -> bool:
    """Return whether a work dir holds a finished block."""
    return folder.is_dir() and any(_FILE.fullmatch(file.name) for file in folder.iterdir())


def read_fingerprint(folder: Path) -> Any:
    """Return what the run of a work dir was started with.

    Raises:
        OutputError: If the fingerprint is damaged.
    """
    file = folder / _FINGERPRINT
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"'{file}' is missing or damaged: remove the work dir, and start again."
        ) from error


def paused(folder: Path) -> str | None:
    """Return where the run of a work dir pauses; None if there is no run in it."""
    if not has_progress(folder):
        return None
    run = read_fingerprint(folder)
    pause = run.get("pause") if isinstance(run, dict) else None
    return pause if pause in PAUSES else None


def led_to(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether a saved model is the end of a work dir's run, which was not removed yet.

    Args:
        folder: The work dir.
        manifest: Of the saved model.
    """
    try:
        run = read_fingerprint(folder)
        model = manifest["base_model"]
        samples = manifest.get("calibration") or {}
        digests = (run["model"]["digest"], (run["calibration"] or {}).get("digest"))
    except (OutputError, KeyError, TypeError, AttributeError):
        return False
    fields = ("order", "schedule", "pause", "targets", "ignore", "versions")
    same = all(run.get(field) == manifest.get(field) for field in fields)
    return same and digests == (model.get("digest"), samples.get("digest"))


def is_ours(folder: Path) -> bool:
    """Return whether this process was the last to work in a folder that holds a finished block."""
    process = folder / _PROCESS
    if not (has_progress(folder) and process.is_file()):
        return False
    return process.read_text(encoding="utf-8") == str(os.getpid())


def remove(folder: Path) -> None:
    """Remove a work dir, so that it is whole or absent; a run without anything to resume has none.

    Raises:
        OutputError: If another process uses the folder.
    """
    if not folder.exists():
        return
    with contextlib.closing(_locked(folder)):
        aside = files.beside(folder, "old")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _locked(folder: Path) -> sqlite3.Connection:
    try:
        return files.lock(folder / _LOCK)
    except sqlite3.OperationalError as error:
        process = folder / _PROCESS
        user = "another process"
        if process.is_file():
            user = f"process {process.read_text(encoding='utf-8')}"
        raise OutputError(
            f"The work dir '{folder}' is in use by {user} ({error}). Wait for it, stop it, or "
            "give another folder."
        ) from error


def _refuse_other_version(before: Any, now: Any, folder: Path) -> None:
    """Refuse a work dir of another version of this package, whatever else differs."""
    theirs = _version(before)
    ours = _version(now)
    if theirs != ours:
        raise OutputError(
            f"'{folder}' is a work dir of optimum-order {theirs}, which version {ours} cannot "
            "resume: finish it with that version, remove the folder, or give another."
        )


def _version(fingerprint: Any) -> Any:
    versions = fingerprint.get("versions") if isinstance(fingerprint, dict) else None
    return versions.get("optimum_order") if isinstance(versions, dict) else None


def _comparable(before: Any, now: Any) -> tuple[Any, Any]:
    """Return two fingerprints without what may differ.

    A run may go on in another number of processes: sums are then equal within the rounding of
    float32, and so the number of threads says nothing more.
    """
    alone = all(isinstance(one, dict) and one.get("processes", 1) == 1 for one in (before, now))
    leave_out = {"processes"} if alone else {"processes", "threads"}
    return tuple(  # type: ignore[return-value]
        {key: value for key, value in one.items() if key not in leave_out}
        if isinstance(one, dict)
        else one
        for one in (before, now)
    )


def _compare(before: Any, now: Any, folder: Path, field: str = "") -> None:
    """Refuse the first field in which two fingerprints differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            _compare(before.get(key), now.get(key), folder, f"{field}.{key}" if field else key)
    elif before != now:
        raise OutputError(
            f"'{folder}' holds a run whose {field} was {before!r}, and now is {now!r}: it cannot "
            "be resumed so. Give what it was started with, remove the folder, or give another."
        )
