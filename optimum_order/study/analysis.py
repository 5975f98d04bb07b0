"""What the trials of a study say: every figure of its report, from its rows alone.

With P the first stage of a pair and Q the second, where one prunes and the other quantises P is the one that prunes:

    A(Q -> P) = M(P after Q) - M(Q after P)      > 0 where quantising first is better
    G(P, Q)   = M(P alone) - M(Q alone)          > 0 where Q is the stronger of the two
    x         = C*_P - C*_Q                      > 0 where P is, in units of the reference quantiser

The Progressive Intensity Hypothesis says "weaker first", so that A(Q -> P) has the sign of x. C* falls as M rises, so
that is the sign of -G too, which is known also where C* is a bound only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_order import formats
from optimum_order.backends import Backend
from optimum_order.engine.recipe import method
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.order import Order, Stage
from optimum_order.study.advantage import Ratio, compression_equivalent_ratio, spearman
from optimum_order.study.study import ORIGINAL, REFERENCE, REFERENCE_BITS, Trials, draws_matter

CONFIDENCE = 0.95

_MEASURES = {
    "perplexity": ("minus log-perplexity", "log-perplexity", "{} in log-perplexity", 1),
    "accuracy": ("accuracy in %", "points of accuracy", "{} points of accuracy", 100),
    "fidelity": (
        "minus KL to the original",
        "nats of KL to the original",
        "{} nats of KL to the original",
        1,
    ),
}
_RULES = ("prune_first", "weaker_first", "layer_errors")
_FEW = 6
"""Pairs below which a rank correlation has no interval."""
_INDEPENDENT, _WEAK = (
    0.05,
    0.2,
)  # mean correlations below which errors are called nearly and fairly independent


def summarize(trials: Trials) -> dict[str, Any]:
    """Everything a report says, ready for JSON. A study that is not finished gives what its trials allow.

    Args:
        trials: Of a study.
    """
    runs = _Runs(trials)
    planned, done = trials.planned(), trials.done()
    orders = _orders(runs)
    pairs = _pairs(runs, trials.rows("pairs"))
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for pair in pairs:
        first, second = pair["methods"]
        groups[first, second, pair["simulated"]].append(pair)
    groups = {key: groups[key] for key in sorted(groups)}
    original = runs.rows.get((ORIGINAL, 0), {})
    return {
        "settings": {"calibration": None}
        | trials.settings
        | {"layers": len(trials.settings.get("layers", ()))},
        "measure": _measure(trials.settings.get("metric", "M")),
        "confidence": CONFIDENCE,
        "draws": sorted({draw for order, draw in done if order != ORIGINAL}),
        "trials": {
            "done": len(done - {(ORIGINAL, 0)}),
            "planned": len({*planned, *done} - {(ORIGINAL, 0)}) if planned else None,
            "missing": [
                {"order": order, "draw": draw}
                for order, draw in planned
                if (order, draw) not in done
            ],
            "failed": [
                {"order": order, "draw": draw, "error": row.get("error", "it has no performance")}
                for (order, draw), row in runs.rows.items()
                if row["performance"] is None
            ],
        },
        "original": {key: original.get(key) for key in ("value", "performance", "bytes")},
        "orders": orders,
        "reference": {
            "method": REFERENCE,
            "performance": {str(bits): m for bits, m in _curve(runs).items()},
        },
        "pairs": pairs,
        "methods": [
            {"methods": key[:2], "simulated": key[2], **_statistics(group)}
            for key, group in groups.items()
        ],
        "all": _statistics(pairs),
        "combining": {family: _combining(runs, orders, family) for family in ("stock", "any")},
        "correlation": _correlation(row.get("correlation") for row in runs.rows.values()),
        "rankings": _rankings(runs),
    }


def _measure(metric: str) -> dict[str, Any]:
    """How to speak of M and of differences in it, and what to multiply both by."""
    performance, difference, say, factor = _MEASURES.get(
        metric, (f"M of {metric}", f"M of {metric}", "{} in M", 1)
    )
    return {
        "metric": metric,
        "performance": performance,
        "difference": difference,
        "say": say,
        "factor": factor,
    }


class _Runs:
    """The trials by order and draw; one that no calibration touches counts for every draw."""

    def __init__(self, trials: Trials):
        self.rows = trials.rows("trials")
        self.names = list(dict.fromkeys(order for order, _ in self.rows if order != ORIGINAL))
        self._draws = {
            name: {draw for order, draw in self.rows if order == name and self._good(order, draw)}
            for name in [*self.names, ORIGINAL]
        }

    def _good(self, order: str, draw: int) -> bool:
        return self.rows[order, draw]["performance"] is not None

    @staticmethod
    @functools.cache
    def _fixed(order: str) -> bool:
        return order == ORIGINAL or not draws_matter(Order.parse(order))

    def draws(self, *orders: str) -> list[int]:
        """Draws in which all of these have a performance; 0 alone where no calibration touches any of them."""
        if any(not self._draws.get(order) for order in orders):
            return []
        calibrated = [self._draws[order] for order in orders if not self._fixed(order)]
        return sorted(set.intersection(*calibrated)) if calibrated else [0]

    def row(self, order: str, draw: int) -> dict[str, Any]:
        return self.rows[order, 0 if self._fixed(order) else draw]

    def every(self, order: str) -> list[dict[str, Any]]:
        """The rows of all its draws that have a performance."""
        return [self.rows[order, draw] for draw in sorted(self._draws.get(order, ()))]

    def mean(self, order: str, draws: Sequence[int] | None = None) -> float | None:
        """M over these draws, or over all."""
        rows = self.every(order) if draws is None else [self.row(order, draw) for draw in draws]
        return statistics.fmean(row["performance"] for row in rows) if rows else None

    def contrast(self, weights: Mapping[str, float]) -> dict[str, Any] | None:
        """The weighted sum of these orders' M with its interval, or None where they have no draw in common."""
        draws = self.draws(*weights)
        if not draws:
            return None

        def one(draw: int) -> Tensor:
            rows = {order: self.row(order, draw)["performances"] for order in weights}
            scores = {order: torch.tensor(row, dtype=torch.float64) for order, row in rows.items()}
            return sum(
                (weight * scores[order] for order, weight in weights.items()), torch.zeros(())
            )

        found = difference_over_draws(
            torch.stack([one(draw) for draw in draws]), confidence=CONFIDENCE
        )
        return found.as_dict() | {"draws": draws, "calibrated": not all(map(self._fixed, weights))}


