"""What benchmarks on a model and two texts have in common: arguments, data, rows, and gains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from optimum_order import JointCompressor
from optimum_order.evaluation.comparison import Difference, difference_over_draws


def parser(description: str | None, *, samples: int = 32) -> argparse.ArgumentParser:
    """Return a parser of the model, the two texts, and how much of them counts.

    Args:
        description: The docstring of the script.
        samples: Calibration samples by default.
    """
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("model")
    arguments.add_argument("calibration")
    arguments.add_argument("evaluation")
    arguments.add_argument(
        "--characters", type=int, help="of the evaluation file, from its beginning"
    )
    arguments.add_argument("--samples", type=int, default=samples)
    arguments.add_argument("--length", type=int, help="tokens of a window, 512 by default")
    return arguments


def opened(args: argparse.Namespace, **options: Any) -> JointCompressor:
    """Return the model with its calibration data.

    Args:
        args: Of `parser`.
        options: Other arguments of `JointCompressor.from_pretrained`.
    """
    return JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.samples,
        sequence_length=args.length,
        **options,
    )


def evaluation(args: argparse.Namespace) -> Any:
    """Return what is measured on.

    Args:
        args: Of `parser`.
    """
    if args.characters:
        return [Path(args.evaluation).read_text(encoding="utf-8")[: args.characters]]
    return args.evaluation


def gain(first: Any, second: Any) -> Difference:
    """Return the loss that a model has less than another, window by window.

    Args:
        first: What the other measured.
        second: What the model measured.
    """
    scores = torch.tensor([first.scores, second.scores], dtype=torch.float64)
    return difference_over_draws(scores[:1] - scores[1:])  # losses


class Rows(dict[str, Any]):
    """Rows of a table, written to a file as they come; a second run goes on from there.

    Args:
        file: JSON; None to write nothing.
    """

    def __init__(self, file: str | None):
        self._file = Path(file) if file else None
        if self._file and self._file.exists():
            super().__init__(json.loads(self._file.read_text()))

    def __setitem__(self, name: str, row: Any) -> None:
        super().__setitem__(name, row)
        if self._file:
            self._file.write_text(json.dumps(self, indent=1) + "\n")
