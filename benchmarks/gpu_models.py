"""The models of `gpu.sh`: a copy of SmolLM2-135M, and a Llama of 1 B random weights.

python benchmarks/gpu_models.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peers import make_llama

from optimum_order import JointCompressor

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
}
TINY = LLAMA_1B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smollm2", default="HuggingFaceTB/SmolLM2-135M", help="id or folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of 1 B")
    args = parser.parse_args()
    if not (args.folder / "smollm2").exists():
        source = JointCompressor.from_pretrained(args.smollm2, dtype="bfloat16").source
        model: torch.nn.Module = source.load()
        model.to(torch.bfloat16).save_pretrained(args.folder / "smollm2")
        source.processor.save_pretrained(args.folder / "smollm2")
    if not (args.folder / "llama-1b").exists():
        make_llama(args.folder / "llama-1b", TINY if args.tiny else LLAMA_1B, "bfloat16")


if __name__ == "__main__":
    main()
