"""What the schedule "block" costs or gains in perplexity against "stage", for every joint order of the demo.

"block" applies all stages to a block on one capture of its inputs: it saves the walks between, and a later stage does
not see what the earlier ones made of the block's inputs. Each figure is a mean over disjoint draws of the calibration
text, the same for both schedules.

    python benchmarks/schedules.py
"""

import argparse
import time

import torch
import transformers
from demo import TOGETHER
from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Order
from optimum_order.data.text import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # so that processor seconds are those of the work
    source = JointCompressor.from_pretrained(args.model).source
    windows = load("builtin", source.processor, samples=args.samples * args.draws, length=512)
    table = Table(
        title=f"{args.model}, perplexity, mean of {args.draws} draws of {args.samples} windows"
    )
    table.add_column("order", no_wrap=True)
    for column in ("stage", "block", "block / stage", "of each draw", "seconds, block / stage"):
        table.add_column(column, justify="right")
    worst = 0.0
    for order in [entry for pair in TOGETHER for entry in Order.parse(pair).permutations()]:
        values: dict[str, list[float]] = {"stage": [], "block": []}
        seconds = dict.fromkeys(values, 0.0)
        for draw in range(args.draws):
            ids = windows.ids[draw * args.samples : (draw + 1) * args.samples]
            compressor = JointCompressor.from_pretrained(
                args.model, calibration=ids, calibration_samples=args.samples
            )
            for schedule in values:
                begin = time.process_time()
                compressed = compressor.compress(order, schedule, progress=False)
                seconds[schedule] += time.process_time() - begin
                values[schedule].append(compressed.evaluate("builtin", progress=False).value)
        stage, block = (sum(result) / args.draws for result in values.values())
        ratios = [b / a for a, b in zip(*values.values(), strict=True)]
        worst = max(worst, *ratios)
        entry = " ".join(f"{ratio:.4f}" for ratio in ratios)
        time_ratio = f"{seconds['block'] / seconds['stage']:.2f}"
        table.add_row(
            str(order), f"{stage:.3f}", f"{block:.3f}", f"{block / stage:.4f}", entry, time_ratio
        )
    Console(width=120).print(table)
    print(f"The most that block costs in any draw: {worst - 1:+.2%}")


if __name__ == "__main__":
    main()
