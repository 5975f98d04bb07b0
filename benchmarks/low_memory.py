"""A checkpoint that is larger than the memory it is compressed in.

python benchmarks/low_memory.py CHECKPOINT
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich.progress import track
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def make_checkpoint(
    folder: str | Path, *, blocks: int = 48, hidden: int = 2048, intermediate: int = 5632, vocabulary: int = 8192
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
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in track(files.items(), f"Writing {folder}"):
        if not (folder / file).exists():
            _write_file(folder / file, names, shapes, 1 / math.sqrt(2 * blocks))
    weight_map = {name: file for file, names in files.items() for name in names}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(folder)  # the last, so that a folder with a config is whole
    return folder


def _write_file(file: Path, names: Iterable[str], shapes: dict[str, torch.Size], narrower: float) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint, made if it is not there")
    arguments = parser.parse_args()
    folder = make_checkpoint(arguments.checkpoint)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
