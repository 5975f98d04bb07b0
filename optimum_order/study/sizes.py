"""Quality against bytes: the smallest models, the Pareto front, and whether combining pays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from optimum_order import formats
from optimum_order.study.runs import Runs
from optimum_order.study.trials import ORIGINAL

FAMILIES = ("stock", "any")
"""Formats that stock transformers reads, and all formats."""

_Size = TypeVar("_Size", int, float)


def smallest(sizes: Mapping[str, int] | None, family: str) -> int | None:
    """Return the bytes of a model in the smallest format of a family.

    Args:
        sizes: Bytes by format, if measured.
        family: "stock" or "any".
    """
    available = formats.available()
    allowed = [
        size
        for name, size in (sizes or {}).items()
        if family == "any" or name not in available or available[name].stock
    ]
    return min(allowed, default=None)


def points(
    runs: Runs, orders: Iterable[Mapping[str, Any]], family: str
) -> dict[str, tuple[int, float]]:
    """Return (bytes, M) of each order that has both, and of the original.

    Args:
        runs: The finished trials.
        orders: The figures of each order.
        family: "stock" or "any".
    """
    pairs = {
        entry["order"]: (smallest(entry["bytes"], family), entry["performance"]) for entry in orders
    }
    original = runs.rows.get((ORIGINAL, 0), {}).get("bytes")
    pairs[ORIGINAL] = (smallest(original, family), runs.overall(ORIGINAL))
    return {
        name: (size, mean)
        for name, (size, mean) in pairs.items()
        if size is not None and mean is not None
    }


def front(points: Mapping[str, tuple[_Size, float]]) -> list[str]:
    """Return the models that no other beats in size or M without losing in the other.

    Args:
        points: (bytes, M) by model.

    Returns:
        Their names, smallest first.
    """
    names: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not names or points[name][1] > points[names[-1]][1]:
            names.append(name)
    return names


def combining(runs: Runs, orders: Sequence[Mapping[str, Any]], family: str) -> dict[str, Any]:
    """Return whether pruning and quantizing together beats either alone at equal bytes.

    A joint model is compared with the straight line between the two nearest of the best models
    that were only pruned or only quantized: the loss per byte saved on the way from one to the
    other.

    Args:
        runs: The finished trials.
        orders: The figures of each order.
        family: "stock" or "any".
    """
    kinds = {entry["order"]: entry["kind"] for entry in orders} | {ORIGINAL: "original"}
    models = points(runs, orders, family)
    joint = {name for name in models if kinds[name] == "joint"}
    alone = front({name: point for name, point in models.items() if name not in joint})
    sizes = [models[name][0] for name in alone]
    gains: list[dict[str, Any]] = []
    for name, (size, _) in models.items():
        if name not in joint or not alone or not sizes[0] <= size <= sizes[-1]:
            continue
        above = next(i for i, other in enumerate(sizes) if other >= size)
        below = above if sizes[above] == size else above - 1
        part = 0.0 if above == below else (size - sizes[below]) / (sizes[above] - sizes[below])
        line: dict[str, float] = defaultdict(float, {name: 1.0})
        line[alone[below]] -= 1 - part
        line[alone[above]] -= part
        gain = runs.contrast(line)
        if gain:
            neighbors = sorted({alone[below], alone[above]})
            gains.append({"order": name, "bytes": size, "alone": neighbors, "gain": gain})
    gains.sort(key=lambda entry: -entry["gain"]["mean"])
    whole = front(models)
    return {
        "joint": len(joint),
        "comparable": len(gains),
        "better": sum(entry["gain"]["mean"] > 0 for entry in gains),
        "decisively_better": sum(entry["gain"]["low"] > 0 for entry in gains),
        "decisively_worse": sum(entry["gain"]["high"] < 0 for entry in gains),
        "best": gains[0] if gains else None,
        "on_front": sum(name in joint for name in whole),
        "front": whole,
    }
