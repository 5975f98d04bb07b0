"""`optimum-order inspect`: print what was done to a saved model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command, printable
from optimum_order.cli.tables import arrows, console, metric_values, outcome_rows
from optimum_order.errors import ArtifactError

if TYPE_CHECKING:
    from rich.table import Table

_MOST_LINES = 8


class InspectCommand(Command):
    """Shows the manifest, and whether it is true; with `--json`, all of it."""

    name = "inspect"
    summary = "show what was done to a saved model, and what it cost"
    description = """\
Show what was done to a saved model: base model, order, metrics and bytes
before and after, its layers in a line, and whether 'optimum-order verify'
confirms all of it. Exit code 1 if not. --layers shows each layer.
"""
    json_help = (
        "print the whole manifest as one JSON object, and under 'problems' the result of verify"
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.saved_model(parser)
        parser.add_argument(
            "--layers",
            action="store_true",
            help="show a table of all layers first, with the error that each stage added",
        )
        parser.add_argument(
            "--no-verify",
            action="store_true",
            help="read the manifest only; of a model on the Hub, download only that",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import hub, manifest
        from optimum_order.artifact.verify import verify

        args = self.args
        folder = hub.locate(args.path, revision=args.revision, manifest_only=args.no_verify)
        facts = manifest.load(folder)
        try:  # a manifest may come from anywhere: only its top level was checked
            self._overview = _overview_rows(facts)
            self._layers = _layer_rows(facts)
            self._notes = _notes(facts)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ArtifactError(
                f"The manifest in '{args.path}' is damaged ({type(error).__name__}: {error}). Run "
                "'optimum-order verify' on it, or get the model again."
            ) from error
        return facts | {"problems": None if args.no_verify else verify(folder, progress=True)}

    def exit_code(self, result: dict[str, Any]) -> int:
        return 1 if result["problems"] else 0

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        screen = console()
        if self.args.layers:
            screen.print(self._layer_table())
        problems = result["problems"] or []
        notes = self._notes if self.args.layers else []
        for lines, style in ((notes, None), (problems, "red")):
            for line in lines[:_MOST_LINES]:
                screen.print(printable(line), style=style, soft_wrap=True)
            if len(lines) > _MOST_LINES:
                more = len(lines) - _MOST_LINES
                screen.print(f"... and {more} more; --json shows them all")
        # the overview is last, to be on the screen after many layers
        table = Table(show_header=False)
        for row in self._overview:
            table.add_row(*map(printable, row))
        if self._notes and not self.args.layers:
            table.add_row("notes", f"{len(self._notes)} on layers: --layers shows them")
        if result["problems"] is not None:
            count = len(problems)
            no = f"no: {problems[0]}" if count == 1 else f"no: {count} differences"
            verdict = Text(no, "bold red") if problems else Text("yes", "bold green")
            table.add_row("verifies", verdict)
        screen.print(table)

    def _layer_table(self) -> Table:
        """Return a table of all layers."""
        from rich.table import Table

        table = Table()
        # the beginning that all names share is printed once, so that a row fits into 80 columns
        names = [row[0] for row in self._layers]
        shared = os.path.commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (no paths)
        table.add_column(printable(f"{shared}.") if shared else "layer", overflow="fold")
        for column in ("shape", "bits", "group", "pruned", "error by stage"):
            table.add_column(column, justify="right")
        for name, *cells in self._layers:
            table.add_row(*map(printable, (name[len(shared) + 1 :] if shared else name, *cells)))
        return table


def _overview_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    base = manifest["base_model"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    return [
        ("base model", base["id"] + revision),
        *([("merged adapter", base["adapter"]["id"])] if "adapter" in base else []),
        ("order", arrows(manifest["order"])),
        ("schedule", manifest["schedule"]),
        ("format", manifest["format"]),
        ("loads with", ", ".join(("transformers", *_packages(manifest)))),
        ("layers", _layers_in_a_line(manifest["layers"])),
        *outcome_rows({**manifest, "metrics": metric_values(manifest["metrics"])}),
    ]


def _packages(manifest: Mapping[str, Any]) -> Sequence[str]:
    """Return the packages that loading needs; 0.1.0 did not write them down."""
    from optimum_order import formats

    if "requires" in manifest:
        return [str(package) for package in manifest["requires"]]
    codec = formats.available().get(manifest["format"])
    return () if codec is None else codec.packages


def _layers_in_a_line(layers: Mapping[str, Any]) -> str:
    """Return how many layers there are, how wide their codes are, and which lost most."""
    bits = sorted({layer["bits"] for layer in layers.values()})
    widths = f"{bits[0]}" if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
    errors = {
        name: sum(stage["relative_error"] for stage in layer["stages"])
        for name, layer in layers.items()
    }
    worst = max(errors, key=errors.__getitem__)
    inputs = sorted({layer["inputs"] for layer in layers.values() if "inputs" in layer})
    rounded = f", inputs {' and '.join(inputs)}" if inputs else ""
    ranks = sorted(layer["adapter"]["rank"] for layer in layers.values() if "adapter" in layer)
    if ranks:
        words = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        rounded += f", {len(ranks)} with an adapter of rank {words}"
    return f"{len(layers)} of {widths} bits{rounded}, most error in {worst} ({errors[worst]:.2g})"


def _layer_rows(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, layer in manifest["layers"].items():
        outputs, inputs = layer["shape"]
        group = {None: "-", -1: "row"}.get(layer["group_size"], str(layer["group_size"]))
        pruned = f"{layer['pruned'] / (outputs * inputs):.1%}"
        errors = ", ".join(f"{stage['relative_error']:.2g}" for stage in layer["stages"])
        rows.append((name, f"{outputs} x {inputs}", str(layer["bits"]), group, pruned, errors))
    return rows


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {note}" for name, layer in manifest["layers"].items() for note in layer["notes"]
    ]
