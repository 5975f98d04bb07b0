"""Activations on disk: what forwards wait with, above a limit, lies in files and not in memory.

The model's own frames hold these tensors, so they stay the objects that they are, and only the memory behind them is
exchanged for a map of a file. Its pages come when they are read and go when they are let go; nothing of it is memory
that the process owns. A file has no name once it is mapped, so that a process that is killed leaves nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from optimum_order.errors import OutputError


class Spill:
    """Keeps tensors in memory up to a limit, and in files beyond it.

    Args:
        folder: Where the files are; it exists.
        limit: In bytes.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.held = 0
        """Bytes in memory of tensors that are alive."""
        self.spilled = 0
        """Bytes in files of tensors that are alive."""
        self._known: dict[int, tuple[weakref.ref, mmap.mmap | None]] = {}

    def rest(self, tensors: Iterable[Tensor]) -> list[mmap.mmap]:
        """Take note of tensors that will not be needed for a while.

        Args:
            tensors: On the CPU; others, and those whose numbers do not lie side by side, are let be.

        Returns:
            The maps that those lie in that are not in memory: for `drop`, once they have been read.

        Raises:
            OutputError: If the disk is full.
        """
        maps = []
        for tensor in tensors:
            if (
                id(tensor) not in self._known
                and tensor.device.type == "cpu"
                and tensor.is_contiguous()
            ):
                self._take(tensor)
            if id(tensor) in self._known and (found := self._known[id(tensor)][1]) is not None:
                maps.append(found)
        return maps

    def _take(self, tensor: Tensor) -> None:
        size, key, mapped = tensor.nbytes, id(tensor), None
        if size and self.held + size > self.limit:
            mapped = self._map(size)
            there = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
            there.copy_(tensor)
            tensor.set_(there.untyped_storage(), 0, tensor.shape, tensor.stride())
            drop([mapped])
            self.spilled += size
        else:
            self.held += size

        def forget(_: weakref.ref) -> None:
            del self._known[key]
            if mapped is None:
                self.held -= size
            else:
                self.spilled -= size

        self._known[key] = weakref.ref(tensor, forget), mapped

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(
                    file.fileno(), 0, size
                )  # no room is an error now, and not a signal later
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"Activations cannot be kept in '{self.folder}': {os.strerror(error.errno)}. Make room, or run on "
                "fewer samples."
            ) from error


def drop(maps: Iterable[mmap.mmap]) -> None:
    """Let go of the pages of maps; what is in them stays in their files."""
    for mapped in maps:
        mapped.madvise(mmap.MADV_DONTNEED)
