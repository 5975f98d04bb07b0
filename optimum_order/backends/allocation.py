"""How the sparsity of a pruner is divided among layers.

`owl` spares the blocks that have many outliers, weights whose removal changes outputs far more than
the mean of their layer. `global` has the weights of all layers compete, by what the removal of each
adds to the loss: what it adds to the squared error of an output, times the squared gradient of the
loss by that output. Both keep the sparsity of all layers together, and no layer is further from it
than `spread`.

Source: Yin et al. 2024, arXiv 2310.05175 (OWL, equation 1 and section 3.3); LeCun, Denker & Solla
1989 (OBD: second derivatives of the loss as scores that layers share).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from optimum_order.backends.base import Backend, Engine, Profile, Profiler, option
from optimum_order.backends.selection import Pruner, PruningOptions
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import SquaredNorms, Statistics
from optimum_order.order import Stage

ALLOCATIONS = ("uniform", "owl", "global")
_BINS = 32
"""Bins of a histogram in each octave of a score."""
_OCTAVES = 80
"""Octaves of a histogram either way; scores beyond are in its first and last bin."""
_MOST = 0.99
"""The largest sparsity of a layer."""


@dataclasses.dataclass(frozen=True)
class AllocationOptions(PruningOptions):
    """The options of pruning, and how the sparsity is divided."""

    allocation: str = option(
        "uniform",
        "how the sparsity is divided among layers: the same for all, by the outliers of blocks "
        "(owl), or by what each weight adds to the loss (global)",
        check=lambda v: v in ALLOCATIONS,
        allowed="uniform, owl or global",
    )
    spread: float = option(
        0.08,
        "the most by which the sparsity of a layer may differ from that of all",
        check=lambda v: 0 < v < 1,
        allowed="between 0 and 1",
    )
    outliers: float = option(
        5.0,
        "how many times the mean of its layer a score is that owl counts",
        check=lambda v: v > 1,
        allowed="above 1",
    )


class AllocatedPruner(Pruner, Profiler):
    """A pruner that may give each layer a sparsity of its own."""

    Options = AllocationOptions
    options: AllocationOptions

    @classmethod
    def validate(cls, stage: Stage, options: PruningOptions) -> PruningOptions:
        options = super().validate(stage, options)
        assert isinstance(options, AllocationOptions)
        if options.keep is not None and options.allocation != "uniform":
            raise OrderError(
                f"Stage '{stage}': pattern {options.pattern} gives all layers one sparsity, which "
                f"allocation={options.allocation} would change: leave one of them out."
            )
        return options

    @property
    def joins(self) -> bool:  # type: ignore[override]  # what looks at all layers first walks alone
        """True if all layers get the same sparsity."""
        return self.options.allocation == "uniform"

    @property
    def weighs_outputs(self) -> bool:
        """True if scores of several layers are compared."""
        return self.options.allocation == "global"

    @abstractmethod
    def costs(self, state: LayerState, statistics: Statistics) -> Tensor:
        """Return what the removal of each weight adds to the squared error of its output.

        Args:
            state: The layer.
            statistics: Of its inputs.

        Returns:
            (out, in) float32, not negative, as the method sees them: with what the others make up
            for, if they do.
        """

    def run(self, engine: Engine, joined: Sequence[Backend]) -> None:
        profiles = None if self.joins else engine.profile(self)
        if profiles is None:  # uniform, or an estimate, which runs nothing
            engine.apply(joined)
            return
        engine.assign(
            {name: self._with(sparsity) for name, sparsity in self.divided(profiles).items()}, self
        )

    def _with(self, sparsity: float) -> AllocatedPruner:
        """Return this method for one layer."""
        mine = copy.copy(self)
        mine.options = dataclasses.replace(
            self.options, sparsity=round(sparsity, 4), allocation="uniform"
        )
        return mine

    def divided(self, profiles: Mapping[str, Profile]) -> dict[str, float]:
        """Return the sparsity of each layer, by name.

        Args:
            profiles: What `profile` returned, by the layer's name.
        """
        return self._owl(profiles) if self.options.allocation == "owl" else self._global(profiles)

    def profile(
        self,
        state: LayerState,
        statistics: Statistics,
        *,
        sensitivity: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> Profile:
        if not statistics.tokens:
            statistics = statistics.isotropic()
        if self.weighs_outputs:
            scores = self.costs(state, statistics)
            weight = torch.ones(len(scores)) if sensitivity is None else sensitivity.mean(0)
            scores = scores * weight.to(scores.device)[:, None]
        else:  # outliers are those of Wanda's score, whatever the method
            scores = state.weight.float().abs() * statistics[SquaredNorms].sqrt()
        scores = scores.masked_fill(state.mask, 0.0)
        return {
            "histogram": _histogram(scores).cpu(),
            "mean": scores.mean(dtype=torch.float64).cpu(),
            "compared": torch.tensor(sensitivity is not None),
        }

    def _owl(self, profiles: Mapping[str, Profile]) -> dict[str, float]:
        """Return the sparsity of each layer: less for a block with more outliers."""
        blocks: dict[str, list[str]] = defaultdict(list)
        for name in profiles:
            blocks[_block(name)].append(name)
        ratios = {}
        for block, names in blocks.items():
            counts = sum(profiles[name]["histogram"] for name in names)
            assert isinstance(counts, Tensor)
            size = counts.sum()
            sums = [profiles[name]["mean"] * profiles[name]["histogram"].sum() for name in names]
            mean = float(sum(sums) / size)
            ratios[block] = float(counts[_bin(self.options.outliers * mean) :].sum() / size)
        least, most = min(ratios.values()), max(ratios.values())
        width = (most - least) or 1.0
        # from -spread of the block with most outliers to +spread
        wanted = {
            name: self.options.spread * (1 - 2 * (ratios[_block(name)] - least) / width)
            for name in profiles
        }
        return self._shifted(profiles, lambda name, shift: wanted[name] + shift)

    def _global(self, profiles: Mapping[str, Profile]) -> dict[str, float]:
        """Return the sparsity of each layer: one threshold for all scores."""
        sparsity = self._sparsity
        below = {
            name: (profile["histogram"].cumsum(0) / profile["histogram"].sum())
            for name, profile in profiles.items()
            if profile["compared"]
        }

        def deviation(name: str, shift: float) -> float:
            if name not in below:
                return 0.0
            place = (shift + 1) / 2 * (len(below[name]) - 1)
            low = int(place)
            high = min(low + 1, len(below[name]) - 1)
            part = place - low
            return float((1 - part) * below[name][low] + part * below[name][high]) - sparsity

        return self._shifted(profiles, deviation)

    @property
    def _sparsity(self) -> float:
        assert self.options.sparsity is not None  # a pattern is never allocated
        return self.options.sparsity

    def _shifted(
        self, profiles: Mapping[str, Profile], deviation: Callable[[str, float], float]
    ) -> dict[str, float]:
        """Return the sparsity of each layer, so that all together have the one that was asked for.

        Args:
            profiles: Of all layers.
            deviation: How far the sparsity of a layer is from that of all, from the layer's name
                and a number between -1 and 1 with which it rises.
        """
        sparsity = self._sparsity
        spread = self.options.spread
        sizes = {name: int(profile["histogram"].sum()) for name, profile in profiles.items()}

        def sparsities(shift: float) -> dict[str, float]:
            return {
                name: min(
                    max(sparsity + min(max(deviation(name, shift), -spread), spread), 0.0), _MOST
                )
                for name in profiles
            }

        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            reached = sparsities(middle)
            average = sum(reached[n] * sizes[n] for n in sizes) / sum(sizes.values())
            low, high = (middle, high) if average < sparsity else (low, middle)
        return sparsities(high)


def _block(name: str) -> str:
    """Return the block that a layer is in: its name up to the first number."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return name if match is None else match[0]


def _bin(score: float) -> int:
    """Return the first bin of a histogram whose scores are all above a score."""
    return int(_places(torch.tensor(score))) + 1


def _places(scores: Tensor) -> Tensor:
    logs = scores.float().clamp(min=1e-38).log2()
    return ((logs + _OCTAVES) * _BINS).floor().clamp(0, 2 * _OCTAVES * _BINS - 1)


def _histogram(scores: Tensor) -> Tensor:
    """Count scores by their logarithm: (bins,) int64."""
    return torch.bincount(_places(scores).flatten().long(), minlength=2 * _OCTAVES * _BINS)
