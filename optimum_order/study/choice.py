"""What a study has to say to somebody who wants one of its models: which, and how to make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_order.artifact.card import command
from optimum_order.order import Order
from optimum_order.study.grid import draws_matter
from optimum_order.study.runs import Runs
from optimum_order.study.sizes import FAMILIES, front, points, smallest
from optimum_order.study.trials import ORIGINAL

TOLERANCES = {"perplexity": 0.05, "accuracy": 0.01, "fidelity": 0.05, "embedding": 0.01}
"""The loss in M against the original that is called small: 5 % of perplexity, 1 point of accuracy,
0.05 nats, 0.01 of cosine distance."""

_WORTH = 1.01
"""How many times the smallest file a file may take that stock transformers loads."""


def models(
    runs: Runs, orders: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the models on the fronts by bytes, the smallest first, each with its command.

    Models off the grid are left out, since they cannot be saved as they were measured.

    Args:
        runs: The finished trials.
        orders: The figures of each order.
        settings: Of the study.
    """
    savable = [entry for entry in orders if not entry["simulated"]]
    entries = {entry["order"]: entry for entry in savable}
    original = runs.rows.get((ORIGINAL, 0), {})
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for family in FAMILIES:
        for name in front(points(runs, savable, family)):
            entry = original if name == ORIGINAL else entries[name]
            sizes = entry["bytes"]
            size = smallest(sizes, family)
            assert size is not None
            stock = smallest(sizes, "stock")
            if stock is not None and stock <= _WORTH * size:
                size = stock  # a few bytes are not worth an import
            format = next(key for key, value in sizes.items() if value == size)
            row = rows.setdefault(
                (name, size),
                {
                    "order": name,
                    "format": format,
                    "bytes": size,
                    "families": [],
                    "value": entry.get("value"),
                    "performance": runs.overall(name),
                    "sparsity": entry.get("sparsity"),
                    "bits": entry.get("bits"),
                    "loss": None if name == ORIGINAL else runs.contrast({ORIGINAL: 1, name: -1}),
                    "command": None if name == ORIGINAL else _command(settings, name, format),
                },
            )
            row["families"].append(family)
    return sorted(rows.values(), key=lambda row: row["bytes"])


def recommend(
    candidates: Sequence[Mapping[str, Any]], metric: str, original: Mapping[str, int] | None
) -> dict[str, Any] | None:
    """Return the smallest model whose loss is small, or else the one with the least loss.

    Only formats that stock transformers loads count, and only models smaller than the original.

    Args:
        candidates: From `models`.
        metric: The name of M.
        original: The bytes of the original by format.

    Returns:
        The model, the bytes of the original, the tolerance, and whether the loss is within it; None
        where no model can be recommended.
    """
    tolerance = TOLERANCES.get(metric)
    whole = smallest(original, "stock")
    if tolerance is None or whole is None:
        return None
    smaller = [
        row
        for row in candidates
        if row["loss"] is not None and "stock" in row["families"] and row["bytes"] < whole
    ]
    if not smaller:
        return None
    within = [row for row in smaller if row["loss"]["mean"] <= tolerance]
    chosen = within[0] if within else min(smaller, key=lambda row: row["loss"]["mean"])
    return {
        "model": chosen,
        "original_bytes": whole,
        "tolerance": tolerance,
        "within": bool(within),
    }


def _command(settings: Mapping[str, Any], order: str, format: str) -> str | None:
    """Return the command that makes a model of the study, with draw 0 of the calibration.

    Args:
        settings: Of the study.
        order: The order.
        format: The format.

    Returns:
        The command; None where an earlier version did not store the settings that it needs.
    """
    if "versions" not in settings:
        return None
    calibration = settings["calibration"] if draws_matter(Order.parse(order)) else None
    facts = {
        "base_model": {
            "id": settings["model"],
            "revision": settings["revision"],
            "dtype": settings["dtype"],
            **({"adapter": settings["adapter"]} if settings["adapter"] else {}),
        },
        "order": order,
        "format": format,
        "schedule": "stage",
        "pause": settings.get("pause", "block"),
        "calibration": calibration,
        "seed": calibration and calibration["seed"],
        "sequence_length": calibration and calibration.get("sequence_length"),
        "targets": settings["targets"],
        "ignore": settings["ignore"],
        "metrics": {},
    }
    return command(facts)
