"""What each format costs and gives back: bytes against theory, seconds and memory to load, and every bit compared.

python benchmarks/artifact.py

Theory counts the compressed layers. Of n weights in groups that share a 16-bit scale, with b bits a code, a share s
pruned and g groups:

    dense               16 n
    compressed-tensors  b n + 16 g + 128       codes of pruned weights and all; a shape of two int64 for each layer
    gptq                b n + 16 g + b g + 32 i        zero points for each group, an int32 for each of the i inputs
    sparse              (1 + (1 - s) b) n + 16 g, and at N:M  (ceil(log2 C(M, N)) / M + (1 - s) b) n + 16 g

Three tables on the model given, then as many on a Llama of 91 M random weights, large enough that it and not the
libraries counts; its orders need no data. Each load runs in a process of its own with one thread, three times, of
which the fastest counts. Seconds are the processor's, compressed-tensors' with the first forward pass, on which it
unpacks. Memory is what the process takes at most beyond what it had before `from_pretrained`, beside the bytes of the
loaded model: "peak" all that is resident, which counts the pages of the file that were read through a map and that the
system takes back when it needs them; "own" without those, sampled every millisecond.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import FormatError
from optimum_order.files import weight_bytes
from optimum_order.formats.safetensors import Safetensors
from optimum_order.formats.sparse import decode_weight

ORDERS = ["sparsegpt:0.5 > gptq:4", "wanda(pattern=2:4) > gptq:4", "sparsegpt:0.7 > gptq:3"]
LARGE_ORDERS = [
    "magnitude:0.5 > rtn(bits=4, group_size=128, clip=none)",
    "magnitude(pattern=2:4) > rtn(bits=8, clip=none)",
    "magnitude:0.7",
]
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
FORMATS = ["dense", "compressed-tensors", "gptq", "sparse"]
RUNS = 3
COLUMNS = ["layers", "theory", "over", "bits/weight", "file", "theory", "over"]
COLUMNS += ["seconds", "peak", "own", "decoding MB/s", "exact"]

# Run in a process of its own: `sparse` needs our package, the others have never heard of it.
LOAD = """
import json, sys, threading, time
folder, reference, ours, watched = sys.argv[1:]
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


def own():
    with open("/proc/self/statm") as statm:
        resident, mapped = map(int, statm.read().split()[1:3])
    return (resident - mapped) * 4096


def watch():
    while running:
        taken.append(own())
        time.sleep(0.001)


