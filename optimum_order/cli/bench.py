"""`optimum-order bench`: the speed and the memory of a saved model in the engines here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from optimum_order.cli.base import Command, printable
from optimum_order.cli.tables import console
from optimum_order.files import size


class BenchCommand(Command):
    """Runs a saved model in every engine; exit code 1 if none ran it."""

    name = "bench"
    summary = "measure tokens per second and memory of a saved model"
    description = """\
Run a saved model in transformers, llama.cpp and vLLM, each in a process of
its own: tokens per second of a prompt that is read at once and of generation
one by one, and the most memory that the process held. llama.cpp runs folders
of the format gguf. Exit code 1 if no engine ran the model.
"""
    epilog = """\
examples:
  optimum-order bench out
  optimum-order bench out --threads 4 --engine transformers \\
      --engine llama.cpp=env/bin/python
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="FOLDER", help="the folder of a saved model")
        parser.add_argument(
            "--engine",
            metavar="NAME[=PYTHON]",
            action="append",
            help="transformers, llama.cpp or vllm, and the python of the environment that has it; "
            "may be repeated (default: all, in this environment)",
        )
        numbers = {
            "--prompt": (int, 128, "tokens of the prompt"),
            "--generate": (int, 32, "tokens to generate"),
            "--repeats": (int, 3, "how often; the median counts"),
            "--threads": (int, None, "threads on the CPU (default: the cores of this process)"),
            "--timeout": (float, 600.0, "seconds for each engine"),
        }
        for name, (kind, default, text) in numbers.items():
            if default is not None:
                text = f"{text} (default: {default:g})"
            parser.add_argument(name, type=kind, default=default, metavar="N", help=text)

    def work(self) -> dict[str, Any]:
        from optimum_order import bench

        args = self.args
        threads = _cores() if args.threads is None else args.threads
        load = bench.Load(args.prompt, args.generate, args.repeats, threads, args.timeout)
        engines = [bench.engine_of(text) for text in args.engine or bench.ENGINES]
        speeds = bench.measure(
            Path(args.folder),
            engines,
            load,
            progress=lambda engine: print(f"running {engine} ...", file=sys.stderr),
        )
        return {
            "folder": args.folder,
            **dataclasses.asdict(load),
            "engines": [dataclasses.asdict(speed) for speed in speeds],
        }

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        table = Table(
            title=printable(
                f"{result['folder']}: {result['prompt']} tokens read, {result['generate']} "
                f"generated, {result['threads']} threads"
            ),
            title_justify="left",
        )
        table.add_column("engine", no_wrap=True)
        for column in ("prompt tokens/s", "generated tokens/s", "peak memory", "loaded in"):
            table.add_column(column, justify="right")
        remarks = []
        for row in result["engines"]:
            if row["status"] != "ok":
                table.add_row(row["engine"], row["status"], "", "", "")
                remarks.append(f"{row['engine']} {row['status']}: {row['reason']}")
                continue
            memory = size(row["peak_bytes"])
            if row["peak_device_bytes"]:
                memory += f" + {size(row['peak_device_bytes'])} GPU"
            table.add_row(
                f"{row['engine']} {row['version'] or ''}".strip(),
                f"{row['prompt_rate']:.1f}",
                f"{row['generate_rate']:.1f}",
                memory,
                f"{row['load_seconds']:.1f} s",
            )
        screen = console()
        screen.print(table)
        for remark in remarks:
            print(printable(remark))

    def exit_code(self, result: dict[str, Any]) -> int:
        return 0 if any(row["status"] == "ok" for row in result["engines"]) else 1


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
