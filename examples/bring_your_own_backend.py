"""A compression method of your own: one class, which every order, schedule, format and command then knows.

    python examples/bring_your_own_backend.py

To give it to others, put the class into a package whose pyproject.toml says

    [project.entry-points."optimum_order.backends"]
    random = "bring_your_own_backend:Random"

and `pip install` that. A format of your own goes the same way, in the group `optimum_order.formats`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from optimum_order import Backend, JointCompressor
from optimum_order.backends import option


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    sparsity: float = option(
        0.5, "fraction removed", check=lambda v: 0 <= v < 1, allowed="a number in [0, 1)"
    )
    seed: int = option(0, "which weights are drawn")


class Random(Backend):
    """Prunes at random: what every pruner has to beat."""

    name = "random"
    summary = "prune at random, the baseline that every pruner has to beat"
    kind = "prune"
    Options = RandomOptions

    def compress(self, state, statistics):
        generator = torch.Generator().manual_seed(self.options.seed)
        pruned = (torch.rand(state.weight.shape, generator=generator) < self.options.sparsity).to(
            state.weight.device
        )
        if state.pruned is not None:
            pruned |= (
                state.pruned
            )  # what an earlier stage removed stays removed; the base class checks it
        return dataclasses.replace(
            state, weight=state.weight.masked_fill(pruned, 0.0), pruned=pruned
        )


def install(folder: Path) -> None:
    """What `pip install` would do with the entry point above, for this process only."""
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
        compressor = JointCompressor.from_pretrained("tiny-llama", calibration_samples=16)
        texts = [topics["compound"], topics["import"]]  # any list of texts
        for order in ("random:0.3 > gptq:4", "wanda:0.3 > gptq:4"):
            print(order, compressor.compress(order).evaluate(texts).value)
