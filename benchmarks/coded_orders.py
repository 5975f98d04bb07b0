"""Which order, if the quantizer codes by entropy? Pruner first, coder first, coder alone.

All three have the bits of the coder alone, to 1 %: what a pruner removes after the coder makes codes
cheaper, so the coder is given more bits. The interval (95 %) is that of the mean gain in
log-perplexity over the coder alone, over the windows of the evaluation text.

    python benchmarks/coded_orders.py tiny-llama builtin builtin
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.evaluation.comparison import difference_over_draws

CLOSE = 0.01
"""Part of the bits by which a model may differ from the one that it is compared with."""


def main() -> None:
    """Compress in each order and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--pruners", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--rates", nargs="*", type=float, default=[3.0, 2.5, 2.0])
    args = parser.parse_args()
    compressor = JointCompressor.from_pretrained(
        args.model, calibration=args.calibration, calibration_samples=args.samples
    )
    print(f"original {compressor.evaluate(args.evaluation, progress=False).value:.3f}", flush=True)
    for rate in args.rates:
        alone, bits = _compressed(compressor, f"ecsq:{rate}", args.evaluation)
        print(f"ecsq:{rate:<28} {bits:.3f} bits {alone.value:9.3f}", flush=True)
        for pruner in args.pruners:
            stage = f"{pruner}:{args.sparsity}"
            for first in (True, False):
                order, measured, size = _at(compressor, stage, rate, bits, args.evaluation, first)
                scores = torch.tensor([alone.scores, measured.scores], dtype=torch.float64)
                gain = difference_over_draws(scores[:1] - scores[1:])  # losses
                print(
                    f"{order:33} {size:.3f} bits {measured.value:9.3f}, gain "
                    f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})",
                    flush=True,
                )


def _at(
    compressor: JointCompressor, pruner: str, rate: float, bits: float, text: str, first: bool
) -> tuple[str, Any, float]:
    """Return an order of a pruner and the coder, its measurement and its bits, as many as wanted.

    Args:
        compressor: Compresses.
        pruner: The stage.
        rate: Of the coder alone.
        bits: What that takes for each weight.
        text: To measure on.
        first: Whether the pruner comes first.
    """
    coder_rate = rate
    for _ in range(4):
        coder = f"ecsq:{coder_rate:.3f}"
        order = f"{pruner} > {coder}" if first else f"{coder} > {pruner}"
        measured, size = _compressed(compressor, order, text)
        if abs(size / bits - 1) <= CLOSE:
            break
        coder_rate *= bits / size
    return order, measured, size


def _compressed(compressor: JointCompressor, order: str, text: str) -> tuple[Any, float]:
    """Return the measurement of what an order makes, and its bits for each weight."""
    compressed = compressor.compress(order, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out", format="coded")
        facts = manifest.load(Path(folder) / "out")
    return compressed.evaluate(text, progress=False), facts["bytes"]["per_weight_bits"]


if __name__ == "__main__":
    main()
