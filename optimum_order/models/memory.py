"""Memory that the C library keeps after torch has freed it."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
"""The name of the setting in glibc's malloc.h."""


def give_memory_back() -> None:
    """Have the C library return memory to the system when it is freed, in this process from now on.

    glibc holds freed blocks of less than 32 MB for later, in gaps that the next tensor does not
    fit into: the memory of a run that loads and drops blocks would grow with the number of blocks.
    """
    with suppress(AttributeError):  # other C libraries have no such setting
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)


def trim() -> None:
    """Have the C library return what was freed: glibc holds pieces of megabytes in gaps."""
    with suppress(OSError, AttributeError):  # only glibc can be asked
        ctypes.CDLL(None).malloc_trim(0)
