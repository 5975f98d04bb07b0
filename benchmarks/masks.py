"""What better masks are worth: how sparsity is divided among layers, and ALPS, window by window.

Each order runs on the same calibration data. The interval (95 %) is that of the mean gain in
log-perplexity over the first order, over the windows of the evaluation text.

    python benchmarks/masks.py tiny-llama builtin builtin
"""

from __future__ import annotations

import argparse
import time

import torch

from optimum_order import JointCompressor
from optimum_order.evaluation.comparison import difference_over_draws

METHODS = ("wanda", "sparsegpt", "alps")
ALLOCATIONS = ("uniform", "owl", "global")


def main() -> None:
    """Compress with each order and print a table."""
    args = _arguments()
    compressor = JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.samples,
        sequence_length=args.length,
    )
    original = compressor.evaluate(args.evaluation, progress=False)
    print(f"original {original.value:.3f}", flush=True)
    orders = args.orders or [
        f"{method}(sparsity={args.sparsity:g}, allocation={allocation})"
        for method in METHODS
        for allocation in ALLOCATIONS
    ]
    first = None
    for order in orders:
        begin = time.process_time()
        compressed = compressor.compress(order, progress=False)
        seconds = time.process_time() - begin
        measured = compressed.evaluate(args.evaluation, progress=False)
        first = first or measured
        scores = torch.tensor([first.scores, measured.scores], dtype=torch.float64)
        gain = difference_over_draws(scores[:1] - scores[1:])  # losses
        weights = sum(state.weight.numel() for state in compressed.layers.values())
        removed = sum(int(state.mask.sum()) for state in compressed.layers.values())
        print(
            f"{order:48} {measured.value:9.3f}, {removed / weights:.4f} removed, {seconds:5.0f} s, "
            f"gain in log-perplexity {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--orders", nargs="*")
    return parser.parse_args()


if __name__ == "__main__":
    main()
