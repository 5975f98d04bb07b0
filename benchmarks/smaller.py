"""Structured pruning: perplexity, parameters, bytes, tokens a second, and what a refit is worth.

    python benchmarks/smaller.py tiny-llama builtin builtin
    python benchmarks/smaller.py smollm2 valid.txt test.txt --characters 130000 --output rows.json

Every row is a model that was made smaller, saved and measured. Tokens a second are those of a
forward over `--length` tokens in transformers.
`--output FILE` keeps the rows, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from setting import Rows, evaluation, opened, parser
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor

ORDERS = (
    "width:0.1",
    "width(ratio=0.1, refit=false)",
    "width:0.2",
    "width(ratio=0.2, refit=false)",
    "gptq:4",
    "depth:1",
    "depth:2",
    "depth:3",
    "width:0.2 > gptq:4",
    "gptq:4 > width:0.2",
)
REPEATS = 5


def main() -> None:
    """Fill the table, a row at a time."""
    args = _arguments()
    rows = Rows(args.output)
    compressor, text = opened(args), evaluation(args)
    for order in ("original", *(args.orders or ORDERS)):
        if order not in rows:
            rows[order] = _row(compressor, order, text)
        print(order, json.dumps(rows[order]), flush=True)
    if {"width:0.2", "gptq:4"} <= rows.keys():
        ratio = rows["width:0.2"]["cpu_seconds"] / rows["gptq:4"]["cpu_seconds"]
        print(f"processor time of width:0.2 over that of gptq:4: {ratio:.2f}")


def _row(compressor: JointCompressor, order: str, text: Any) -> dict[str, Any]:
    """Return what an order makes of the model."""
    if order == "original":
        measured = compressor.evaluate(text, progress=False)
        model = compressor.source.load()
        return {
            "perplexity": measured.value,
            "parameters": model.num_parameters(),
            "bytes": compressor.source.bytes,
            "tokens_per_second": _speed(model, compressor.sequence_length),
        }
    begin = time.perf_counter()
    cpu = time.process_time()
    compressed = compressor.compress(order, progress=False)
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    row: dict[str, Any] = {
        "perplexity": compressed.evaluate(text, progress=False).value,
        "parameters": compressed.model.num_parameters(),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "smaller": compressed.manifest.get("smaller", []),
    }
    with tempfile.TemporaryDirectory() as home:
        for format in ("dense", "auto"):
            folder = Path(home) / format
            name = compressed.save_pretrained(folder, format=format)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            row[f"bytes as {name}"] = size
            if format == "dense":
                loaded = AutoModelForCausalLM.from_pretrained(folder)
                row["tokens_per_second"] = _speed(loaded, compressor.sequence_length)
    return row


@torch.no_grad()
def _speed(model: Any, length: int) -> float:
    """Return the tokens a second of a forward, the median of some."""
    model = model.float().eval()  # a processor without bfloat16 would measure its conversions
    ids = torch.arange(length)[None] % 200
    model(ids)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        model(ids)
        times.append(time.perf_counter() - begin)
    return length / statistics.median(times)


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--orders", nargs="*")
    arguments.add_argument("--output")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
