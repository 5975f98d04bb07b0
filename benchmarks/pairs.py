"""Every pair of methods in both orders: the run ends well, or is refused in one line.

    python benchmarks/pairs.py

A small Llama of random weights is compressed by each pair of stages, saved in the format that
"auto" chooses, and verified. Refusals are shown and counted. After anything else that goes wrong the
exit status is 1.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError, OrderError

STAGES = (
    "magnitude:0.3",
    "wanda(pattern=2:4)",
    "wanda(sparsity=0.4, allocation=owl)",
    "sparsegpt:0.4",
    "sparsegpt(sparsity=0.4, allocation=global)",
    "alps:0.4",
    "rtn(bits=4, group_size=32)",
    "rtn(bits=3, group_size=32, symmetric=false)",
    "gptq(bits=4, group_size=32)",
    "gptq(bits=3, group_size=-1)",
    "gptq(bits=4, group_size=32, drift=1)",
    "bitsandbytes:nf4",
    "bitsandbytes:int8",
    "mixed_precision(bits=4, quantizer=rtn)",
    "mixed_precision(bits=4, error=loss)",
    "ecsq:3",
    "width:0.25",
    "heads:0.5",
    "depth:1",
    "rotate",
    "equalize",
    "activations:8",
    "refit(steps=3, batch_size=2)",
    "distill(steps=3, rate=0.001, batch_size=2)",
    "lora(steps=3, rank=2, batch_size=2)",
    "eora:2",
)
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def main() -> None:
    """Run every pair and print what became of it."""
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # some pairs gain nothing, and say so
    torch.manual_seed(0)
    ends: Counter[str] = Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(home)
        compressor = JointCompressor.from_pretrained(
            home, calibration=torch.randint(0, 64, (12, 24)), sequence_length=24, device="cpu"
        )
        for pair in itertools.product(STAGES, repeat=2):
            order = " > ".join(pair)
            try:
                _run(compressor, order)
                ends["well"] += 1
            except (OrderError, FormatError) as refusal:
                ends["refused"] += 1
                print(f"{order}: {str(refusal)[:100]}", flush=True)
            except Exception as error:  # whatever it is, this is what is looked for
                ends["broken"] += 1
                print(f"BROKEN {order}: {error!r}", flush=True)
    seconds = time.perf_counter() - begin
    print(
        f"{len(STAGES) ** 2} pairs: {ends['well']} well, {ends['refused']} refused, "
        f"{ends['broken']} broken, {seconds:.0f} s"
    )
    sys.exit(ends["broken"] > 0)


def _run(compressor: JointCompressor, order: str) -> None:
    """Compress, save and verify.

    Raises:
        OrderError: If the order is refused.
        FormatError: If no format holds its result.
        ArtifactError: If the saved model does not verify.
    """
    compressed = compressor.compress(order, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out")
        if problems := verify(Path(folder) / "out"):
            raise ArtifactError(problems[0])


if __name__ == "__main__":
    main()
