"""ECSQ, entropy-coded scalar quantization: integers whose entropy is the size of the layer.

A fixed-width format stores a zero in as many bits as any other code. An entropy coder stores a
code in its surprise, so pruning and quantization become one trade-off between bytes and error, and
two rules give the best trade: a step for each column with equal distortion in every column, which
is `U_jj` of the sweep itself (waterfilling), and a step for each row with equal effect on the loss
in every row, which is the inverse root of the row's output sensitivity. One step for the whole
model then sets the rate.

Steps of columns are powers of two, which are exact in every floating-point format and can be folded
into whatever stands before the layer.

Source: Lifar et al. 2026, arXiv 2603.04956 (WaterSIC); Frantar et al. 2022, arXiv 2210.17323 (the
sweep); Sullivan 1996 (dead zones).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from optimum_order.backends.base import Backend, Engine, Profile, Profiler, Rewrite, option
from optimum_order.backends.obs import (
    Factor,
    Sweeper,
    SweepOptions,
    keep_better_rows,
    remarks,
    sweep,
)
from optimum_order.backends.rate import Curve, Sketch, bisected
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.rounding import AffineRounder, rounded
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics

logger = logging.getLogger(__name__)

SENSITIVITIES = ("auto", "none", "within", "across")
_SPREAD = 3.0
"""Octaves by which a row's sensitivity may differ from the layer's mean, either way."""
_LAYER_SPREAD = 2.0
"""Octaves by which a layer's step may differ from that of its equal rate, either way."""

_MARGIN = 1.25
"""How far the corrections of a sweep may carry the largest weight of a column."""
_TYPICAL = 4.0
"""Root mean squares of a column that its largest code holds if codes are short: the few weights
beyond are cut off, which costs less than a longer step for all."""
_LARGE = 4096
"""The largest weights of a layer, in units of their columns' steps, that codes are made to hold."""
_ROUNDS = 3
"""Most times that steps are set anew because rows and columns got longer ones."""
_ROOMY = 63
"""The least `max_code` with room for the largest weights."""


@dataclasses.dataclass(frozen=True)
class RateOptions:
    """The rate, and what the steps follow."""

    rate: float = option(
        dataclasses.MISSING,
        "bits of a weight after entropy coding, on average over the model",
        check=lambda v: 0 < v <= 8,
        allowed="a number above 0 and at most 8",
    )
    sensitivity: str = option(
        "auto",
        "what rows and layers differ by: their effect on the loss within a layer, across all "
        "layers, or none; auto tries them on calibration samples that were held back",
        check=lambda v: v in SENSITIVITIES,
        allowed="auto, none, within or across",
    )
    columns: bool = option(True, "give each column a step of its own, a power of two")
    dead_zone: float = option(
        0.55,
        "the part of a step below which a weight becomes zero",
        check=lambda v: 0.5 <= v < 1,
        allowed="at least 0.5 and below 1",
    )
    max_code: int = option(
        127,
        "the largest code; 7 lets 4-bit kernels run the result",
        check=lambda v: v in (1, 3, 7, 15, 31, 63, 127),
        allowed="1, 3, 7, 15, 31, 63 or 127",
    )


@dataclasses.dataclass(frozen=True)
class ECSQOptions(SweepOptions, RateOptions):
    """The options of the rate, and of the sweep."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What a layer gets of the model's budget.

    Args:
        log_step: log2 of the step where the other two are zero.
        log_rows: (out,) log2 of the step of each row.
        least: (in,) int8, the least log2 of the step of each column.
        sources: (in,) int64, as in `Profiler.profile`, or None.
    """

    log_step: float
    log_rows: Tensor
    least: Tensor
    sources: Tensor | None = None


