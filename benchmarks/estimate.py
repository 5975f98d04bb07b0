"""What `JointCompressor.estimate` says beside what a run takes: seconds, memory, and bytes on disk.

python benchmarks/estimate.py

The models are tiny-llama, a Llama of 88 million random weights in float32 and one half as wide in bfloat16, and
tiny-vit. Every estimate and every run has a process of its own. Seconds are those of `compress`, the reading of the
checkpoint included; memory is what the process has resident at most, as a run is by default and in low memory; bytes
are those of the weight files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import LENGTH, LLAMA, SAMPLES, VOCABULARY, make_llama, memory, save_ids, tokens

CASES = [  # model, order, format, schedule
    ("tiny-llama", "wanda:0.5", "auto", "stage"),
    ("tiny-llama", "sparsegpt:0.5 > gptq:4", "auto", "stage"),
    ("tiny-llama", "sparsegpt:0.5 > gptq:4", "sparse", "stage"),
    ("tiny-llama", "rtn:3", "gptq", "stage"),
    ("tiny-llama", "bitsandbytes:nf4", "auto", "stage"),
    ("tiny-llama", "mixed_precision:4", "auto", "stage"),
    ("tiny-vit", "wanda:0.5 > gptq:4", "auto", "stage"),
    ("small", "gptq:4", "auto", "stage"),
    ("llama", "wanda:0.5", "auto", "stage"),
    ("llama", "gptq:4", "auto", "stage"),
    ("llama", "sparsegpt:0.5 > gptq:4", "auto", "stage"),
    ("llama", "sparsegpt:0.5 > gptq:4", "sparse", "block"),
]
SMALL = LLAMA | {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def job(
    kind: str, model: str, order: str, format: str, schedule: str, threads: int, ids: str
) -> dict:
    """An estimate, or a run, in this process."""
    import torch

    from optimum_order import JointCompressor

    torch.set_num_threads(threads)
    calibration = tokens({"tokens": ids}) if Path(model).exists() else "builtin"
    compressor = JointCompressor.from_pretrained(
        model, calibration=calibration, calibration_samples=SAMPLES, sequence_length=LENGTH
    )
    begin = time.perf_counter()
    if kind == "estimate":
        result = compressor.estimate(order, schedule, format=format).as_dict()
        return result["total"] | {"format": result["format"], "took": time.perf_counter() - begin}
    if kind == "low":
        with tempfile.TemporaryDirectory() as folder:
            compressor.compress(
                order, schedule, work_dir=Path(folder) / "work", low_memory=True, progress=False
            )
            return {"low_memory": memory("VmHWM")}
    compressed = compressor.compress(order, schedule, progress=False)
    seconds, peak = time.perf_counter() - begin, memory("VmHWM")
    with tempfile.TemporaryDirectory() as folder:
        chosen = compressed.save_pretrained(Path(folder) / "model", format)
        return {
            "seconds": seconds,
            "memory": peak,
            "bytes": compressed.manifest["bytes"]["after"],
            "format": chosen,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["tiny-llama", "tiny-vit", "small", "llama"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(job(*json.loads(args.job))))
        return
    import torch
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "order", "format")
    measured = ("measured", "ratio")
    for column in (
        "seconds",
        *measured,
        "MB",
        *measured,
        "low MB",
        *measured,
        "bytes",
        *measured,
        "took",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        made = {"llama": (LLAMA, "float32"), "small": (SMALL, "bfloat16")}
        for name in set(args.models) & set(made):
            make_llama(Path(folder) / name, *made[name])
        drawn = torch.randint(
            0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        ids = save_ids(drawn, Path(folder) / "ids.safetensors")
        for model, order, format, schedule in CASES:
            if model not in args.models:
                continue
            path = str(Path(folder) / model) if model in made else model
            result = {}
            for kind in ("estimate", "run", "low"):
                asked = json.dumps([kind, path, order, format, schedule, args.threads, str(ids)])
                command = [sys.executable, __file__, "--job", asked]
                environment = {
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "OMP_NUM_THREADS": str(args.threads),
                }
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{asked}: {done.stderr[-3000:]}")
                result[kind] = json.loads(done.stdout.splitlines()[-1])
            said, true = result["estimate"], result["run"] | result["low"]
            if said["format"] != true["format"]:
                raise SystemExit(
                    f"{model}, {order}: expected {said['format']}, got {true['format']}"
                )
            row = [
                f"{said['seconds']:.1f}",
                f"{true['seconds']:.1f}",
                f"{said['seconds'] / true['seconds']:.2f}",
            ]
            for kind in ("memory", "low_memory"):
                row += [f"{entry[kind] / 1e6:.0f}" for entry in (said, true)]
                row += [f"{said[kind] / true[kind]:.2f}"]
            row += [f"{entry['bytes']:,}" for entry in (said, true)]
            row += [
                "exact"
                if said["bytes"] == true["bytes"]
                else f"{said['bytes'] / true['bytes']:.4f}"
            ]
            if said["exact"] and said["bytes"] != true["bytes"]:
                row[-1] += ", NOT exact"
            table.add_row(
                model, f"{order} ({schedule})", true["format"], *row, f"{said['took']:.1f} s"
            )
            print(*table.columns[0]._cells[-1:], order, *row, file=sys.stderr, flush=True)
    Console(width=210).print(table)
    print(
        f"{args.threads} threads. Each ratio is the estimate over what was measured; took: the estimate itself."
    )


if __name__ == "__main__":
    main()
