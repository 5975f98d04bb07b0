"""What the format `coded` takes and how fast it is, on the weights of a real model.

    python benchmarks/coder.py                     # tiny-llama
    python benchmarks/coder.py FOLDER [LAYERS]     # a model, and how many layers of it

Each column and row of a layer is multiplied by a random factor (lognormal, sigma 0.7 and 0.3), and
the result is rounded to integers with one step, so that a code takes 2, 2.5, 3 or 4 bits. The ideal
is the entropy of a code given one of 16 classes of its expected size. A file is compared with this
ideal, everything counted. Rates are those of one thread, the best of several runs.

Then the model is quantized on dual-scale grids at about 2.5 bits, saved as "dense" and as "coded",
and loaded by transformers in a fresh process each.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from optimum_order import formats
from optimum_order.formats import Contents, Layers, entropy_coder
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.source import EMBEDDED
from optimum_order.models.units import find_targets

RATES = (1.5, 2.0, 2.5, 3.0, 4.0)
CLASSES = 16
LOAD = """
import resource, sys, time, torch, transformers
import optimum_order
from optimum_order.formats import transformers_hook
torch.set_num_threads(int(sys.argv[2]))
begin = time.perf_counter()
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - begin
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def spread_out(weight, seed=0):
    """The weight with a random factor on every column and row, its root mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.exp(0.7 * torch.randn(weight.shape[1], generator=generator))
    rows = torch.exp(0.3 * torch.randn(len(weight), 1, generator=generator))
    weight = weight.float() * columns * rows
    return weight / weight.square().mean().sqrt()


def ideal_bits(codes):
    """The entropy of codes given a class of their expected size, in bits."""
    values = codes.numpy().astype(np.float32)
    rows, columns = (np.log2(np.square(values).mean(axis) + 1e-3) / 2 for axis in (1, 0))
    size = rows[:, None] + columns
    low, high = np.quantile(size, [0.001, 0.999])
    classes = ((size - low) / (high - low) * CLASSES).astype(int).clip(0, CLASSES - 1)
    counts = np.bincount(
        (classes * 256 + codes.numpy().view(np.uint8)).ravel(), minlength=CLASSES * 256
    ).reshape(CLASSES, 256)
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    return float(-(counts * np.log2(np.maximum(counts, 1) / totals)).sum())


def codes_of(weight, rate):
    """Codes of a weight whose step is such that they take this many bits each."""
    low, high = -8.0, 8.0
    for _ in range(16):
        middle = (low + high) / 2
        codes = (weight / 2**middle).round().clamp(-128, 127).to(torch.int8)
        low, high = (middle, high) if ideal_bits(codes) > rate * codes.numel() else (low, middle)
    return codes


def best(function, runs=7):
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure(name, weight):
    """Print a row for each rate."""
    weight = spread_out(weight)
    for rate in RATES:
        codes = codes_of(weight, rate)
        data = entropy_coder.encode(codes)
        assert np.array_equal(entropy_coder.decode(data), codes.numpy())
        millions = codes.numel() / 1e6
        cells = [
            f"{8 * len(data) / ideal_bits(codes):.4f}",
            f"{entropy_coder.estimate(codes) / (8 * len(data)):.4f}",
            f"{millions / best(lambda data=data: entropy_coder.decode(data)):.0f}",
            f"{millions / best(lambda codes=codes: entropy_coder.encode(codes), 2):.0f}",
            f"{millions / best(lambda codes=codes: entropy_coder.estimate(codes), 3):.0f}",
        ]
        shape = "x".join(map(str, codes.shape))
        print(f"| {name} | {shape} | {rate} | {' | '.join(cells)} |", flush=True)


def quantized(weight):
    """A layer on a dual-scale grid of about 2.5 bits."""
    exponent = -weight.float().square().mean(0).sqrt().log2().round()
    exponent = (exponent - exponent.median()).clamp(-6, 6).to(torch.int8)
    least, most = DualScaleGrid.scale_range(weight.dtype, 8, exponent)
    scale = weight.float().square().mean(1, keepdim=True).sqrt().mul(0.7).clamp(least, most)
    grid = DualScaleGrid(8, scale.to(weight.dtype), exponent)
    grid.check()
    return LayerState(grid.nearest(weight), grid=grid)


def load(folder, threads):
    """Seconds and peak MB of loading a folder in a fresh process, the best of three."""
    runs = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", LOAD, folder, str(threads)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        runs.append((float(output[0]), int(output[1])))
    return min(runs)


def files(model):
    """Print the size of both folders and what loading them takes."""
    targets = {t.name: t for t in find_targets(model) if "proj" in t.name}
    states = {}
    for name, target in targets.items():
        states[name] = quantized(target.read())
        target.write(states[name].weight)
    contents = Contents(model, Layers(targets, states))
    weights = sum(state.weight.numel() for state in states.values())
    print("\n| format | bits per weight | threads | seconds | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for name in ("dense", "coded"):
            folder = Path(work) / name
            folder.mkdir()
            codec = formats.choose(contents, name)
            written = formats.container(name).write(contents, codec, folder, header={})
            for threads in (1, 2):
                seconds, memory = load(folder, threads)
                bits = 8 * written.bytes / weights
                print(f"| {name} | {bits:.3f} | {threads} | {seconds:.2f} | {memory} |", flush=True)


def main():
    """Print both tables."""
    torch.set_num_threads(1)
    folder = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED[0]
    if folder in EMBEDDED:
        folder = Path(formats.__file__).parent.parent / "assets" / folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    largest = {}
    for target in find_targets(model):
        if "proj" in target.name:
            largest.setdefault(target.view.shape, []).append(target)
    chosen = [targets[len(targets) // 2] for targets in largest.values()]
    chosen = chosen[: int(sys.argv[2])] if len(sys.argv) > 2 else chosen
    columns = "bits | file/ideal | estimate/file | decode M/s | encode M/s | estimate M/s"
    print(f"| layer | shape | {columns} |\n|{' --- |' * 8}")
    for target in chosen:
        measure(target.name, target.read())
    files(model)


if __name__ == "__main__":
    main()
