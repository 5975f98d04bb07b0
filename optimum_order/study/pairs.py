"""What both orders of a pair of stages say: advantage, gap, intensity, split, and rules of thumb.

With P the first stage of a pair and Q the second, where one prunes and the other quantizes P is the
stage that prunes:

    A(Q -> P) = M(P after Q) - M(Q after P)      > 0 where quantizing first is better
    G(P, Q)   = M(P alone) - M(Q alone)          > 0 where Q is the stronger of the two
    x         = C*_P - C*_Q                      > 0 where P is, in units of the reference quantizer

The Progressive Intensity Hypothesis says "weaker first", so that A(Q -> P) has the sign of x. C*
falls as M rises, so that is also the sign of -G, which is certain even where C* is only a bound.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optimum_order.engine.recipe import method
from optimum_order.order import Order, Stage
from optimum_order.study.advantage import Ratio, compression_equivalent_ratio, spearman
from optimum_order.study.grid import REFERENCE, REFERENCE_BITS
from optimum_order.study.runs import CONFIDENCE, Runs

RULES = ("prune_first", "weaker_first", "layer_errors")
_ROLES = {"allocate": "quantize", "reshape": "prune"}
"""The role of a kind of method that is neither "prune" nor "quantize" by name."""
_FEW = 6
"""Pairs below which a rank correlation has no interval: all resamples look alike."""

Pair = Mapping[str, Any]
"""Figures of one pair, ready for JSON."""
Splits = Mapping[tuple[str, int], Mapping[str, Sequence[float]]]
"""Rows of the table "pairs"."""


def role(stage: Stage) -> str:
    """Return "prune" or "quantize", or another kind of method."""
    kind = method(stage).kind
    return _ROLES.get(kind, kind)


def is_simulated(order: Order) -> bool:
    """Return whether a stage of an order leaves the grid."""
    return any(dict(stage.options).get("off_grid") for stage in order)


def reference_curve(runs: Runs) -> dict[float, float]:
    """Return M of the reference quantizer alone, by its bits."""
    curve: dict[float, float] = {}
    for bits in REFERENCE_BITS:
        mean = runs.overall(str(method(Stage(REFERENCE, bits)).stage))
        if mean is not None:
            curve[bits] = mean
    return curve


def find_pairs(runs: Runs, splits: Splits) -> list[Pair]:
    """Return the figures of every pair of which both orders were run.

    Args:
        runs: The finished trials.
        splits: Rows of the table "pairs".
    """
    pairs: dict[frozenset[str], Pair] = {}
    curve = reference_curve(runs)
    for name in runs.names:
        order = Order.parse(name)
        key = frozenset(map(str, order))
        if len(order) != 2 or len(key) != 2 or key in pairs:
            continue
        pair = _pair(runs, order, curve)
        if pair is not None:
            pairs[key] = {**pair, "split": _split(splits, *pair["orders"])}
    return list(pairs.values())


def _pair(runs: Runs, order: Order, curve: Mapping[float, float]) -> Pair | None:
    first, second = order
    joint = role(first) != role(second)
    if joint and role(first) == "quantize":
        first, second = second, first
    forward = str(Order((first, second)))
    reverse = str(Order((second, first)))
    advantage = runs.contrast({reverse: 1, forward: -1})
    if advantage is None:
        return None
    mean = advantage["mean"]
    ratios = [_ratio(runs.overall(str(stage)), curve) for stage in (first, second)]
    intensity = ratios[0] - ratios[1] if ratios[0] and ratios[1] else None
    return {
        "first": str(first),
        "second": str(second),
        "methods": [_label(first), _label(second)],
        "prunes_and_quantizes": joint,
        "simulated": is_simulated(order),
        "orders": [forward, reverse],
        "performance": [runs.mean(name, advantage["draws"]) for name in (forward, reverse)],
        "advantage": advantage,
        "better": reverse if mean > 0 else forward if mean < 0 else None,
        "gap": runs.contrast({str(first): 1, str(second): -1}),
        "equivalent": [ratio and dataclasses.asdict(ratio) for ratio in ratios],
        "intensity": intensity and dataclasses.asdict(intensity),
    }


def _label(stage: Stage) -> str:
    """Return the method with the options that a study does not vary."""
    knob = dataclasses.fields(method(stage).Options)[0].name
    others = {key: value for key, value in stage.options if key not in (knob, "off_grid")}
    return str(Stage(stage.method, **others))


def _ratio(performance: float | None, curve: Mapping[float, float]) -> Ratio | None:
    if performance is None or not curve:
        return None
    return compression_equivalent_ratio(performance, curve)


def _split(splits: Splits, forward: str, reverse: str) -> dict[str, Any] | None:
    """Return A(Q -> P) in layers' output errors: positive where `reverse` has less error."""
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
    sums = {part: sum(split[part] for split in layers.values()) for part in parts}
    return sums | {"layers": layers}


