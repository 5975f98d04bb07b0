"""`optimum-order inspect`: what a saved model's manifest says was done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_order.cli.base import Command, printable, size
from optimum_order.errors import ArtifactError

_NOTES = 8


class InspectCommand(Command):
    """Shows the manifest; with `--json`, all of it."""

    @staticmethod
    def parse_args(parser):
        parser.description = (
            "Show what was done to a saved model: base model, order, metrics and bytes before and after, and a table "
            "of its layers. This reads the manifest only; 'optimum-order verify' checks that it is true."
        )
        parser.add_argument("path", metavar="PATH", help="a folder that 'optimum-order export' wrote")
        parser.add_argument("--json", action="store_true", help="print the whole manifest as one JSON object")

    def work(self) -> dict[str, Any]:
        from optimum_order import manifest

        found = manifest.load(self.args.path)
        try:  # a manifest may come from anywhere: its form was checked at the top level only
            self.overview, self.layers, self.notes = _overview(found), _layers(found), _notes(found)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ArtifactError(
                f"The manifest in '{self.args.path}' is damaged ({type(error).__name__}: {error}). Run 'optimum-order "
                "verify' on it, or get the model again."
            ) from error
        return found

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False, highlight=False)
        table = Table(show_header=False)
        for row in self.overview:
            table.add_row(*map(printable, row))
        console.print(table)
        table = Table()
        table.add_column("layer", overflow="fold")
        for column in ("shape", "bits", "group", "pruned", "error, stage by stage"):
            table.add_column(column, justify="right")
        for row in self.layers:
            table.add_row(*map(printable, row))
        console.print(table)
        for note in self.notes[:_NOTES]:
            console.print(printable(note), soft_wrap=True)
        if len(self.notes) > _NOTES:
            console.print(f"... and {len(self.notes) - _NOTES} more notes; --json shows them all")


def _overview(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    base, bytes_ = manifest["base_model"], manifest["bytes"]
    rows = [
        ("base model", base["id"] + (f" at {base['revision']}" if base["revision"] else "")),
        ("order", manifest["order"].replace(" > ", " → ")),
        ("schedule", manifest["schedule"]),
        ("format", manifest["format"]),
    ]
    for name, both in manifest["metrics"].items():
        before = f"{both['before']['value']:.4g}" if both["before"] else "not measured"
        rows.append((name, f"{before} → {both['after']['value']:.4g}"))
    return [
        *rows,
        ("weights on disk", f"{size(bytes_['before'])} → {size(bytes_['after'])}"),
        ("bits per compressed weight", f"{bytes_['per_weight_bits']:.2f}"),
        ("sparsity", f"{manifest['sparsity']:.1%}"),
    ]


def _layers(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, layer in manifest["layers"].items():
        outputs, inputs = layer["shape"]
        group = layer["group_size"]
        rows.append(
            (
                name,
                f"{outputs} x {inputs}",
                str(layer["bits"]),
                "-" if group is None else "row" if group == -1 else str(group),
                f"{layer['pruned'] / (outputs * inputs):.1%}",
                ", ".join(f"{stage['relative_error']:.2g}" for stage in layer["stages"]),
            )
        )
    return rows


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {note}" for name, layer in manifest["layers"].items() for note in layer["notes"]]
