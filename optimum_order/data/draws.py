"""Choosing samples: one permutation per seed, disjoint calibration draws, samples from all over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_order.data.samples import Samples
from optimum_order.errors import DataError


def choose(count: int, samples: int | None, seed: int | None) -> Tensor:
    """Return the indices of the first samples of a permutation: more samples only add to fewer.

    Args:
        count: Samples to choose from.
        samples: Samples to take; None takes all. Where `count` is smaller, all are taken.
        seed: The permutation; None keeps the order of the source.

    Returns:
        (k,) int64.
    """
    if seed is None:
        order = torch.arange(count)
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:samples]


def shortage(name: str, count: int, samples: int | None, unit: str) -> str:
    """Return the note for a source that has fewer samples than asked for, or "".

    Args:
        name: The name of the source.
        count: Samples of the source.
        samples: Samples asked for; None for all.
        unit: The word for one sample.
    """
    if samples is None or samples <= count:
        return ""
    return f"{name} has {count} {unit}s, {samples} were asked for"


def spread(samples: Samples, count: int | None) -> Samples:
    """Return `count` samples at equal distances from all over the samples, in order.

    Args:
        samples: The samples to take from.
        count: Samples to take; None, or more than there are, takes all.
    """
    if count is None or count >= len(samples):
        return samples
    return samples.take(torch.arange(count) * len(samples) // count)


class Draws:
    """Calibration draws of one source that share no sample; the source is read once for all.

    Draw k is the k-th block of `size` samples of the seed's permutation. Take the last draw first
    to read the source only once.

    Args:
        load: Reads the first n samples of the permutation, or all if there are fewer.
        size: Samples in a draw.
    """

    def __init__(self, load: Callable[[int], Samples], size: int) -> None:
        self._load = load
        self._size = size
        self._count = 0
        self._samples: Samples | None = None

    def take(self, draw: int, samples: int | None = None) -> Samples:
        """Return a draw, or its first few samples.

        Args:
            draw: The number of the draw, from 0.
            samples: Samples to take of the draw; None takes all.

        Raises:
            DataError: If the draw is negative, or the source is too short for so many draws.
        """
        if draw < 0:
            raise DataError(f"Calibration draws are numbered from 0, got {draw}.")
        pool = self._read(draw + 1)
        start = draw * self._size
        stop = start + min(samples or self._size, self._size)
        return pool.take(torch.arange(start, min(stop, len(pool))))

    def _read(self, count: int) -> Samples:
        if self._samples is None or self._count < count:
            wanted = self._size * count
            pool = self._load(wanted)
            if count > 1 and len(pool) < wanted:
                raise DataError(
                    f"{pool.source} has {len(pool)} {pool.unit}s, enough for "
                    f"{len(pool) // self._size} disjoint draws of {self._size}, and {count} are "
                    f"needed. Give more data, or ask for fewer draws or fewer {pool.unit}s."
                )
            self._samples = pool
            self._count = count
        return self._samples