class ECSQ(Sweeper, Profiler):
    """The OBS sweep with a dead zone, on steps that every row and every column has of its own."""

    name = "ecsq"
    summary = "round to integers of low entropy, at a rate in bits for the whole model"
    kind = "quantize"
    needs = frozenset({Gram})
    Options = ECSQOptions
    options: ECSQOptions
    share: Share | None = None
    """What this layer gets; None gives the layer the rate by itself."""

    def run(self, engine: Engine, joined: Sequence[Backend]) -> None:
        if len(joined) > 1 or self.options.sensitivity == "none":
            engine.apply(joined)
            return
        shares = self._shares(engine)
        if shares is None:
            engine.apply(joined)
            return
        backends = {}
        for name, share in shares.items():
            backends[name] = copy.copy(self)
            backends[name].share = share
        engine.assign(backends, self)

    # One layer

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        options = self.options
        weight = state.weight  # (out, in)
        pruned = state.mask  # (out, in)
        # The largest inputs first: their steps are the shortest, and longer than if they came last.
        factor = Factor.of(statistics, options.damping, act_order=True)
        share = self.share or self._alone(state, statistics)
        # from all samples; layers that read one input have one U, and so the same exponents
        grid = self._grid(weight, share, self._exponents(factor, share.sources))

        def choose(w: Tensor, d: Tensor, start: int) -> Tensor:
            """Remove what is removed already: w is (out, k)."""
            return pruned[:, factor.columns[start : start + w.shape[1]]]

        aim = self.aim(weight, statistics, factor)
        swept, _ = sweep(
            aim,
            factor.U,
            grid=_WithDeadZone(grid, options.dead_zone),
            choose=choose,
            order=factor.columns,
        )
        plain = _nearest(grid, weight, options.dead_zone)
        new, lost = keep_better_rows(swept.to(weight.dtype), plain, aim, statistics[Gram])
        codes = grid.quantize(new)
        grid = _refitted(grid, codes, aim, statistics[Gram])
        notes = remarks(self.stage, options.damping, factor.damping, lost, len(weight))
        return dataclasses.replace(
            state, weight=grid.dequantize(codes), grid=grid, notes=state.notes + notes
        )

    def _alone(self, state: LayerState, statistics: Statistics) -> Share:
        """Return what a layer gets that has the rate by itself."""
        budget = _Budget({"": self.profile(state, statistics)}, self.options)
        return budget.shares("none")[""]

    def _exponents(self, factor: Factor, sources: Tensor | None) -> Tensor:
        """Return log2 of the step of each column, (in,) int8, around zero."""
        logs = torch.empty_like(factor.U[0])
        logs[factor.columns] = factor.U.diagonal().log2()
        if not self.options.columns:
            return torch.zeros_like(logs, dtype=torch.int8)
        if sources is not None:
            _, groups = sources.to(logs.device).unique(return_inverse=True)
            means = torch.zeros(int(groups.max()) + 1, device=logs.device)
            logs = means.scatter_reduce(0, groups, logs, "mean", include_self=False)[groups]
        return (logs - logs.mean()).round_().clamp_(-30, 30).to(torch.int8)

    def _grid(self, weight: Tensor, share: Share, exponent: Tensor) -> DualScaleGrid:
        bits = max(2, self.options.max_code.bit_length() + 1)
        exponent = torch.maximum(exponent, share.least.to(exponent.device)).to(weight.device)
        steps = torch.exp2(share.log_rows.to(weight.device) + share.log_step)  # (out,)
        least, most = DualScaleGrid.scale_range(weight.dtype, bits, exponent)
        return DualScaleGrid(bits, steps.clamp(least, most).to(weight.dtype)[:, None], exponent)

    # The whole model

    def profile(
        self,
        state: LayerState,
        statistics: Statistics,
        *,
        sensitivity: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> Profile:
        factor = Factor.of(statistics, self.options.damping, act_order=True)
        exponent = self._exponents(factor, sources)
        sketch = Sketch.of(state.weight, exponent, state.pruned)
        profile = {
            "values": sketch.values,
            "size": sketch.size,
            "row": sketch.row,
            "column": sketch.column,
            "shape": torch.tensor(sketch.shape),
            "exponent": exponent,
            "level": factor.U.diagonal().log2().mean() + math.log2(max(1, statistics.tokens)) / 2,
        }
        if sources is not None:
            profile["sources"] = sources
        if sensitivity is not None and statistics.tokens:
            profile["sensitivity"] = sensitivity
        values = state.weight.float().abs() * torch.exp2(-exponent.float())
        large, place = values.flatten().topk(min(_LARGE, values.numel()))
        profile["large"] = large.clamp(min=1e-30).log2()
        profile["large_row"] = (place // values.shape[1]).int()
        profile["large_column"] = (place % values.shape[1]).int()
        profile["typical"] = values.square().mean(0).sqrt().clamp(min=1e-30) * _TYPICAL
        return {name: tensor.cpu() for name, tensor in profile.items()}

    def _shares(self, engine: Engine) -> dict[str, Share] | None:
        """Return what each layer gets of the budget; None if the run cannot say."""
        profiles = engine.profile(self)
        if profiles is None:
            return None
        names = _CANDIDATES if self.options.sensitivity == "auto" else [self.options.sensitivity]
        if not any("sensitivity" in profile for profile in profiles.values()):
            names = ["none"]
        budget = _Budget(profiles, self.options)
        shares = [budget.shares(name) for name in names]
        if len(shares) == 1:
            return shares[0]

        def rewritten(share: Mapping[str, Share]) -> Rewrite:
            def rewrite(name: str, weight: Tensor) -> Tensor:
                mine = share.get(name)
                return weight if mine is None else self._plain(weight, mine, profiles[name])

            return rewrite

        losses = engine.added_losses(self, [rewritten(share) for share in shares])
        fine = [n for n, loss in enumerate(losses) if loss <= min(losses) * _TOLERANCE]
        return shares[max(fine, default=0)]

    def _plain(self, weight: Tensor, share: Share, profile: Profile) -> Tensor:
        """Return a weight (out, in) rounded to its share's grid with no corrections."""
        grid = self._grid(weight, share, profile["exponent"])
        return _nearest(grid, weight, self.options.dead_zone)


_TOLERANCE = 1.15
"""Candidates are tried without the corrections of the sweep, which halve the loss. One whose loss
is so near to the least counts as good, and of these the one that divides most is taken."""
_CANDIDATES = ["none", "within", "half", "across"]
"""What `sensitivity=auto` tries; "half" goes half the way from equal rates to one slope."""


class _Budget:
    """Divides a rate among layers.

    Args:
        profiles: Of all layers.
        options: Of the stage.
    """

    def __init__(self, profiles: Mapping[str, Profile], options: ECSQOptions):
        self.profiles = profiles
        self.options = options

    def shares(self, sensitivity: str) -> dict[str, Share]:
        """Return what each layer gets.

        Rows and columns whose codes would be too large get longer steps, and then all steps are set
        anew.

        Args:
            sensitivity: One of `_CANDIDATES`.
        """
        rows = {name: _log_rows(profile, sensitivity) for name, profile in self.profiles.items()}
        log_rows = {name: mine[0] for name, mine in rows.items()}
        slopes = {
            name: float(profile["level"]) - rows[name][1] / 2
            for name, profile in self.profiles.items()
            if "sensitivity" in profile
        }
        part = {"across": 1.0, "half": 0.5}.get(sensitivity, 0.0)
        fits = {n: Fit.loose(*p["shape"].tolist()) for n, p in self.profiles.items()}
        curves = {name: self._curve(name, log_rows[name], fits[name]) for name in rows}
        steps = self._steps(curves, slopes, part)
        for _ in range(_ROUNDS):
            fitting = self._fitting(steps, log_rows)
            changed = [name for name, fit in fitting.items() if not fit.same(fits[name])]
            fits = fitting
            if not changed:
                break
            curves |= {name: self._curve(name, log_rows[name], fits[name]) for name in changed}
            steps = self._steps(curves, slopes, part)
        else:  # a rate that codes cannot have: rather a lower one than weights that are cut off
            fits = self._fitting(steps, log_rows)
            curves = {name: self._curve(name, log_rows[name], fits[name]) for name in rows}
            reached = _average(curves, steps)
            if reached < 0.98 * self.options.rate:
                logger.warning(
                    "ecsq: codes of at most %d do not hold %g bits for each weight of these "
                    "layers; they hold %.2f.",
                    self.options.max_code,
                    self.options.rate,
                    reached,
                )
        return {
            name: Share(
                steps[name],
                log_rows[name] + fits[name].rows,
                _least(profile["exponent"], fits[name].columns),
                profile.get("sources"),
            )
            for name, profile in self.profiles.items()
        }

    def _curve(self, name: str, log_rows: Tensor, fit: Fit) -> Curve:
        """Return the rate of a layer for every step."""
        profile = self.profiles[name]
        out, inputs = profile["shape"].tolist()
        sketch = Sketch(
            profile["values"], profile["size"], profile["row"], profile["column"], (out, inputs)
        )
        longer = sketch.with_steps(log_rows + fit.rows, fit.columns)
        return Curve(longer, self.options.dead_zone)

    def _steps(
        self, curves: Mapping[str, Curve], slopes: Mapping[str, float], part: float
    ) -> dict[str, float]:
        """Return log2 of the step of each layer; together they have the rate.

        Args:
            curves: The rate of each layer.
            slopes: log2 of the step at which layers have one slope of the loss, but for what they
                have in common. Layers that are absent, such as embeddings, have the equal rate.
            part: How far to go from equal rates, 0, to one slope, 1.
        """
        rate = self.options.rate
        equal = {name: curve.log_step(rate) for name, curve in curves.items()}
        if part == 0.0:
            return equal
        sizes = {name: curve.sketch.weights for name, curve in curves.items()}
        seen = sum(sizes[name] for name in slopes)
        mean = sum((slopes[name] - equal[name]) * sizes[name] for name in slopes) / seen
        steps = dict(equal)
        for name, slope in slopes.items():
            apart = part * (slope - equal[name] - mean)
            steps[name] += min(max(apart, -_LAYER_SPREAD), _LAYER_SPREAD)

        def average(shift: float) -> float:
            return _average(curves, {name: step + shift for name, step in steps.items()})

        shift = bisected(average, rate, -4.0, 4.0)
        return {name: step + shift for name, step in steps.items()}

    def _fitting(
        self, steps: Mapping[str, float], log_rows: Mapping[str, Tensor]
    ) -> dict[str, Fit]:
        """Return how much longer steps must be so that no code is beyond the largest.

        A column with huge inputs has a short step, and would have such codes. Columns that have one
        source have one exponent.

        Args:
            steps: log2 of the step of each layer.
            log_rows: (out,) log2 of the step of each row, of each layer.
        """
        fits = {
            name: self._fit(profile, steps[name] + log_rows[name])
            for name, profile in self.profiles.items()
        }
        sources = {n: p["sources"] for n, p in self.profiles.items() if "sources" in p}
        if not sources:
            return fits
        most = torch.zeros(1 + max(int(source.max()) for source in sources.values()))
        for name, source in sources.items():
            most.scatter_reduce_(0, source, fits[name].columns, "amax")
        alike = {name: Fit(fits[name].rows, most[source]) for name, source in sources.items()}
        return fits | alike

    def _fit(self, profile: Profile, log_rows: Tensor) -> Fit:
        """Return how much longer the steps of a layer must be.

        Args:
            profile: Of the layer.
            log_rows: (out,) log2 of the whole step of each row.
        """
        out, inputs = profile["shape"].tolist()
        bound = math.log2(self.options.max_code)
        if self.options.max_code < _ROOMY:
            # codes are short: most weights count, not the largest
            excess = profile["typical"].log2() - bound - float(log_rows.mean())
            columns = excess.ceil().clamp(min=0.0, max=100.0) * self.options.columns
            return Fit(torch.zeros(out), columns)
        row = profile["large_row"].long()
        column = profile["large_column"].long()
        excess = profile["large"] + math.log2(_MARGIN) - bound - log_rows[row]
        # what is not listed is smaller than all that is, and must fit as well
        shared = max(0.0, math.ceil(float(excess.min()))) if len(excess) < out * inputs else 0.0
        fit = Fit.around(excess - shared, row, column, (out, inputs), columns=self.options.columns)
        return Fit(fit.rows + shared, fit.columns)


def _average(curves: Mapping[str, Curve], steps: Mapping[str, float]) -> float:
    """Return the bits for each weight of layers together.

    Args:
        curves: The rate of each layer.
        steps: log2 of the step of each.
    """
    sizes = {name: curve.sketch.weights for name, curve in curves.items()}
    bits = sum(sizes[name] * curve.rate(steps[name]) for name, curve in curves.items())
    return bits / sum(sizes.values())


@dataclasses.dataclass(frozen=True)
class Fit:
    """By how many octaves the steps of some rows and columns are longer, so that codes fit.

    Args:
        rows: (out,) float32, 0 or more.
        columns: (in,) float32, integers of 0 or more.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def loose(cls, rows: int, columns: int) -> Fit:
        """Return the fit of codes that fit as they are."""
        return cls(torch.zeros(rows), torch.zeros(columns))

    def same(self, other: Fit) -> bool:
        """Return whether another fit is this one."""
        return torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)

    @classmethod
    def around(
        cls,
        excess: Tensor,
        row: Tensor,
        column: Tensor,
        shape: tuple[int, int],
        *,
        columns: bool = True,
    ) -> Fit:
        """Return the fit in which some weights no longer exceed the largest code.

        An octave costs a row, or a column, four times its part of the error. So a weight far beyond
        all others is fitted by its row and its column together.

        Args:
            excess: (n,) by how many octaves each weight exceeds the largest code.
            row: (n,) int64, where each is.
            column: (n,) int64, likewise.
            shape: (out, in) of the layer.
            columns: Whether columns may have steps of their own.
        """
        over = excess > 0
        rest = excess[over].numpy().copy()
        place = list(zip(row[over].tolist(), column[over].tolist(), strict=True))
        by_row = row[over].numpy()
        by_column = column[over].numpy()
        longer_rows = np.zeros(shape[0], dtype=np.float32)
        longer_columns = np.zeros(shape[1], dtype=np.float32)
        while len(rest) and rest.max() > 0:
            i, j = place[int(rest.argmax())]
            row_costs = 4.0 ** longer_rows[i] / shape[0]
            column_costs = 4.0 ** longer_columns[j] / shape[1]
            if columns and column_costs <= row_costs:
                longer_columns[j] += 1
                rest[by_column == j] -= 1
            else:
                longer_rows[i] += 1
                rest[by_row == i] -= 1
        return cls(torch.from_numpy(longer_rows), torch.from_numpy(longer_columns))


def _least(exponent: Tensor, longer: Tensor) -> Tensor:
    """Return the least exponents of columns, (in,) int8: -128 where a column is as long as it was.

    Args:
        exponent: (in,) int8, before.
        longer: (in,) by how many octaves longer.
    """
    least = (exponent + longer).clamp(-126, 126).to(torch.int8)
    return least.masked_fill_(longer == 0, -128)


def _log_rows(profile: Profile, sensitivity: str) -> tuple[Tensor, float]:
    """Return log2 of the step of each row, (out,), and log2 of the layer's sensitivity.

    Args:
        profile: Of the layer.
        sensitivity: One of `_CANDIDATES`.
    """
    if sensitivity == "none" or "sensitivity" not in profile:
        return torch.zeros(int(profile["shape"][0])), 0.0
    logs = shrunk(profile["sensitivity"])
    mean = logs.mean()
    return (mean - logs).clamp(-_SPREAD, _SPREAD) / 2, float(mean)


def shrunk(samples: Tensor) -> Tensor:
    """Return log2 of means of samples, moved towards their common mean by their sampling error.

    Args:
        samples: (samples, n), positive.

    Returns:
        (n,).

    Source: James & Stein 1961, in the form of Efron & Morris 1975.
    """
    mean = samples.mean(0)
    mean = mean.clamp(min=float(mean.mean()) * 2**-20 + 1e-30)
    logs = mean.log2()
    if len(samples) < 2:
        return logs
    relative = (samples / mean).var(0) / len(samples)
    error = relative / math.log(2) ** 2
    spread = (logs.var() - error.mean()).clamp(min=0.0)
    trust = spread / (spread + error).clamp(min=1e-12)
    return logs.mean() + trust * (logs - logs.mean())


def _nearest(grid: DualScaleGrid, weight: Tensor, dead_zone: float) -> Tensor:
    """Return a weight (out, in) rounded to a grid with a dead zone, with no corrections."""
    steps = grid.scale.float() * torch.exp2(grid.exponent.float())
    low = -(2 ** (grid.bits - 1))
    codes = rounded(weight.float() / steps, dead_zone).clamp_(low, -low - 1)
    return grid.dequantize(codes.to(torch.int16))


@dataclasses.dataclass(frozen=True)
class _WithDeadZone:
    """Rounds to a grid with a dead zone, for a sweep.

    Args:
        grid: The grid.
        dead_zone: See `rounding.rounded`.
    """

    grid: DualScaleGrid
    dead_zone: float

    def rounder(self, columns: Tensor) -> AffineRounder:
        """Return what rounds one column, as `Grid.rounder` does."""
        return dataclasses.replace(self.grid.rounder(columns), dead_zone=self.dead_zone)


def _refitted(grid: DualScaleGrid, codes: Tensor, weight: Tensor, gram: Tensor) -> DualScaleGrid:
    """Return the grid whose row scales give the least output error with the codes, and its width.

    The best scale of a row is `w H z / z H z`.

    Args:
        grid: The grid of the codes.
        codes: (out, in) int16.
        weight: (out, in), before quantization.
        gram: (in, in), of the layer's inputs.
    """
    size = int(codes.abs().max())
    bits = min(8, max(2, size.bit_length() + 1))
    if bits > 2 and int(codes.max()) < 2 ** (bits - 2) and int(codes.min()) >= -(2 ** (bits - 2)):
        bits -= 1  # the lowest code has no positive twin
    z = codes.float() * torch.exp2(grid.exponent.float())  # (out, in)
    projected = z @ gram
    over = torch.linalg.vecdot(projected, z)
    ratio = torch.linalg.vecdot(projected, weight.float()) / over.clamp(min=1e-30)
    before = grid.scale[:, 0].float()
    least, most = DualScaleGrid.scale_range(grid.dtype, bits, grid.exponent)
    fine = (over > 0) & (ratio > before / 2) & (ratio < before * 2)
    scale = torch.where(fine, ratio, before).clamp(least, most)
    return DualScaleGrid(bits, scale.to(grid.dtype)[:, None], grid.exponent)
