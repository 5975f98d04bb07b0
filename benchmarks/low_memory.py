"""A checkpoint that is larger than the memory it is compressed in: how much memory that takes at most.

python benchmarks/low_memory.py CHECKPOINT

Exits with 1 if more was resident than the interpreter's baseline + 3 x (the largest block in float32 + X^T X of its
distinct inputs) + the limit on activations, and ends in an error if more anonymous memory was wanted than the limit.
"""

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich.progress import track
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.engine.workdir import remove


def make_checkpoint(
    folder: str | Path,
    *,
    blocks: int = 48,
    hidden: int = 2048,
    intermediate: int = 5632,
    vocabulary: int = 8192,
    processes: int = 1,
) -> Path:
    """Write a Llama of random weights in bfloat16, a block and a file at a time; 4.4 GB unless told otherwise.

    Weights are as they are drawn before training: normal, 0.02 wide, and those that write into the residual stream
    narrower by the square root of how many do. So activations keep their size through all blocks.

    Args:
        folder: Made if missing. What is whole in it is left as it is.
        blocks: How many blocks.
        hidden: Width of the residual stream, a multiple of 128.
        intermediate: Width inside the MLPs.
        vocabulary: How many tokens.
        processes: Files written at a time.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with init_empty_weights():
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        writing = [
            pool.submit(_write_file, folder / file, names, shapes, 1 / math.sqrt(2 * blocks))
            for file, names in files.items()
            if not (folder / file).exists()
        ]
        for written in track(as_completed(writing), f"Writing {folder}", total=len(writing)):
            written.result()
    weight_map = {name: file for file, names in files.items() for name in names}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(folder)  # the last, so that a folder with a config is whole
    return folder


def _write_file(
    file: Path, names: Iterable[str], shapes: dict[str, torch.Size], narrower: float
) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(zlib.crc32(file.name.encode()))
    tensors = {}
    for name in names:
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
        else:
            scale = 0.02 * (narrower if "o_proj" in name or "down_proj" in name else 1)
            tensors[name] = (torch.randn(shapes[name], generator=generator) * scale).bfloat16()
    beside = file.with_suffix(".partial")
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="folder of the checkpoint, made if it is not there"
    )
    parser.add_argument("--make", action="store_true", help="make the checkpoint and no more")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--order", default="wanda:0.5 > gptq:4")
    parser.add_argument("--schedule", default="block")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--activation-limit", type=int, default=2**20, help="bytes; lower than the activations"
    )
    parser.add_argument("--limit", type=int, default=3 * 2**30, help="bytes of anonymous memory")
    parser.add_argument("--output", type=Path, help="by default CHECKPOINT.out; it is replaced")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    if arguments.make:
        make_checkpoint(arguments.checkpoint, blocks=arguments.blocks)
        return
    folder = arguments.checkpoint  # made by another process, which may need memory for it
    subprocess.run(
        [sys.executable, __file__, folder, "--make", "--blocks", str(arguments.blocks)], check=True
    )
    stored = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {stored:,} bytes ({time.perf_counter() - begin:.0f} s)", flush=True)
    output = arguments.output or folder.with_name(f"{folder.name}.out")
    for old in (output, work := folder.with_name(f"{folder.name}.work")):
        shutil.rmtree(old, ignore_errors=True)

    # From here on, no more memory of its own than that: what would need more ends with an error.
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit, arguments.limit))
    baseline = resident("VmHWM")
    config = LlamaConfig.from_pretrained(folder)
    block, gram = sizes(config)
    bound = baseline + 3 * (block + gram) + arguments.activation_limit
    print(
        f"baseline {mb(baseline)}, largest block in float32 {mb(block)}, X^T X of its distinct inputs {mb(gram)}"
    )

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, config.vocab_size, (arguments.samples, arguments.sequence_length), generator=generator
    )
    begin = time.perf_counter()
    compressor = JointCompressor.from_pretrained(
        *(folder,),
        calibration=ids,
        calibration_samples=len(ids),
        sequence_length=ids.shape[1],
        device="cpu",
    )
    compressed = compressor.compress(
        *(arguments.order, arguments.schedule),
        work_dir=work,
        low_memory=True,
        activation_limit=arguments.activation_limit,
    )
    format = compressed.save_pretrained(output)
    compressed.close()
    remove(work)
    seconds = time.perf_counter() - begin
    peak = resident("VmHWM")
    print(
        f"{arguments.order}, schedule {arguments.schedule}, {ids.numel()} tokens: {seconds:.0f} s, saved as {format}"
    )
    print(f"difference to its manifest: {verify(output) or 'none'}")
    activations = ids.numel() * config.hidden_size * 2
    print(
        f"activations between blocks {mb(activations)}, of which {mb(arguments.activation_limit)} may stay in memory"
    )
    print(
        f"peak resident {mb(peak)}; bound, baseline + 3 x (block + X^T X) + activation limit: {mb(bound)}"
    )
    print(
        f"anonymous memory limited to {mb(arguments.limit)} (RLIMIT_DATA); the checkpoint has {mb(stored)}"
    )
    sys.exit(peak > bound)


def sizes(config: LlamaConfig) -> tuple[int, int]:
    """Bytes of a block in float32, and of the matrices X^T X of its distinct inputs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return 4 * weights, 4 * (3 * hidden * hidden + inner * inner)


def resident(kind: str) -> int:
    """Bytes: "VmRSS" in memory now, "VmHWM" at most so far."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
