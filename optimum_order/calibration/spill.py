"""Activations on disk: what forwards wait with, above a limit, lies in files and not in memory.

The model's own frames hold these tensors, so they stay the objects that they are; only the memory
behind them is exchanged for a map of a file. Pages come when they are read and go when they are
released; none of them is memory that the process owns. A file has no name once it is mapped, so
that a killed process leaves nothing.
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

    Attributes:
        held: Bytes in memory of live tensors.
        spilled: Bytes in files of live tensors.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.held = 0
        self.spilled = 0
        self._maps: dict[int, tuple[weakref.ref[Tensor], mmap.mmap | None]] = {}

    def rest(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that will not be needed for a while.

        Args:
            tensors: On the CPU; others, and those that are not contiguous, stay as they are.

        Raises:
            OutputError: If the disk is full.
        """
        for tensor in tensors:
            waits = tensor.device.type == "cpu" and tensor.is_contiguous()
            if waits and id(tensor) not in self._maps:
                self._take(tensor)

    def wake(self, tensors: Iterable[Tensor]) -> None:
        """Release the pages of tensors that were read; their files keep the values."""
        for tensor in tensors:
            _, mapped = self._maps.get(id(tensor), (None, None))
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)

    def _take(self, tensor: Tensor) -> None:
        size = tensor.nbytes
        key = id(tensor)
        mapped = None
        if size and self.held + size > self.limit:
            mapped = self._map(size)
            copy = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
            copy.copy_(tensor)
            tensor.set_(copy.untyped_storage(), 0, tensor.shape, tensor.stride())
            mapped.madvise(mmap.MADV_DONTNEED)
            self.spilled += size
        else:
            self.held += size

        def forget(_: weakref.ref[Tensor]) -> None:
            del self._maps[key]
            if mapped is None:
                self.held -= size
            else:
                self.spilled -= size

        self._maps[key] = (weakref.ref(tensor, forget), mapped)

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # No room is an error now, and not a signal later.
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"Activations cannot be kept in '{self.folder}': {os.strerror(error.errno or 0)}. "
                "Make room, or run on fewer samples."
            ) from error
