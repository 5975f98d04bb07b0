"""What a rotation is worth before a quantizer and before a pruner, window by window.

Each order runs on the same calibration data. The interval (95 %) is that of the mean gain in
log-perplexity over the same order without the rotation, over the windows of the evaluation text.

    python benchmarks/rotation.py tiny-llama builtin builtin
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from optimum_order import JointCompressor
from optimum_order.evaluation.comparison import difference_over_draws

ORDERS = (
    "rtn(bits=4, group_size=-1)",
    "rtn(bits=3, group_size=-1)",
    "gptq(bits=4, group_size=-1)",
    "gptq(bits=3, group_size=-1)",
    "gptq:3",
    "wanda:0.4",
    "sparsegpt:0.4",
    "sparsegpt:0.4 > gptq:4",
)


def main() -> None:
    """Compress with each order, with a rotation and without, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--orders", nargs="*", default=ORDERS)
    args = parser.parse_args()
    compressor = JointCompressor.from_pretrained(
        args.model, calibration=args.calibration, calibration_samples=args.samples
    )
    original = compressor.evaluate(args.evaluation, progress=False)
    print(f"original {original.value:.3f}", flush=True)
    for order in args.orders:
        plain = _measured(compressor, order, args.evaluation)
        rotated = _measured(compressor, f"rotate > {order}", args.evaluation)
        scores = torch.tensor([plain.scores, rotated.scores], dtype=torch.float64)
        gain = difference_over_draws(scores[:1] - scores[1:])  # losses
        print(
            f"{order:28} {plain.value:9.3f}, rotated {rotated.value:9.3f}, gain in log-perplexity "
            f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})",
            flush=True,
        )


def _measured(compressor: JointCompressor, order: str, text: str) -> Any:
    return compressor.compress(order, progress=False).evaluate(text, progress=False)


if __name__ == "__main__":
    main()