def _role(stage: Stage) -> str:
    """ "prune" or "quantize"."""
    chosen = method(stage)
    return chosen.kind if isinstance(chosen, Backend) else "quantize"


def _label(stage: Stage) -> str:
    """The method with its options, less its main knob and where it leaves the grid: what a study varies."""
    knob = dataclasses.fields(method(stage).Options)[0].name
    kept = {key: value for key, value in stage.options if key not in (knob, "off_grid")}
    return str(Stage(stage.method, **kept))


def _simulated(order: Order) -> bool:
    return any(dict(stage.options).get("off_grid") for stage in order)


# --- orders ----------------------------------------------------------------------------------------------------------


def _orders(runs: _Runs) -> list[dict[str, Any]]:
    found = []
    for name in runs.names:
        order, rows = Order.parse(name), runs.every(name)
        roles = {_role(stage) for stage in order}
        entry: dict[str, Any] = {
            "order": name,
            "stages": [str(stage) for stage in order],
            "kind": "joint" if len(roles) > 1 else roles.pop(),
            "simulated": _simulated(order),
            "draws": runs.draws(name),
            "bytes": next((row["bytes"] for row in rows if row.get("bytes")), None),
        }
        for key in ("value", "performance", "sparsity", "bits"):
            known = [row[key] for row in rows if row.get(key) is not None]
            entry[key] = statistics.fmean(known) if known else None
        for key in ("seconds", "cpu_seconds"):
            known = [sum(row[key]) for row in rows if row.get(key)]
            entry[key] = statistics.fmean(known) if known else None
        found.append(entry)
    fronts = {family: _front(_points(runs, found, family)) for family in ("stock", "any")}
    return [
        entry | {"pareto": {key: entry["order"] in front for key, front in fronts.items()}}
        for entry in found
    ]


