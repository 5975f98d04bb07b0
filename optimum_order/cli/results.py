"""The result of commands that save a model: what `--json` prints, and what people see."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_order.cli.tables import arrows, console, metric_values, outcome_rows


def saved(manifest: Mapping[str, Any], output: Path, watch: Stopwatch) -> dict[str, Any]:
    """Return what a command says of a model that it has saved.

    Args:
        manifest: The manifest of the model.
        output: The folder.
        watch: The seconds of each step; it stops.
    """
    watch.stop()
    result = {
        "output": str(output),
        "order": manifest["order"],
        "format": manifest["format"],
        "schedule": manifest["schedule"],
        "seconds": watch.seconds,
        "bytes": manifest["bytes"],
        "sparsity": manifest["sparsity"],
        "metrics": metric_values(manifest["metrics"]),
    }
    fields = ("plan", "search", "coverage", "unloaded")
    return result | {field: manifest[field] for field in fields if field in manifest}


def show_saved(result: Mapping[str, Any]) -> None:
    """Print what `saved` returned.

    Args:
        result: The result.
    """
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("order", arrows(result["order"]))
    for how in ("plan", "search"):
        if how in result:
            table.add_row("why", result[how]["reason"])
    for row in outcome_rows(result):
        table.add_row(*row)
    table.add_row("format", result["format"])
    seconds = ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items())
    table.add_row("seconds", seconds)
    screen = console()
    screen.print(table)
    screen.print(
        f"Saved to {result['output']}; transformers loads it from there {_needs(result)}.",
        soft_wrap=True,
    )
    if "url" in result:
        screen.print(f"Uploaded: {result['url']}", soft_wrap=True)


class Stopwatch:
    """The seconds of each step of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Record the seconds since the last step as those of this one."""
        now = time.perf_counter()
        self.seconds[step] = round(now - self._last, 2)
        self._last = now

    def stop(self) -> None:
        """Record the seconds of all steps together."""
        self.seconds["total"] = round(time.perf_counter() - self._begin, 2)


def _needs(result: Mapping[str, Any]) -> str:
    """Return what transformers needs to load the result, as the end of a sentence."""
    from optimum_order import formats

    format = formats.available()[result["format"]]
    if "adapter" in result["bytes"]:
        first = f", after 'import {format.import_first}'" if format.import_first else ""
        return f"without its adapter, and PEFT adds that{first}"
    if format.import_first:
        return f"after 'import {format.import_first}'"
    if format.stock:
        return "by itself"
    told = f"with gguf_file='{format.gguf_file}', " if format.gguf_file else ""
    return f"{told}where {', '.join(format.packages)} are installed"
