"""What better masks are worth: how sparsity is divided among layers, and ALPS, window by window.

Each order runs on the same calibration data. The interval (95 %) is that of the mean gain in
log-perplexity over the first order, over the windows of the evaluation text.

    python benchmarks/masks.py tiny-llama builtin builtin --length 128
    python benchmarks/masks.py smollm2 valid.txt test.txt --characters 130000
"""

from __future__ import annotations

import argparse
import time

from setting import evaluation, gain, opened, parser

METHODS = ("wanda", "sparsegpt", "alps")
ALLOCATIONS = ("uniform", "owl", "global")


def main() -> None:
    """Compress with each order and print a table."""
    args = _arguments()
    compressor, text = opened(args), evaluation(args)
    original = compressor.evaluate(text, progress=False)
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
        measured = compressed.evaluate(text, progress=False)
        first = first or measured
        gained = gain(first, measured)
        weights = sum(state.weight.numel() for state in compressed.layers.values())
        removed = sum(int(state.mask.sum()) for state in compressed.layers.values())
        print(
            f"{order:48} {measured.value:9.3f}, {removed / weights:.4f} removed, {seconds:5.0f} s, "
            f"gain in log-perplexity {gained.mean:+.4f} ({gained.low:+.4f} to {gained.high:+.4f})",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--sparsity", type=float, default=0.6)
    arguments.add_argument("--orders", nargs="*")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
