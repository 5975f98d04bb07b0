"""Which order, if the quantizer codes by entropy? Pruner first, coder first, coder alone.

All three have the bits of the coder alone, to 1 %: what a pruner removes after the coder makes codes
cheaper, so the coder is given more bits. The interval (95 %) is that of the mean gain in
log-perplexity over the coder alone, over the windows of the evaluation text.

    python benchmarks/coded_orders.py tiny-llama builtin builtin
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from setting import evaluation, gain, opened, parser

from optimum_order import JointCompressor
from optimum_order.artifact import manifest

CLOSE = 0.01
"""Part of the bits by which a model may differ from the one that it is compared with."""


def main() -> None:
    """Compress in each order and print a table."""
    arguments = parser(__doc__)
    arguments.add_argument("--sparsity", type=float, default=0.3)
    arguments.add_argument("--pruners", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    arguments.add_argument("--rates", nargs="*", type=float, default=[3.0, 2.5, 2.0])
    args = arguments.parse_args()
    compressor, text = opened(args), evaluation(args)
    print(f"original {compressor.evaluate(text, progress=False).value:.3f}", flush=True)
    for rate in args.rates:
        alone, bits = _compressed(compressor, f"ecsq:{rate}", text)
        print(f"ecsq:{rate:<28} {bits:.3f} bits {alone.value:9.3f}", flush=True)
        for pruner in args.pruners:
            stage = f"{pruner}:{args.sparsity}"
            for first in (True, False):
                order, measured, size = _at(compressor, stage, rate, bits, text, first)
                gained = gain(alone, measured)
                print(
                    f"{order:33} {size:.3f} bits {measured.value:9.3f}, gain "
                    f"{gained.mean:+.4f} ({gained.low:+.4f} to {gained.high:+.4f})",
                    flush=True,
                )


def _at(
    compressor: JointCompressor, pruner: str, rate: float, bits: float, text: Any, first: bool
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


def _compressed(compressor: JointCompressor, order: str, text: Any) -> tuple[Any, float]:
    """Return the measurement of what an order makes, and its bits for each weight."""
    compressed = compressor.compress(order, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out", format="coded")
        facts = manifest.load(Path(folder) / "out")
    return compressed.evaluate(text, progress=False), facts["bytes"]["per_weight_bits"]


if __name__ == "__main__":
    main()
