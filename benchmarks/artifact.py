"""What each format costs and gives back: bytes against theory, seconds and memory to load, and every bit compared.

python benchmarks/artifact.py

Theory counts the compressed layers. Of n weights in groups that share a 16-bit scale, with b bits a code, a share s
pruned and g groups:

    dense               16 n
    compressed-tensors  b n + 16 g + 128       codes of pruned weights and all; a shape of two int64 for each layer
    gptq                b n + 16 g + b g + 32 i        zero points for each group, an int32 for each of the i inputs
    sparse              (1 + (1 - s) b) n + 16 g, and at N:M  (ceil(log2 C(M, N)) / M + (1 - s) b) n + 16 g

Each load runs in a process of its own, three times, of which the fastest counts; memory is what the process takes at
most beyond what it had before `from_pretrained`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, artifact
from optimum_order.errors import FormatError
from optimum_order.formats import checkpoint

ORDERS = ["sparsegpt:0.5 > gptq:4", "wanda(pattern=2:4) > gptq:4", "sparsegpt:0.7 > gptq:3"]
FORMATS = ["dense", "compressed-tensors", "gptq", "sparse"]
RUNS = 3
COLUMNS = ["layers", "theory", "over", "bits/weight", "file", "theory", "over", "seconds", "peak MB", "exact"]

# Run in a process of its own: `sparse` needs our package, the others have never heard of it.
LOAD = """
import json, resource, sys, threading, time
folder, reference, ours = sys.argv[1:]
if ours:
    import optimum_order
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
if ours:
    import optimum_order.formats.sparse
else:
    assert not any(name.startswith("optimum_order") for name in sys.modules)
import compressed_tensors, transformers.models.llama.modeling_llama  # what a load would import is not its memory


def memory():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak begins anew
before, begin = memory(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
if hasattr(model, "ct_decompress_hook"):
    model(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors unpacks on the first forward pass
seconds, peak = time.perf_counter() - begin, memory() - before
expected, found = load_file(reference), dict(model.named_parameters())
same = expected.keys() <= found.keys() and all(  # compressed-tensors leaves its scales in the model
    found[name].dtype == tensor.dtype
    and torch.equal(found[name].detach().contiguous().view(torch.uint8), tensor.view(torch.uint8))
    for name, tensor in expected.items()
)
print(json.dumps([seconds, peak, same]))
"""


def theory(format: str, layers: dict) -> float:
    """The bits of the compressed layers, from what the manifest says of them."""
    bits = 0.0
    for layer in layers.values():
        (rows, inputs), b = layer["shape"], layer["bits"]
        n = rows * inputs
        groups = n // (inputs if layer["group_size"] == -1 else layer["group_size"])
        kept = (n - layer["pruned"]) / n
        if format == "dense":
            bits += 16 * n
        elif format == "compressed-tensors":
            bits += b * n + 16 * groups + 128
        elif format == "gptq":
            bits += b * n + 16 * groups + b * groups + 32 * inputs
        else:
            mask = 1.0
            if layer["pattern"]:
                keep, of = map(int, layer["pattern"].split(":"))
                mask = math.ceil(math.log2(math.comb(of, keep))) / of
            bits += (mask + kept * b) * n + 16 * groups
    return bits


def stored(folder: Path, layers: dict) -> int:
    """The bytes of the compressed layers' tensors, without the file's header."""
    found = load_file(folder / "model.safetensors")
    names = set(layers)
    return sum(t.nbytes for key, t in found.items() if key.rpartition(".")[0] in names)


def load(folder: Path, reference: Path, format: str) -> tuple[float, int, bool]:
    """Seconds, bytes of memory, and whether every parameter has the bits that were measured."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, folder, reference, "ours" if format == "sparse" else ""]
    runs = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(RUNS)
    ]
    return min(run[0] for run in runs), min(run[1] for run in runs), all(run[2] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calibration-samples", type=int, default=64)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    compressor = JointCompressor.from_pretrained(
        args.model, calibration="builtin", calibration_samples=args.calibration_samples
    )
    console = Console(width=150)
    notes = []
    with tempfile.TemporaryDirectory() as scratch:
        for order in ORDERS:
            compressed = compressor.compress(order, progress=False)
            reference = Path(scratch) / "reference.safetensors"
            parameters = compressed.model.named_parameters()
            save_file({name: each.detach().clone().contiguous() for name, each in parameters}, reference)
            table = Table(title=f"{args.model}, {order}", title_justify="left")
            table.add_column("format", no_wrap=True)
            for column in COLUMNS:
                table.add_column(column, justify="right")
            base = None
            for format in FORMATS:
                folder = Path(scratch) / format
                try:
                    compressed.save_pretrained(folder, format, overwrite=True)
                except FormatError as error:
                    notes.append(f"{order}: {error}")
                    table.add_row(format, *["-"] * 10)
                    continue
                if problems := artifact.verify(folder):
                    raise SystemExit(f"{folder}: {problems}")
                layers, whole = compressed.manifest["layers"], checkpoint.weight_bytes(folder)
                weights = sum(math.prod(layer["shape"]) for layer in layers.values())
                held, least = stored(folder, layers), theory(format, layers) / 8
                base = whole - held if base is None else base  # what no format compresses, header and all
                cost = [f"{held:,}", f"{least:,.0f}", f"{held / least - 1:+.2%}", f"{8 * held / weights:.3f}"]
                cost += [f"{whole:,}", f"{least + base:,.0f}", f"{whole / (least + base) - 1:+.2%}"]
                if format == "gptq":
                    table.add_row(format, *cost, "-", "-", "-")
                    continue
                seconds, peak, same = load(folder, reference, format)
                table.add_row(format, *cost, f"{seconds:.3f}", f"{peak / 1e6:.1f}", "yes" if same else "NO")
            console.print(table)
    print("layers, file: bytes of the compressed layers and of the whole weight file, each beside its theory.")
    print("A whole file's theory adds what dense has besides: embeddings, norms and the header.")
    print(
        "seconds, peak MB: to load in a fresh process with one thread, compressed-tensors with its first forward pass."
    )
    print(
        "gptq is not loaded here: that takes GPTQModel, which needs another torch. See benchmarks/check_gptqmodel.py."
    )
    print(*notes, sep="\n")


if __name__ == "__main__":
    main()