def _size(bytes_: Mapping[str, int] | None, family: str) -> int | None:
    """Bytes in the smallest format, of all or of those that stock transformers reads."""
    known = formats.available()
    sizes = [
        size
        for key, size in (bytes_ or {}).items()
        if family == "any" or key not in known or known[key].stock
    ]
    return min(sizes, default=None)


def _points(
    runs: _Runs, orders: Iterable[Mapping[str, Any]], family: str
) -> dict[str, tuple[int, float]]:
    """(bytes, M) of each order that has both, and of the original."""
    found = {
        entry["order"]: (_size(entry["bytes"], family), entry["performance"]) for entry in orders
    }
    found[ORIGINAL] = (
        _size(runs.rows.get((ORIGINAL, 0), {}).get("bytes"), family),
        runs.mean(ORIGINAL),
    )
    return {
        name: (size, m) for name, (size, m) in found.items() if size is not None and m is not None
    }


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats in one of size and M without losing in the other, smallest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def _combining(runs: _Runs, orders: Sequence[Mapping[str, Any]], family: str) -> dict[str, Any]:
    """Whether pruning and quantising together beats either alone at the same number of bytes.

    A joint model is compared with the straight line between the two nearest of the best models that were only pruned
    or only quantised: what is lost per byte saved on the way from one to the other.
    """
    kinds = {entry["order"]: entry["kind"] for entry in orders} | {ORIGINAL: "original"}
    points = _points(runs, orders, family)
    front = _front({name: point for name, point in points.items() if kinds[name] != "joint"})
    sizes = [points[name][0] for name in front]
    gains: list[dict[str, Any]] = []
    for name, (size, _) in points.items():
        if kinds[name] != "joint" or not front or not sizes[0] <= size <= sizes[-1]:
            continue
        above = next(i for i, other in enumerate(sizes) if other >= size)
        below = above if sizes[above] == size else above - 1
        part = 0.0 if above == below else (size - sizes[below]) / (sizes[above] - sizes[below])
        line: dict[str, float] = defaultdict(float, {name: 1.0})
        line[front[below]] -= 1 - part
        line[front[above]] -= part
        gain = runs.contrast(line)
        if gain:
            gains.append(
                {
                    "order": name,
                    "bytes": size,
                    "alone": sorted({front[below], front[above]}),
                    "gain": gain,
                }
            )
    gains.sort(key=lambda each: -each["gain"]["mean"])
    return {
        "joint": sum(kinds[name] == "joint" for name in points),
        "comparable": len(gains),
        "better": sum(each["gain"]["mean"] > 0 for each in gains),
        "decisively_better": sum(each["gain"]["low"] > 0 for each in gains),
        "decisively_worse": sum(each["gain"]["high"] < 0 for each in gains),
        "best": gains[0] if gains else None,
        "on_front": sum(kinds[name] == "joint" for name in _front(points)),
        "front": _front(points),
    }


# --- pairs -----------------------------------------------------------------------------------------------------------


def _curve(runs: _Runs) -> dict[float, float]:
    """M of the reference quantiser alone, by its bits."""
    found: dict[float, float | None] = {
        bits: runs.mean(str(method(Stage(REFERENCE, bits)).stage)) for bits in REFERENCE_BITS
    }
    return {bits: m for bits, m in found.items() if m is not None}


