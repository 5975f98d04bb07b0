"""`optimum-order backends`: what can stand in an order, and what a model can be saved as."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from optimum_order.cli.base import Command


class BackendsCommand(Command):
    """Lists every method and format that is installed, third-party ones included."""

    @staticmethod
    def parse_args(parser):
        parser.description = (
            "List every compression method with its options, and every format, plug-ins included."
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    def work(self) -> dict[str, Any]:
        from optimum_order import formats
        from optimum_order.engine.recipe import available

        return {
            "methods": [_method(cls) for cls in available().values()],
            "formats": [
                {"name": name, "summary": cls.summary} for name, cls in formats.available().items()
            ],
        }

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False, highlight=False)
        console.print(
            "A stage is written method, method:value (its first option) or method(key=value, ...).\n"
        )
        for method in result["methods"]:
            data = "needs calibration data" if method["calibration"] else "needs no data"
            table = Table(
                title=f"{method['name']}: {method['summary']}; {data}",
                title_justify="left",
                expand=True,
            )
            table.add_column("option", no_wrap=True)
            table.add_column("default", no_wrap=True)
            table.add_column("allowed", ratio=3)
            table.add_column("meaning", ratio=4)
            for option in method["options"]:
                default = "required" if option["required"] else _text(option["default"])
                table.add_row(option["name"], default, option["allowed"], option["help"])
            console.print(table, "")
        table = Table("format", "meaning", title="formats", title_justify="left", expand=True)
        for each in result["formats"]:
            table.add_row(each["name"], each["summary"])
        console.print(table)


def _method(cls: Any) -> dict[str, Any]:
    from optimum_order.backends import Backend
    from optimum_order.backends.base import describe

    hints = typing.get_type_hints(cls.Options)
    return {
        "name": cls.name,
        "summary": cls.summary,
        "kind": cls.kind if issubclass(cls, Backend) else "allocate",
        # an allocator measures every candidate on calibration data before it chooses
        "calibration": bool(cls.needs) if issubclass(cls, Backend) else True,
        "options": [
            {
                "name": field.name,
                "help": field.metadata["help"],
                "allowed": field.metadata["allowed"] or describe(hints[field.name]),
                "required": field.default is dataclasses.MISSING,
                "default": None if field.default is dataclasses.MISSING else field.default,
            }
            for field in dataclasses.fields(cls.Options)
        ],
    }


def _text(value: Any) -> str:
    """A default as it would be written in an order."""
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)
