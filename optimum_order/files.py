"""Files: atomic writes, locks, digests, JSON of unknown origin, weight files, human sizes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import html
import json
import os
import re
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from optimum_order.errors import ArtifactError, OutputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNFINISHED = re.compile(r"\..*\.partial|\.tmp\w{6}")
"""The names of files while `atomic` or safetensors writes them."""
_MAX_BYTES = 256 * 2**20
_PREFIX = 40
"""Characters of a name that a hidden name beside it begins with."""
_NAME_BYTES = 255
_PATH_BYTES = 4095
_INSIDE_BYTES = 160
"""Bytes that the names of files in a folder may take."""


@contextlib.contextmanager
def atomic(file: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write; on success it takes the place of `file`, else it is removed.

    Args:
        file: Its folder exists.
        durable: Whether the content must survive a stop of the machine from then on.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, file)
        if durable:
            _sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def is_unfinished(file: Path) -> bool:
    """Return whether a file is being written, or was when its process was killed."""
    return _UNFINISHED.fullmatch(file.name) is not None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: Path) -> sqlite3.Connection:
    """Take a lock that every system has and that a killed process gives back.

    Args:
        file: An SQLite database, made if missing; nobody else uses it.

    Returns:
        The lock; `close` gives it back.

    Raises:
        sqlite3.OperationalError: If another process, or this one, holds the lock.
        OSError: If the file cannot be written.
    """
    connection = None
    try:
        connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
        connection.execute("BEGIN EXCLUSIVE")
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
            number = errno.ENOSPC if "full" in str(error) else errno.EIO
            number = number if file.parent.is_dir() else errno.ENOENT
            raise OSError(number, os.strerror(number), str(file)) from error
        raise
    return connection


def beside(path: Path, suffix: str) -> Path:
    """Return a new hidden name beside a path, short enough for any name that a path may have.

    Args:
        path: A file or folder.
        suffix: The end of the new name.
    """
    return path.with_name(f".{path.name[:_PREFIX]}.{secrets.token_hex(4)}.{suffix}")


def leftovers(path: Path, suffix: str) -> Iterator[Path]:
    """Yield what a process that was killed left under names from `beside`."""
    random = "[0-9a-f]" * 8  # and nothing of the path "out.old", where the path is "out"
    return path.parent.glob(f".{glob.escape(path.name[:_PREFIX])}.{random}.{suffix}")


def too_long(path: Path) -> str | None:
    """Return why no file system takes a path and the files in that folder, or None.

    Args:
        path: A folder that is to be made.

    Returns:
        A sentence.
    """
    path = Path(os.path.abspath(path))
    for part in path.parts:
        size = len(os.fsencode(part))
        if size > _NAME_BYTES:
            return (
                f"'{part[:_PREFIX]}...' has {size} bytes, and a name has at most {_NAME_BYTES}. "
                "Give a shorter one."
            )
    size = len(os.fsencode(path))
    if size > _PATH_BYTES - _INSIDE_BYTES:
        return (
            f"The path '...{path.name[-_PREFIX:]}' has {size} bytes, and the path of a folder may "
            f"have {_PATH_BYTES - _INSIDE_BYTES}. Give a shorter one."
        )
    return None


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; a name that no system takes is none."""
    try:
        return Path(path).is_dir()
    except OSError:  # "File name too long" is no answer for `is_dir`
        return False


def entries(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Return what lies in a folder from elsewhere, without following a link or opening a file.

    A link counts as a file only inside the Hub's cache, which stores files so. Entries whose names
    begin with a dot, and what lies in them, are left out.

    Args:
        folder: The folder.

    Returns:
        The paths of regular files inside the folder, and by path a sentence for everything that is
        neither such a file nor a folder of such files.
    """
    names: set[str] = set()
    others: dict[str, str] = {}
    folders = [folder]
    while folders:
        for entry in sorted(os.scandir(folders.pop()), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif is_plain(path, folder):
                names.add(name)
            elif entry.is_symlink():
                others[name] = f"{name} is a link: nothing outside the folder is read."
            else:
                others[name] = f"{name} is a {_kind(path)}, and only files are read."
    return names, others


def special(folder: Path) -> str | None:
    """Return the name of an entry that reading could wait for without end, or None.

    Links are followed: people keep models behind links.

    Args:
        folder: The folder of a model.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nothing is as good as missing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return entry.name
    return None


def is_plain(file: Path, folder: Path) -> bool:
    """Return whether a path is a regular file, or a link into the Hub's cache that holds a folder.

    Args:
        file: A path in the folder.
        folder: The folder.
    """
    try:
        mode = file.lstat().st_mode
        if not stat.S_ISLNK(mode):
            return stat.S_ISREG(mode)
        snapshots = folder.resolve().parent
        blobs = (snapshots.parent / "blobs").resolve()
        blob = file.resolve(strict=True)
    except (OSError, RuntimeError):  # missing, or links that lead in a circle
        return False
    return snapshots.name == "snapshots" and blob.is_relative_to(blobs) and blob.is_file()


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    kinds = {
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
        stat.S_IFDIR: "folder",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """Return the sha256 of all parts, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return digest(iter(lambda: stream.read(2**20), b""))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        ArtifactError: If the file does not hold one, or is larger than any that a model has.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes, which no JSON of a model has")
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"'{file}' cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"'{file}' must hold a JSON object, got {type(data).__name__}.")
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def size(count: float) -> str:
    """Return a number of bytes in the largest decimal unit that keeps it above one: `11.7 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 seconds, 12 minutes, 3.5 hours, 190 days."""
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 1.5 * length:
            return f"{float(f'{seconds / length:.2g}'):g} {unit}s"
    return f"{max(seconds, 1):.0f} second{'' if seconds < 1.5 else 's'}"


def check_room(path: Path, count: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        path: Where the result will be; it need not be there yet.
        count: Bytes of the result.

    Raises:
        OutputError: If fewer bytes are free there.
    """
    folder = next((parent for parent in [path, *path.absolute().parents] if parent.is_dir()), None)
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if free < count:
        raise OutputError(
            f"The disk of '{path}' has {size(free)} free, and the result takes {size(count)}. Make "
            "room, or write to another disk."
        )


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a table as a notebook shows it; text from elsewhere stays text.

    Args:
        title: The heading.
        rows: A name and a value each.
    """
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def weight_bytes(folder: str | Path) -> int:
    """Return the bytes that the weights of a saved model take on disk.

    Raises:
        ArtifactError: If the folder has no weights, or one of their files is missing.
    """
    return sum((Path(folder) / name).stat().st_size for name in weight_files(Path(folder)))


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files of a saved model, in order.

    Raises:
        ArtifactError: If one is missing, or the index names a file outside the folder.
    """
    if not (folder / INDEX).exists():
        names = [SINGLE]
    else:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ArtifactError(f"{folder / INDEX} has no 'weight_map' from tensors to files.")
        names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"{folder / INDEX} names the file '{name}', "
                "which is not a .safetensors file beside it."
            )
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing.")
    return names
