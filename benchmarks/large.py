"""A model of 8 B weights, compressed on one GPU block by block: what a dry run says, and what the run takes.

    python benchmarks/large.py large-output
    python benchmarks/large.py large-output --device cpu --blocks 2 --hidden 256 --inner 512 --vocabulary 1024

The weights are random, in the shapes of Llama 3.1 8B unless told otherwise; so are the calibration tokens. Seconds are
those of `compress` and of `save_pretrained`, the reading of the checkpoint included. The memory of the GPU is what
PyTorch holds at most.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from low_memory import make_checkpoint, resident

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify


def main() -> None:
    """Write the checkpoint, compress it, and print the table."""
    args = _arguments()
    begin = time.perf_counter()
    model = make_checkpoint(
        args.folder / "model",
        blocks=args.blocks,
        hidden=args.hidden,
        intermediate=args.inner,
        vocabulary=args.vocabulary,
        processes=args.processes,
    )
    print(f"checkpoint written in {time.perf_counter() - begin:.0f} s", flush=True)
    if args.make:
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (args.samples, args.length), generator=generator)
    compressor = JointCompressor.from_pretrained(
        model,
        calibration=ids,
        calibration_samples=args.samples,
        sequence_length=args.length,
        device=args.device,
    )
    said = compressor.estimate(args.order, args.schedule).as_dict()
    print(json.dumps(said["total"]), flush=True)
    begin = time.perf_counter()
    compressed = compressor.compress(
        args.order,
        args.schedule,
        low_memory=True,
        work_dir=args.folder / "work",
        progress=args.progress,
    )
    seconds = time.perf_counter() - begin
    format = compressed.save_pretrained(args.folder / "out")
    saved = time.perf_counter() - begin
    row = {
        "order": args.order,
        "weights": sum(state.weight.numel() for state in compressed.layers.values()),
        "tokens": ids.numel(),
        "format": format,
        "seconds": round(seconds, 1),
        "seconds with saving": round(saved, 1),
        "bytes before": compressor.source.bytes,
        "bytes after": compressed.manifest["bytes"]["after"],
        "resident": resident("VmHWM"),
    }
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
        row["memory of the GPU"] = torch.cuda.max_memory_allocated()
    print(json.dumps(row, indent=1), flush=True)
    compressed.close()
    if args.verify:
        print(f"difference to its manifest: {verify(args.folder / 'out') or 'none'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--order", default="gptq:4")
    parser.add_argument("--schedule", default="stage")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=8, help="that write the checkpoint")
    parser.add_argument("--make", action="store_true", help="write the checkpoint and no more")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--verify", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
