"""The summary of a study: every figure of its report, from the rows of its trials alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optimum_order.order import Order
from optimum_order.study import choice
from optimum_order.study.grid import REFERENCE
from optimum_order.study.pairs import (
    Pair,
    describe_pairs,
    find_pairs,
    is_simulated,
    reference_curve,
    role,
)
from optimum_order.study.runs import CONFIDENCE, Runs
from optimum_order.study.sizes import FAMILIES, combining, front, points
from optimum_order.study.trials import ORIGINAL, Trials

_MEASURES = {
    "perplexity": ("minus log-perplexity", "log-perplexity", "{} in log-perplexity", 1),
    "accuracy": ("accuracy in %", "points of accuracy", "{} points of accuracy", 100),
    "fidelity": (
        "minus KL to the original",
        "nats of KL to the original",
        "{} nats of KL to the original",
        1,
    ),
    "embedding": (
        "minus cosine distance to the original",
        "cosine distance to the original",
        "{} in cosine distance to the original",
        1,
    ),
}
_INDEPENDENT = 0.05
_WEAK = 0.2
"""Mean correlations below which errors are called nearly independent, and weakly dependent."""


def summarize(trials: Trials) -> dict[str, Any]:
    """Return everything a report says, ready for JSON, as far as the finished trials allow.

    Args:
        trials: The trials of a study, finished or not.
    """
    runs = Runs(trials)
    orders = _orders(runs)
    pairs = find_pairs(runs, trials.rows("pairs"))
    groups: dict[tuple[str, str, bool], list[Pair]] = defaultdict(list)
    for pair in pairs:
        first, second = pair["methods"]
        groups[first, second, pair["simulated"]].append(pair)
    original = runs.rows.get((ORIGINAL, 0), {})
    settings = trials.settings
    measure = _measure(settings.get("metric", "M"))
    models = choice.models(runs, orders, settings)
    return {
        "settings": {"calibration": None} | settings | {"layers": len(settings.get("layers", ()))},
        "commands": trials.commands(),
        "measure": measure,
        "confidence": CONFIDENCE,
        "draws": sorted({draw for order, draw in runs.rows if order != ORIGINAL}),
        "trials": _progress(trials, runs),
        "original": {key: original.get(key) for key in ("value", "performance", "bytes")},
        "recommendation": choice.recommend(models, measure["metric"], original.get("bytes")),
        "models": models,
        "orders": orders,
        "reference": {
            "method": REFERENCE,
            "performance": {str(bits): m for bits, m in reference_curve(runs).items()},
        },
        "pairs": pairs,
        "methods": [
            {"methods": key[:2], "simulated": key[2], **describe_pairs(groups[key])}
            for key in sorted(groups)
        ],
        "all": describe_pairs(pairs),
        "combining": {family: combining(runs, orders, family) for family in FAMILIES},
        "correlation": _correlation(row.get("correlation") for row in runs.rows.values()),
        "rankings": _rankings(runs),
    }


def _measure(metric: str) -> dict[str, Any]:
    """Return the words for M and for differences in M, and the factor to show both with."""
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


def _progress(trials: Trials, runs: Runs) -> dict[str, Any]:
    """Return how many trials are finished, and which are missing or broke the model."""
    planned = trials.planned()
    done = trials.done()
    return {
        "done": len(done - {(ORIGINAL, 0)}),
        "planned": len({*planned, *done} - {(ORIGINAL, 0)}) if planned else None,
        "missing": [
            {"order": order, "draw": draw} for order, draw in planned if (order, draw) not in done
        ],
        "failed": [
            {"order": order, "draw": draw, "error": row.get("error", "it has no performance")}
            for (order, draw), row in runs.rows.items()
            if row["performance"] is None
        ],
    }


def _orders(runs: Runs) -> list[dict[str, Any]]:
    """Return the figures of each order, means over draws."""
    orders = []
    for name in runs.names:
        order = Order.parse(name)
        rows = runs.finished(name)
        roles = {role(stage) for stage in order} & {"prune", "quantize"}
        entry: dict[str, Any] = {
            "order": name,
            "stages": [str(stage) for stage in order],
            "kind": "joint" if len(roles) > 1 else roles.pop() if roles else "neither",
            "simulated": is_simulated(order),
            "draws": runs.draws(name),
            "bytes": next((row["bytes"] for row in rows if row.get("bytes")), None),
        }
        for key in ("value", "performance", "sparsity", "bits"):
            values = [row[key] for row in rows if row.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
        for key in ("seconds", "cpu_seconds"):
            sums = [sum(row[key]) for row in rows if row.get(key)]
            entry[key] = statistics.fmean(sums) if sums else None
        orders.append(entry)
    fronts = {family: front(points(runs, orders, family)) for family in FAMILIES}
    return [
        entry | {"pareto": {family: entry["order"] in fronts[family] for family in FAMILIES}}
        for entry in orders
    ]


def _correlation(
    matrices: Iterable[Sequence[Sequence[float | None]] | None],
) -> dict[str, Any] | None:
    """Return how the output errors of blocks correlate, on average over orders.

    Args:
        matrices: (blocks, blocks) of each trial, if measured.
    """
    arrays = [np.array(matrix, dtype=float) for matrix in matrices if matrix]
    arrays = [a for a in arrays if a.shape == arrays[0].shape and len(a) > 1]
    if not arrays:
        return None
    stack = np.stack(arrays)
    others = ~np.eye(stack.shape[1], dtype=bool)
    defined = np.isfinite(stack).any(0)
    mean = np.where(defined, np.nanmean(np.where(defined, stack, 0), 0), np.nan)
    off_diagonal = mean[others & defined]
    if not len(off_diagonal):
        return None
    means = [
        float(values[np.isfinite(values)].mean())
        for values in stack[:, others]
        if np.isfinite(values).any()
    ]
    average = float(off_diagonal.mean())
    blocks = len(mean)
    size = abs(average)
    verdict = "not independent"
    if size < _INDEPENDENT:
        verdict = "nearly independent"
    elif size < _WEAK:
        verdict = "weakly dependent"
    return {
        "units": blocks,
        "orders": len(arrays),
        "matrix": [[None if math.isnan(value) else float(value) for value in row] for row in mean],
        "mean": average,
        "lowest": float(off_diagonal.min()),
        "highest": float(off_diagonal.max()),
        "most_in_one_order": max(means, key=abs),
        # of a sum of so many errors of one size, over that of independent errors
        "inflation": 1 + (blocks - 1) * average,
        "verdict": verdict,
    }


def _rankings(runs: Runs) -> list[dict[str, Any]]:
    """Return the permutations of three stages or more, best first, each compared with the best."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in runs.names:
        order = Order.parse(name)
        if len(order) > 2 and runs.draws(name):
            groups[tuple(sorted(map(str, order)))].append(name)
    rankings = []
    for stages, names in groups.items():
        draws = runs.draws(*names)
        if len(names) < 2 or not draws:
            continue
        means = {name: runs.mean(name, draws) for name in names}
        ranked = sorted(names, key=lambda name: -means[name])
        best = ranked[0]
        rankings.append(
            {
                "stages": stages,
                "permutations": len(set(itertools.permutations(stages))),
                "draws": draws,
                "ranking": [
                    {
                        "order": name,
                        "performance": means[name],
                        "difference": None if name == best else runs.contrast({name: 1, best: -1}),
                    }
                    for name in ranked
                ],
            }
        )
    return rankings
