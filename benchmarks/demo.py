"""What the order changes: a small model compressed in six ways, measured, and the best joint one saved and run.

python benchmarks/demo.py
"""

import argparse
import subprocess
import sys
import time

import transformers
from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Order

ALONE = ["wanda:0.5", "gptq:4"]
TOGETHER = ["wanda:0.5 > gptq:4", "magnitude:0.5 > gptq:3"]

# Run in a process of its own, which knows transformers and has never heard of optimum-order.
SAMPLE = """
import sys
from transformers import logging, pipeline, set_seed

logging.set_verbosity_error()
logging.disable_progress_bar()
set_seed(0)
generate = pipeline("text-generation", model=sys.argv[1], device="cpu")
text = generate(sys.argv[2], max_new_tokens=60, do_sample=True, top_p=0.9)[0]["generated_text"]
assert not any(name.startswith("optimum_order") for name in sys.modules)
print(text)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument(
        "--evaluate", default="builtin", help="the text whose perplexity is measured"
    )
    parser.add_argument("--output", default="demo-output")
    args = parser.parse_args()
    begin = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # ours are enough

    compressor = JointCompressor.from_pretrained(
        args.model, calibration=args.calibration, calibration_samples=args.calibration_samples
    )
    table = Table(title=f"{args.model}, perplexity on {args.evaluate}", title_justify="left")
    table.add_column("order", no_wrap=True)
    for column in ("perplexity", "bits per weight", "bytes", "seconds"):
        table.add_column(column, justify="right")
    before = compressor.evaluate(args.evaluate)
    width = 8 * compressor.source.config.dtype.itemsize
    table.add_row(
        "(uncompressed)", f"{before.value:.2f}", f"{width:.2f}", f"{compressor.source.bytes:,}", ""
    )

    joint = []
    for order in [
        *map(Order.parse, ALONE),
        *(entry for pair in TOGETHER for entry in Order.parse(pair).permutations()),
    ]:
        compressed = compressor.compress(order)
        perplexity = compressed.evaluate(args.evaluate).value
        compressed.save_pretrained(args.output, overwrite=True)
        stored = compressed.manifest["bytes"]
        bits, size = f"{stored['per_weight_bits']:.2f}", f"{stored['after']:,}"
        table.add_row(str(order), f"{perplexity:.2f}", bits, size, f"{compressed.seconds:.1f}")
        if len(order) > 1:
            joint.append((perplexity, compressed))

    best = min(joint, key=lambda entry: entry[0])[1]
    chosen = best.save_pretrained(args.output, overwrite=True)
    Console(width=100).print(table)
    print(
        "bits per weight: of the compressed layers, scales and all. bytes: of the weight files on disk."
    )
    print(
        f"Of the {len(joint)} joint orders, the one with the lowest perplexity is kept: {best.order}"
    )
    print(
        f"It is in {args.output}, as {chosen}. A fresh process with stock transformers reads it and writes:\n"
    )
    command = [sys.executable, "-c", SAMPLE, args.output, "The import statement"]
    print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"{time.perf_counter() - begin:.0f} seconds in all.")


if __name__ == "__main__":
    main()
