"""`optimum-order methods`: the stages of an order, and the formats of a saved model."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from optimum_order.cli.base import Command
from optimum_order.cli.tables import console


class MethodsCommand(Command):
    """Lists every installed method and format, third-party ones included."""

    name = "methods"
    aliases = ("backends",)
    summary = "list the compression methods with their options, and the formats"
    description = """\
List every compression method with its options, and every format, plug-ins
included.
"""

    def work(self) -> dict[str, Any]:
        from optimum_order import formats
        from optimum_order.engine.recipe import available

        return {
            "methods": [_describe(method) for method in available().values()],
            "formats": [
                {"name": name, "summary": cls.summary} for name, cls in formats.available().items()
            ],
        }

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        screen = console()
        screen.print(
            "A stage is written method, method:value (the first option) or method(key=value, ...)."
            "\n"
        )
        for method in result["methods"]:
            data = "needs calibration data" if method["calibration"] else "needs no data"
            title = f"{method['name']}: {method['summary']}; {data}"
            table = Table(title=title, title_justify="left", expand=True)
            table.add_column("option", no_wrap=True)
            table.add_column("default", no_wrap=True)
            table.add_column("allowed", ratio=3)
            table.add_column("meaning", ratio=4)
            for option in method["options"]:
                default = "required" if option["required"] else _text(option["default"])
                table.add_row(option["name"], default, option["allowed"], option["help"])
            screen.print(table, "")
        table = Table("format", "meaning", title="formats", title_justify="left", expand=True)
        for entry in result["formats"]:
            table.add_row(entry["name"], entry["summary"])
        screen.print(table)


def _describe(method: Any) -> dict[str, Any]:
    from optimum_order.backends.base import describe

    types = typing.get_type_hints(method.Options)
    return {
        "name": method.name,
        "summary": method.summary,
        "kind": method.kind,
        "calibration": method.measures or bool(method.needs),
        "options": [
            {
                "name": field.name,
                "help": field.metadata["help"],
                "allowed": field.metadata["allowed"] or describe(types[field.name]),
                "required": field.default is dataclasses.MISSING,
                "default": None if field.default is dataclasses.MISSING else field.default,
            }
            for field in dataclasses.fields(method.Options)
        ],
    }


def _text(value: Any) -> str:
    """Return a default as an order would have it."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
