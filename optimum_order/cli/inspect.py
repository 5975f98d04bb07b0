"""`optimum-order inspect`: what a saved model's manifest says was done to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from optimum_order.artifact.verify import verify
from optimum_order.cli.base import PATH, Command, printable, size
from optimum_order.errors import ArtifactError

_MOST = 8


class InspectCommand(Command):
    """Shows the manifest, and whether it is true; with `--json`, all of it."""

    @staticmethod
    def parse_args(parser):
        parser.description = (
            "Show what was done to a saved model: base model, order, metrics and bytes before and after, and a table "
            "of its layers, and whether 'optimum-order verify' finds that all of it is true. Exit code 1 if not."
        )
        parser.add_argument("path", metavar="PATH", help=PATH)
        parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit")
        parser.add_argument(
            "--no-verify",
            action="store_true",
            help="read the manifest only; of a model on the Hub, download only that",
        )
        parser.add_argument(
            "--json",
            action="store_true",
            help="print the whole manifest as one JSON object, and under 'problems' what verify found",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import hub, manifest

        folder = hub.locate(
            self.args.path, revision=self.args.revision, manifest_only=self.args.no_verify
        )
        found = manifest.load(folder)
        try:  # a manifest may come from anywhere: its form was checked at the top level only
            self.overview, self.layers, self.notes = _overview(found), _layers(found), _notes(found)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ArtifactError(
                f"The manifest in '{self.args.path}' is damaged ({type(error).__name__}: {error}). Run 'optimum-order "
                "verify' on it, or get the model again."
            ) from error
        return found | {"problems": None if self.args.no_verify else verify(folder)}

    def exit_code(self, result: dict[str, Any]) -> int:
        return 1 if result["problems"] else 0

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(markup=False, highlight=False)
        table = Table()
        # What all names begin with is said once, so that a row is a line on a screen of 80 columns.
        names = [row[0] for row in self.layers]
        shared = os.path.commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (these are no paths)
        table.add_column(printable(f"{shared}.") if shared else "layer", overflow="fold")
        for column in ("shape", "bits", "group", "pruned", "error by stage"):
            table.add_column(column, justify="right")
        for name, *cells in self.layers:
            table.add_row(*map(printable, (name[len(shared) + 1 :] if shared else name, *cells)))
        console.print(table)
        problems = result["problems"] or []
        for lines, style in ((self.notes, None), (problems, "red")):
            for line in lines[:_MOST]:
                console.print(printable(line), style=style, soft_wrap=True)
            if len(lines) > _MOST:
                console.print(f"... and {len(lines) - _MOST} more; --json shows them all")
        table = Table(
            show_header=False
        )  # last, so that it is still on the screen where there are many layers
        for row in self.overview:
            table.add_row(*map(printable, row))
        if result["problems"] is not None:
            no = Text(
                f"no: {problems[0]}" if len(problems) == 1 else f"no: {len(problems)} differences",
                "bold red",
            )
            table.add_row("verifies", no if problems else Text("yes", "bold green"))
        console.print(table)


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
        (
            "weights on disk",
            f"{size(bytes_['before']) if bytes_['before'] else 'not known'} → {size(bytes_['after'])}",
        ),
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
    return [
        f"{name}: {note}" for name, layer in manifest["layers"].items() for note in layer["notes"]
    ]
