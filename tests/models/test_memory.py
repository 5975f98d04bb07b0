"""Memory that is freed goes back to the system, on Linux with glibc."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep no memory"
)

HEAD = """
import os
from optimum_order.models.memory import giving_memory_back, trim

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def fill(size):
    # what stays in between is why the C library cannot give back the end of its memory
    pieces = [(bytearray(size), bytearray(1000)) for _ in range(64 * 2**20 // size)]
    fences = [fence for _, fence in pieces]
    return fences

start = megabytes()
"""


def retained(code):
    """Return how many of the 64 MB that a new process frees it still has."""
    done = subprocess.run(
        [sys.executable, "-c", f"{HEAD}{code}\nprint(megabytes() - start)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def test_trim_gives_back_what_was_freed_in_small_pieces():
    assert retained("fences = fill(2**16)") > 48
    assert retained("fences = fill(2**16); trim()") < 16


def test_blocks_are_given_back_as_they_are_freed():
    """A large block makes the C library keep all smaller ones from then on, unless it is told."""
    large = "bytearray(30 * 2**20); start = megabytes(); fences = fill(4 * 2**20)"
    assert retained(large) > 48
    inside = f"with giving_memory_back(): {large}"
    assert retained(inside) < 16
    assert retained(f"with giving_memory_back(): pass\n{large}") > 48, "it ends with the context"
