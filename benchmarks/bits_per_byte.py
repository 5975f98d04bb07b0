"""How well tiny-llama predicts text it has never seen, beside what a general-purpose compressor makes of the same.

python benchmarks/bits_per_byte.py
"""

import bz2

from optimum_order import JointCompressor
from optimum_order.data.builtin import reference_topics


def main() -> None:
    text = "\n\n".join(reference_topics()).encode()
    print(f"held-out text: pydoc_data.topics, {len(text):,} bytes")
    print(f"bzip2 -9    {8 * len(bz2.compress(text, 9)) / len(text):.4f} bits per byte")
    measured = JointCompressor.from_pretrained("tiny-llama").evaluate("builtin")
    print(
        f"tiny-llama  {measured.details['bits_per_byte']:.4f} bits per byte "
        f"(perplexity {measured.value:.3f} on {measured.tokens:,} tokens in {len(measured.scores)} windows)"
    )


if __name__ == "__main__":
    main()
