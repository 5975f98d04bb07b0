"""What a byte buys: log-perplexity above the original, entropy-coded against fixed-width models.

    python benchmarks/bytes.py tiny-llama builtin builtin
    python benchmarks/bytes.py smollm2 valid.txt test.txt --characters 130000 --samples 32

Every row is a model that was compressed, saved and measured: its bits are the bytes of the
compressed layers in the saved files, everything counted. `--output FILE` keeps the rows, and a
second run goes on from there. `--reload` measures the folder too, as stock transformers loads it.
SmolLM2 comes from `benchmarks/smollm2.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact import manifest

ORDERS = (
    "ecsq:3",
    "gptq(bits=4, group_size=64)",
    "ecsq:2.5",
    "gptq(bits=3, group_size=64)",
    "ecsq:2",
    "ecsq:3.5",
    "gptq(bits=4, group_size=32)",
    "gptq(bits=3, group_size=128)",
)


def main() -> None:
    """Fill the table, a row at a time."""
    args = _arguments()
    file = Path(args.output) if args.output else None
    rows: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}
    compressor = JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.samples,
        sequence_length=args.length,
        embeddings=args.embeddings,
    )
    text: Any = args.evaluation
    if args.characters:
        text = [Path(args.evaluation).read_text(encoding="utf-8")[: args.characters]]
    for order in ("original", *(args.orders or ORDERS)):
        if order not in rows:
            rows[order] = _row(compressor, order, text, reload=args.reload)
            if file:
                file.write_text(json.dumps(rows, indent=1) + "\n")
        _show(order, rows[order], rows["original"])


def _row(compressor: JointCompressor, order: str, text: Any, *, reload: bool) -> dict[str, Any]:
    """Return what an order makes of the model.

    Args:
        compressor: The model.
        order: The order.
        text: What is measured on.
        reload: Whether the saved folder is measured too.
    """
    if order == "original":
        measured = compressor.evaluate(text, progress=False)
        return {"perplexity": measured.value, "windows": len(measured.scores)}
    begin = time.perf_counter()
    cpu = time.process_time()
    compressed = compressor.compress(order, progress=False)
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out")
        facts = manifest.load(Path(folder) / "out")
        size = sum(path.stat().st_size for path in (Path(folder) / "out").iterdir())
        again = _reloaded(compressor, Path(folder) / "out", text) if reload else {}
    measured = compressed.evaluate(text, progress=False)
    return {
        "perplexity": measured.value,
        "bits": facts["bytes"]["per_weight_bits"],
        "bytes": size,
        "format": facts["format"],
        "seconds": seconds,
        "cpu_seconds": cpu,
        **again,
    }


def _reloaded(compressor: JointCompressor, folder: Path, text: Any) -> dict[str, float]:
    """Return the perplexity of what stock transformers makes of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    samples = compressor.evaluation_samples(text)
    metric = compressor.metric(model, "perplexity")
    measured = metric.measure(model, samples, batch_size=samples.batch_size, progress=False)
    return {"reloaded": measured.value}


def _show(order: str, row: dict[str, Any], original: dict[str, Any]) -> None:
    above = math.log(row["perplexity"] / original["perplexity"])
    if order == "original":
        print(f"{order:32} perplexity {row['perplexity']:.3f}, {row['windows']} windows")
        return
    again = f" ({row['reloaded']:.3f} reloaded)" if "reloaded" in row else ""
    print(
        f"{order:32} {row['bits']:.3f} bits, perplexity {row['perplexity']:.3f}{again} "
        f"(+{above:.4f}), folder {row['bytes'] / 1e6:.2f} MB, {row['format']}, "
        f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--characters", type=int, help="of the evaluation file, from its beginning")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--orders", nargs="*")
    parser.add_argument("--embeddings", default="keep", help="as `optimum-order compress` has it")
    parser.add_argument("--reload", action="store_true", help="measure the saved folders too")
    parser.add_argument("--output")
    return parser.parse_args()


if __name__ == "__main__":
    main()
