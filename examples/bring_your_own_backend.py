"""A compression method of your own: one class, for every order, schedule, format and command.

    python examples/bring_your_own_backend.py

To give the method to others, put the class into a package whose pyproject.toml says

    [project.entry-points."optimum_order.backends"]
    random = "bring_your_own_backend:Random"

and `pip install` that. Formats, metrics and commands go the same way, in the groups
`optimum_order.formats`, `optimum_order.metrics` and `optimum_order.commands`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from optimum_order import Backend, JointCompressor, option


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    sparsity: float = option(
        0.5, "fraction removed", check=lambda v: 0 <= v < 1, allowed="a number in [0, 1)"
    )
    seed: int = option(0, "which weights are drawn")


class Random(Backend):
    """Prune at random: the baseline of every pruner."""

    name = "random"
    summary = "prune at random, the baseline of every pruner"
    kind = "prune"
    Options = RandomOptions

    def compress(self, state, statistics):
        generator = torch.Generator().manual_seed(self.options.seed)
        chances = torch.rand(state.weight.shape, generator=generator)
        pruned = (chances < self.options.sparsity).to(state.weight.device)
        if state.pruned is not None:
            pruned |= state.pruned  # pruned weights stay pruned, which the base class checks
        weight = state.weight.masked_fill(pruned, 0.0)
        return dataclasses.replace(state, weight=weight, pruned=pruned)


def install(folder: Path) -> None:
    """Do what `pip install` does with the entry point above, for this process only."""
    info = folder / "bring_your_own_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bring-your-own-backend\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[optimum_order.backends]\nrandom = bring_your_own_backend:Random\n"
    )
    sys.path.append(str(folder))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        # any texts do; float32 is the fast dtype of processors without bfloat16 units
        compressor = JointCompressor.from_pretrained(
            "tiny-llama",
            dtype="float32",
            calibration=[topics["compound"]],
            calibration_samples=16,
        )
        texts = [topics["import"]]
        for order in ("random:0.3 > gptq:4", "wanda:0.3 > gptq:4"):
            print(order, compressor.compress(order).evaluate(texts).value)
