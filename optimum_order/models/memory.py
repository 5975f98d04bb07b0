"""Memory of this process, and what the C library keeps of it after torch has freed it."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_MMAP_THRESHOLD = -3
"""The name of the setting in glibc's malloc.h."""


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """Have the C library return memory to the system when it is freed, while active.

    glibc holds freed blocks of less than 32 MB for later, in gaps that the next tensor does not
    fit into: the memory of a run that loads and drops blocks would grow with the number of blocks.
    """
    _set_threshold(2**18)
    try:
        yield
    finally:
        # Where glibc's own threshold ends up in a process that has freed large tensors.
        _set_threshold(2**25)


def _set_threshold(size: int) -> None:
    with suppress(AttributeError):  # other C libraries have no such setting
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def trim() -> None:
    """Have the C library return what was freed: glibc holds pieces of megabytes in gaps."""
    with suppress(OSError, AttributeError):  # only glibc can be asked
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Return the resident bytes of this process, or the most so far where only that is known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