taken, running = [own()], True
if watched:
    threading.Thread(target=watch, daemon=True).start()
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak begins anew
before, begin = memory(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
if hasattr(model, "ct_decompress_hook"):
    model(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors unpacks on the first forward pass
seconds, peak, running = time.process_time() - begin, memory() - before, False
expected, found = load_file(reference), dict(model.named_parameters())
same = expected.keys() <= found.keys() and all(  # compressed-tensors leaves its scales in the model
    found[name].dtype == tensor.dtype
    and torch.equal(found[name].detach().contiguous().view(torch.uint8), tensor.view(torch.uint8))
    for name, tensor in expected.items()
)
size = sum(tensor.nbytes for tensor in expected.values())
print(json.dumps([seconds, peak / size, (max(taken) - taken[0]) / size, same]))
"""


def theory(format: str, layers: dict) -> float:
    """The bits of the compressed layers, from what the manifest says of them."""
    bits = 0.0
    for layer in layers.values():
        (rows, inputs), b = layer["shape"], layer["bits"]
        n = rows * inputs
        groups = (
            n // (inputs if layer["group_size"] == -1 else layer["group_size"])
            if layer["group_size"]
            else 0
        )
        share = (n - layer["pruned"]) / n
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
            bits += (mask + share * b) * n + 16 * groups
    return bits


def stored(folder: Path, layers: dict) -> int:
    """The bytes of the compressed layers' tensors, without the file's header."""
    tensors = load_file(folder / "model.safetensors")
    names = set(layers)
    return sum(t.nbytes for key, t in tensors.items() if key.rpartition(".")[0] in names)


def load(folder: Path, reference: Path, format: str) -> tuple[float, float, float, bool]:
    """Seconds, both kinds of memory in sizes of the model, and whether every parameter has the bits measured."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOAD,
        folder,
        reference,
        "ours" if format == "sparse" else "",
    ]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    runs = [
        json.loads(
            subprocess.run(
                [*command, watched], env=quiet, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
        )
        for watched in [""] * RUNS + ["watched"]
    ]
    *timed, watched = runs
    return (
        min(run[0] for run in timed),
        min(run[1] for run in timed),
        watched[2],
        all(run[3] for run in runs),
    )


def rate(folder: Path, layers: dict) -> float:
    """Bytes of weights that a core decodes from "sparse" in a second."""
    tensors = load_file(folder / "model.safetensors")
    payloads = [tensor for key, tensor in tensors.items() if key.removesuffix(".weight") in layers]
    torch.set_num_threads(1)
    seconds = []
    for _ in range(RUNS):
        begin = time.process_time()
        decoded = sum(
            decode_weight(payload).nbytes for payload in payloads if payload.dtype == torch.uint8
        )
        seconds.append(time.process_time() - begin)
    return decoded / min(seconds)


def unpacked(folder: Path, layers: dict, reference: Path) -> bool:
    """Whether our own reader gives back every compressed layer to the bit."""
    expected = load_file(reference)
    tensors = Safetensors().read(folder, {name: layer["stored"] for name, layer in layers.items()})
    return all(
        torch.equal(state.weight.view(torch.int16), expected[f"{name}.weight"].view(torch.int16))
        for name, state in tensors
    )


def table(name: str, compressed, scratch: Path, notes: list[str]) -> Table:
    """All formats of one compressed model."""
    reference = scratch / "reference.safetensors"
    parameters = compressed.model.named_parameters()
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in parameters}, reference
    )
    made = Table(title=f"{name}, {compressed.order}", title_justify="left")
    made.add_column("format", no_wrap=True)
    for column in COLUMNS:
        made.add_column(column, justify="right")
    base = None
    for format in FORMATS:
        folder = scratch / format
        try:
            compressed.save_pretrained(folder, format, overwrite=True)
        except FormatError as error:
            notes.append(f"{name}, {compressed.order}: {error}")
            made.add_row(format, *["-"] * len(COLUMNS))
            continue
        if problems := verify(folder):
            raise SystemExit(f"{folder}: {problems}")
        layers, whole = compressed.manifest["layers"], weight_bytes(folder)
        weights = sum(math.prod(layer["shape"]) for layer in layers.values())
        held, least = stored(folder, layers), theory(format, layers) / 8
        base = whole - held if base is None else base  # what no format compresses, header and all
        cost = [
            f"{held:,}",
            f"{least:,.0f}",
            f"{held / least - 1:+.2%}",
            f"{8 * held / weights:.3f}",
        ]
        cost += [f"{whole:,}", f"{least + base:,.0f}", f"{whole / (least + base) - 1:+.2%}"]
        if format == "gptq":
            cost += [
                "-",
                "-",
                "-",
                "-",
                "unpacked" if unpacked(folder, layers, reference) else "NO",
            ]
        else:
            seconds, peak, own, same = load(folder, reference, format)
            decoding = f"{rate(folder, layers) / 1e6:,.0f}" if format == "sparse" else "-"
            cost += [
                f"{seconds:.2f}",
                f"{peak:.2f}x",
                f"{own:.2f}x",
                decoding,
                "yes" if same else "NO",
            ]
        made.add_row(format, *cost)
    return made


def generated(folder: Path) -> Path:
    """A Llama of random weights."""
    config = transformers.LlamaConfig(**LARGE, vocab_size=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--only", choices=["given", "generated"], help="one half of it")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    console, notes = Console(width=170), []
    with tempfile.TemporaryDirectory() as scratch:
        if args.only != "generated":
            compressor = JointCompressor.from_pretrained(
                args.model, calibration="builtin", calibration_samples=args.calibration_samples
            )
            for order in ORDERS:
                console.print(
                    table(
                        args.model, compressor.compress(order, progress=False), Path(scratch), notes
                    )
                )
        if args.only != "given":
            compressor = JointCompressor.from_pretrained(generated(Path(scratch) / "generated"))
            for order in LARGE_ORDERS:
                console.print(
                    table(
                        "91 M weights",
                        compressor.compress(order, progress=False),
                        Path(scratch),
                        notes,
                    )
                )
    print(
        "layers, file: bytes of the compressed layers and of the whole weight file, each beside its theory."
    )
    print("A whole file's theory adds what dense has besides: embeddings, norms and the header.")
    print(
        "seconds: of the processor. peak, own: memory to load, in sizes of the loaded model, with and without the file."
    )
    print(
        "gptq is decoded by our own reader: GPTQModel needs another torch. See benchmarks/check_gptqmodel.py."
    )
    print(*notes, sep="\n")


if __name__ == "__main__":
    main()
