"""What a rotation is worth before a quantizer and before a pruner, window by window.

Each order runs on the same calibration data. The interval (95 %) is that of the mean gain in
log-perplexity over the same order without the rotation, over the windows of the evaluation text.

    python benchmarks/rotation.py tiny-llama builtin builtin
"""

from __future__ import annotations

from typing import Any

from setting import evaluation, gain, opened, parser

from optimum_order import JointCompressor

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
    arguments = parser(__doc__)
    arguments.add_argument("--orders", nargs="*", default=ORDERS)
    args = arguments.parse_args()
    compressor, text = opened(args), evaluation(args)
    original = compressor.evaluate(text, progress=False)
    print(f"original {original.value:.3f}", flush=True)
    for order in args.orders:
        plain = _measured(compressor, order, text)
        rotated = _measured(compressor, f"rotate > {order}", text)
        gained = gain(plain, rotated)
        print(
            f"{order:28} {plain.value:9.3f}, rotated {rotated.value:9.3f}, gain in log-perplexity "
            f"{gained.mean:+.4f} ({gained.low:+.4f} to {gained.high:+.4f})",
            flush=True,
        )


def _measured(compressor: JointCompressor, order: str, text: Any) -> Any:
    return compressor.compress(order, progress=False).evaluate(text, progress=False)


if __name__ == "__main__":
    main()
