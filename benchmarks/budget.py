"""A budget in, a recipe out: the search against the best fixed-width method in the same bytes.

    python benchmarks/budget.py tiny-llama builtin builtin --samples 16
    python benchmarks/budget.py tiny-llama builtin builtin --samples 16 --for transformers
    python benchmarks/budget.py tiny-vit builtin builtin --samples 256 --metric fidelity

For each budget the search gives a recipe. The comparators are single methods of fixed widths, made
in no more than the bytes that the search's result takes: the widest `gptq`, and a
`mixed_precision` of that size. Of these the one of the lower loss counts, and all models are
measured on the same windows of the evaluation text. The interval of the difference is over
windows, pair by pair. `--output FILE` keeps the rows, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from setting import Rows, evaluation, opened, parser
from torch import Tensor

from optimum_order import JointCompressor, estimate
from optimum_order.artifact import manifest
from optimum_order.estimate.options import Demand, Sizes
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.models.units import find_units
from optimum_order.search.menu import Candidate, Menu

BUDGETS = ("2.25 bits", "2.5 bits", "3 bits", "3.5 bits", "4.25 bits", "5 bits")


def main() -> None:
    """Fill the table, a budget at a time."""
    args = _arguments()
    rows = Rows(args.output)
    compressor, text = opened(args), evaluation(args)
    original = compressor.evaluate(text, args.metric, progress=False).performances
    for budget in args.budgets or BUDGETS:
        if budget not in rows:
            rows[budget] = _row(compressor, budget, text, args, original)
        _show(budget, rows[budget])


def _row(
    compressor: JointCompressor,
    budget: str,
    text: Any,
    args: argparse.Namespace,
    original: Tensor,
) -> dict[str, Any]:
    """Return the search's result, and the best comparator in the same bytes."""
    engine, metric = args.engine, args.metric
    begin = time.perf_counter()
    selection = compressor.search(budget, engine=engine, progress=False)
    seconds = time.perf_counter() - begin
    ours = _measured(selection.model, text, metric)
    bits = selection.rows[0].bits
    others = {}
    for candidate in _comparators(compressor, bits, engine):
        compressed = compressor.compress(candidate.order, progress=False)
        others[str(candidate.order)] = (
            _measured(compressed, text, metric),
            _bits(compressed, candidate.format, engine),
        )
    row = {
        "ours": str(selection.order),
        "format": selection.format,
        "bytes": selection.rows[0].bytes,
        "bits": bits,
        "loss": _mean(original - ours),
        "seconds": seconds,
        "selection": selection.as_dict(),
    }
    if others:
        best = max(others, key=lambda order: _mean(others[order][0]))
        gap = difference_over_draws((ours - others[best][0])[None])
        row |= {
            "best": best,
            "best_bits": others[best][1],
            "best_loss": _mean(original - others[best][0]),
            "gain": gap.mean,
            "low": gap.low,
            "high": gap.high,
        }
    return row


def _comparators(compressor: JointCompressor, bits: float, engine: str | None) -> list[Candidate]:
    """Return the widest `gptq` and the largest `mixed_precision` that are no larger."""
    empty = estimate.empty(compressor.source)
    format = "auto" if engine else "compressed-tensors"
    sizes = Sizes(empty, find_units(empty), {}, Demand(format, engine))
    fitting = [c for c in Menu(sizes).within(bits) if c.is_single]
    chosen = []
    for name in ("gptq", "mixed_precision"):
        same = [candidate for candidate in fitting if candidate.method == name]
        if same:
            chosen.append(max(same, key=lambda candidate: candidate.bits))
    return chosen


def _measured(compressed: Any, text: Any, metric: str) -> Tensor:
    measured = compressed.evaluate(text, metric, format="dense", progress=False)
    performances: Tensor = measured.performances
    return performances


def _bits(compressed: Any, format: str, engine: str | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out", format, engine=engine)
        return float(manifest.load(Path(folder) / "out")["bytes"]["per_weight_bits"])


def _mean(values: Tensor) -> float:
    return float(torch.as_tensor(values).mean())


def _show(budget: str, row: dict[str, Any]) -> None:
    ours = f"{row['ours']} ({row['format']}, {row['bits']:.3f} bits, +{row['loss']:.4f})"
    if "best" not in row:
        print(f"{budget:9} {ours}; no fixed-width method is as small", flush=True)
        return
    best = f"{row['best']} ({row['best_bits']:.3f} bits, +{row['best_loss']:.4f})"
    gain = f"{row['gain']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
    print(f"{budget:9} {ours} | {best} | {gain}, {row['seconds']:.0f} s", flush=True)


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, samples=16)
    arguments.add_argument("--for", dest="engine")
    arguments.add_argument("--metric", default="auto")
    arguments.add_argument("--budgets", nargs="*")
    arguments.add_argument("--output")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