def describe_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the figures of a group of pairs: how large advantages are, and how good rules are."""
    decisive = [pair for pair in pairs if pair["advantage"]["decisive"]]
    sizes = [abs(pair["advantage"]["mean"]) for pair in pairs]
    mean = statistics.fmean(sizes) if sizes else None
    splits = [pair["split"] for pair in pairs if pair["split"]]
    owner, interference = (
        sum(abs(split[part]) for split in splits) for part in ("owner", "interference")
    )
    return {
        "pairs": len(pairs),
        "decisive": len(decisive),
        "quantize_first": sum(pair["advantage"]["mean"] > 0 for pair in decisive),
        "mean_absolute_advantage": mean,
        "largest_advantage": max(sizes, default=None),
        "samples_only": sum(
            pair["advantage"]["calibrated"] and pair["advantage"]["over"] == "samples"
            for pair in pairs
        ),
        "rules": {rule: judge(rule, pairs, mean) for rule in RULES},
        "spearman": _correlate(pairs),
        "split": {
            "pairs": len(splits),
            "owner": owner,
            "interference": interference,
            "owner_share": owner / (owner + interference) if owner + interference else None,
        },
    }


def has_intensity(pair: Pair) -> bool:
    """Return whether x, or a bound of x, is certain."""
    return pair["intensity"] is not None and pair["intensity"]["bound"] != "unknown"


def _correlate(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return Spearman's rho of A(Q -> P) against x; a bound counts as its value."""
    pairs = [pair for pair in pairs if has_intensity(pair)]
    x = [pair["intensity"]["value"] for pair in pairs]
    y = [pair["advantage"]["mean"] for pair in pairs]
    correlation = spearman(x, y, confidence=CONFIDENCE)
    if correlation.rho is not None and len(pairs) < _FEW:
        reason = f"there are only {len(pairs)} pairs"
        correlation = dataclasses.replace(correlation, low=None, high=None, reason=reason)
    bounds = sum(pair["intensity"]["bound"] != "exact" for pair in pairs)
    return dataclasses.asdict(correlation) | {"pairs": len(pairs), "bounds": bounds}


def _predict(rule: str, pair: Pair) -> float | None:
    """Return the sign of A(Q -> P) by a rule; 0 for no difference, None if the rule is silent."""
    if rule == "prune_first":
        return -1.0 if pair["prunes_and_quantizes"] else None
    if rule == "weaker_first":
        return None if pair["gap"] is None else float(-np.sign(pair["gap"]["mean"]))
    return None if pair["split"] is None else float(np.sign(pair["split"]["whole"]))


def judge(rule: str, pairs: Sequence[Pair], scale: float | None) -> dict[str, Any]:
    """Return how good the advice of a rule is.

    Where the rule sees no difference, it is right half of the time and loses half.

    Args:
        rule: One of `RULES`.
        pairs: Figures of pairs.
        scale: The mean size of the advantage, or None.
    """
    signs = [(pair["advantage"], _predict(rule, pair)) for pair in pairs]
    advised = [(advantage, sign) for advantage, sign in signs if sign is not None]
    agreement = [np.sign(advantage["mean"]) * sign for advantage, sign in advised]
    right = [
        (1 + same) / 2
        for (advantage, _), same in zip(advised, agreement, strict=True)
        if advantage["decisive"]
    ]
    lost = [
        abs(advantage["mean"]) * (1 - same) / 2
        for (advantage, _), same in zip(advised, agreement, strict=True)
    ]
    regret = float(statistics.fmean(lost)) if lost else None
    return {
        "pairs": len(advised),
        "decisive": len(right),
        "right": float(statistics.fmean(right)) if right else None,
        "regret": regret,
        "relative_regret": regret / scale if regret is not None and scale else None,
    }