def _pairs(
    runs: _Runs, splits: Mapping[tuple[str, int], Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    found: dict[frozenset[str], dict[str, Any]] = {}
    curve = _curve(runs)
    for name in runs.names:
        order = Order.parse(name)
        key = frozenset(map(str, order))
        if len(order) != 2 or len(key) != 2 or key in found:
            continue
        first, second = order
        joint = _role(first) != _role(second)
        if joint and _role(first) == "quantize":
            first, second = second, first
        forward, reverse = str(Order((first, second))), str(Order((second, first)))
        advantage = runs.contrast({reverse: 1, forward: -1})
        if advantage is None:
            continue
        ratios = [_ratio(runs.mean(str(stage)), curve) for stage in (first, second)]
        mean = advantage["mean"]
        found[key] = {
            "first": str(first),
            "second": str(second),
            "methods": [_label(first), _label(second)],
            "prunes_and_quantizes": joint,
            "simulated": _simulated(order),
            "orders": [forward, reverse],
            "performance": [runs.mean(each, advantage["draws"]) for each in (forward, reverse)],
            "advantage": advantage,
            "better": reverse if mean > 0 else forward if mean < 0 else None,
            "gap": runs.contrast({str(first): 1, str(second): -1}),
            "equivalent": [ratio and dataclasses.asdict(ratio) for ratio in ratios],
            "intensity": dataclasses.asdict(ratios[0] - ratios[1])
            if ratios[0] and ratios[1]
            else None,
            "split": _split(splits, forward, reverse),
        }
    return list(found.values())


def _ratio(performance: float | None, curve: Mapping[float, float]) -> Ratio | None:
    return (
        compression_equivalent_ratio(performance, curve)
        if performance is not None and curve
        else None
    )


def _split(
    splits: Mapping[tuple[str, int], Mapping[str, Sequence[float]]], forward: str, reverse: str
) -> dict[str, Any] | None:
    """A(Q -> P) in layers' output errors: positive where `reverse`, which has Q first, has less error."""
    rows = []
    for sign, key in ((1, f"{reverse} | {forward}"), (-1, f"{forward} | {reverse}")):
        rows += [(sign, layers) for (orders, _), layers in splits.items() if orders == key]
    if not rows:
        return None
    parts = ("whole", "owner", "interference")
    layers = {
        layer: {
            part: statistics.fmean(sign * row[layer][i] for sign, row in rows)
            for i, part in enumerate(parts)
        }
        for layer in rows[0][1]
    }
    return {part: sum(each[part] for each in layers.values()) for part in parts} | {
        "layers": layers
    }


def _statistics(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a number of pairs have in common."""
    decisive = [pair for pair in pairs if pair["advantage"]["decisive"]]
    size = [abs(pair["advantage"]["mean"]) for pair in pairs]
    mean = statistics.fmean(size) if size else None
    known = [
        pair for pair in pairs if pair["intensity"] and pair["intensity"]["bound"] != "unknown"
    ]
    splits = [pair["split"] for pair in pairs if pair["split"]]
    owner, interference = (
        sum(abs(split[part]) for split in splits) for part in ("owner", "interference")
    )
    return {
        "pairs": len(pairs),
        "decisive": len(decisive),
        "quantize_first": sum(pair["advantage"]["mean"] > 0 for pair in decisive),
        "mean_absolute_advantage": mean,
        "largest_advantage": max(size, default=None),
        "samples_only": sum(
            p["advantage"]["calibrated"] and p["advantage"]["over"] == "samples" for p in pairs
        ),
        "rules": {rule: _judge(rule, pairs, mean) for rule in _RULES},
        "spearman": _correlated(known),
        "split": {
            "pairs": len(splits),
            "owner": owner,
            "interference": interference,
            "owner_share": owner / (owner + interference) if owner + interference else None,
        },
    }


def _correlated(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spearman's rho of A(Q -> P) against x; a bound stands where it lies."""
    x, y = (
        [pair["intensity"]["value"] for pair in pairs],
        [pair["advantage"]["mean"] for pair in pairs],
    )
    found = spearman(x, y, confidence=CONFIDENCE)
    if found.rho is not None and len(pairs) < _FEW:  # all resamples of a few points look alike
        found = dataclasses.replace(
            found, low=None, high=None, reason=f"there are only {len(pairs)} pairs"
        )
    bounds = sum(pair["intensity"]["bound"] != "exact" for pair in pairs)
    return dataclasses.asdict(found) | {"pairs": len(pairs), "bounds": bounds}


def _predicted(rule: str, pair: Mapping[str, Any]) -> float | None:
    """The sign that a rule expects of A(Q -> P), 0 where it sees no difference, or None where it says nothing."""
    if rule == "prune_first":
        return -1.0 if pair["prunes_and_quantizes"] else None
    if rule == "weaker_first":
        return None if pair["gap"] is None else float(-np.sign(pair["gap"]["mean"]))
    return None if pair["split"] is None else float(np.sign(pair["split"]["whole"]))


def _judge(rule: str, pairs: Sequence[Mapping[str, Any]], scale: float | None) -> dict[str, Any]:
    """How good a rule's advice is; where it sees no difference it is right half of the time and loses half."""
    said = [
        (pair["advantage"], sign) for pair in pairs if (sign := _predicted(rule, pair)) is not None
    ]
    right = [(1 + np.sign(found["mean"]) * sign) / 2 for found, sign in said if found["decisive"]]
    lost = [abs(found["mean"]) * (1 - np.sign(found["mean"]) * sign) / 2 for found, sign in said]
    regret = statistics.fmean(lost) if lost else None
    return {
        "pairs": len(said),
        "decisive": len(right),
        "right": float(statistics.fmean(right)) if right else None,
        "regret": None if regret is None else float(regret),
        "relative_regret": float(regret / scale) if regret is not None and scale else None,
    }


# --- independence of layers, and orders of three stages or more ------------------------------------------------------


def _correlation(
    matrices: Iterable[Sequence[Sequence[float | None]] | None],
) -> dict[str, Any] | None:
    """How the units' output errors correlate, on the average over orders."""
    found = [np.array(matrix, dtype=float) for matrix in matrices if matrix]
    found = [matrix for matrix in found if matrix.shape == found[0].shape and len(matrix) > 1]
    if not found:
        return None
    stack = np.stack(found)
    others = ~np.eye(stack.shape[1], dtype=bool)
    known = np.isfinite(stack).any(0)
    mean = np.where(known, np.nanmean(np.where(known, stack, 0), 0), np.nan)
    off = mean[others & known]
    if not len(off):
        return None
    by_order = [
        float(values[np.isfinite(values)].mean())
        for values in stack[:, others]
        if np.isfinite(values).any()
    ]
    average, units = float(off.mean()), len(mean)
    largest = max(by_order, key=abs)
    size = abs(average)
    word = (
        "nearly independent"
        if size < _INDEPENDENT
        else "weakly dependent"
        if size < _WEAK
        else "not independent"
    )
    return {
        "units": units,
        "orders": len(found),
        "matrix": [[None if math.isnan(value) else float(value) for value in row] for row in mean],
        "mean": average,
        "lowest": float(off.min()),
        "highest": float(off.max()),
        "most_in_one_order": largest,
        # of a sum of so many errors of one size, over what it would be if they were independent
        "inflation": 1 + (units - 1) * average,
        "verdict": word,
    }


def _rankings(runs: _Runs) -> list[dict[str, Any]]:
    """All permutations of three stages or more that were run, from the best, each compared with it."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in runs.names:
        order = Order.parse(name)
        if len(order) > 2 and runs.draws(name):
            groups[tuple(sorted(map(str, order)))].append(name)
    found = []
    for stages, names in groups.items():
        draws = runs.draws(*names)
        if len(names) < 2 or not draws:
            continue
        ranked = sorted(names, key=lambda name: -runs.mean(name, draws))
        found.append(
            {
                "stages": stages,
                "permutations": len(set(itertools.permutations(stages))),
                "draws": draws,
                "ranking": [
                    {
                        "order": name,
                        "performance": runs.mean(name, draws),
                        "difference": runs.contrast({name: 1, ranked[0]: -1})
                        if name != ranked[0]
                        else None,
                    }
                    for name in ranked
                ],
            }
        )
    return found
