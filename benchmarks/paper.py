"""The paper's findings on our models: the figures of benchmarks/paper.md, from studies that this script runs.

    python benchmarks/paper.py --output paper-output    (hours on two cores; goes on where it was stopped)
    python benchmarks/paper.py --output paper-output --run mild-on-the-grid 1     (one draw of one study)

The studies of the planner's benchmark are read from its folder, `--planner`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from planner import DRAWS, PRUNERS, QUANTIZERS, Setting

from optimum_order import Order, Stage
from optimum_order.ordering.study import grid, quiet

SPARSEGPT = [Stage("sparsegpt")]
TEXTBOOK = [Stage("rtn", clip="none"), Stage("gptq", clip="none")]
MILD = ([0.1, 0.2, 0.3, 0.4], QUANTIZERS, [3, 4, 5, 6])
STRONG = ([0.3, 0.5, 0.65], QUANTIZERS, [2, 3, 4])

STUDIES: dict[str, tuple[str, list[Order]]] = {
    "mild": ("tiny-llama", grid(SPARSEGPT, *MILD)),
    "mild-off-grid": ("tiny-llama", grid(SPARSEGPT, *MILD, simulate=True)),
    "strong-off-grid": ("tiny-llama", grid(SPARSEGPT, *STRONG, simulate=True)),
    "textbook": ("tiny-llama", grid(PRUNERS[:2], [0.3, 0.5, 0.65], TEXTBOOK, [2])),
    "vit-mild": ("tiny-vit", grid(SPARSEGPT, *MILD)),
    "vit-mild-off-grid": ("tiny-vit", grid(SPARSEGPT, *MILD, simulate=True)),
    "resnet-mild": ("tiny-resnet", grid(SPARSEGPT, *MILD)),
    "resnet-mild-off-grid": ("tiny-resnet", grid(SPARSEGPT, *MILD, simulate=True)),
    "vit-off-grid": ("tiny-vit", grid(PRUNERS, [0.4, 0.6], QUANTIZERS, [2, 3], simulate=True)),
}
"""Each study's model and orders, beside those of the planner's benchmark."""


def run(name: str, folder: Path, draws: list[int]) -> None:
    model, orders = STUDIES[name]
    Setting(model).study(folder).run(orders, draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("paper-output"))
    parser.add_argument("--planner", type=Path, default=Path("planner-output"))
    parser.add_argument("--run", nargs="+", metavar=("STUDY", "DRAW"), help="only this study, and only these draws")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, *draws = args.run or [None]
    with quiet():
        for each in STUDIES:
            if name in (None, each):
                run(each, args.output / each, [int(draw) for draw in draws] or list(range(DRAWS)))


if __name__ == "__main__":
    main()
