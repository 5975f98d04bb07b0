"""How many weights that a grid would keep does a pruner remove, before and after the grid?

    python benchmarks/zeros.py tiny-llama --quantizers gptq:3 gptq:4 --pruners wanda:0.3
    python benchmarks/zeros.py smollm2 --calibration valid.txt --samples 16 --length 512

A grid of few bits rounds small weights to zero. A pruner that comes after the grid removes these first, at no loss; one
that comes before does not know them, and what it removes is on top.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor
from optimum_order.study.run import quiet


def main() -> None:
    """Print a row for each quantizer and pruner."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or an id")
    parser.add_argument("--quantizers", nargs="+", default=["gptq:3", "gptq:4"])
    parser.add_argument("--pruners", nargs="+", default=["wanda:0.3", "wanda:0.5"])
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compressor = JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.samples,
        sequence_length=args.length,
    )

    def layers(order: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What each layer is after an order: which weights are not zero, and which are pruned."""
        with quiet():
            states = compressor.compress(order, progress=False).layers.values()
            none = torch.zeros((), dtype=torch.bool)
            return [(s.weight != 0, none if s.pruned is None else s.pruned) for s in states]

    def share(masks: list[torch.Tensor]) -> str:
        counts = [(int(mask.sum()), mask.numel()) for mask in masks]
        return f"{sum(part for part, _ in counts) / sum(whole for _, whole in counts):.1%}"

    table = Table()
    for column in ("quantizer", "zeros of the grid", "pruner"):
        table.add_column(column)
    for column in ("removed on top, pruner first", "removed on top, quantizer first"):
        table.add_column(column, justify="right")
    masks = {pruner: [pruned for _, pruned in layers(pruner)] for pruner in args.pruners}
    for quantizer in args.quantizers:
        rounded = [alive for alive, _ in layers(quantizer)]
        for pruner in args.pruners:
            after = [pruned for _, pruned in layers(f"{quantizer} > {pruner}")]
            table.add_row(
                quantizer,
                share([~alive for alive in rounded]),
                pruner,
                share([p & alive for p, alive in zip(masks[pruner], rounded, strict=True)]),
                share([p & alive for p, alive in zip(after, rounded, strict=True)]),
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
