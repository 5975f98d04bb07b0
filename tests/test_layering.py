"""Imports only ever point down the house, so that every floor can be understood without those above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_order

ROOT = Path(optimum_order.__file__).parent

# Top floor first.
FLOORS = [
    "cli",
    "testing",
    "compressor",
    "compressed",
    "session",
    "study",
    "search",
    "estimate",
    "engine",
    "artifact",
    "formats",
    "calibration",
    "evaluation",
    "backends",
    "data",
    "models",
    "layers",
    "order",
    "registry",
    "files",
    "errors",
]
FLOOR = {name: floor for floor, name in enumerate(FLOORS)}


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Every (module, name) of ours that a source file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, "")
                for alias in node.names
                if alias.name.split(".")[0] == "optimum_order"
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            if node.module.split(".")[0] == "optimum_order":
                yield from ((node.module, alias.name) for alias in node.names)


def upward(part: str, source: str) -> list[str]:
    """The imports of a file in the part `part` of the package that point up."""
    found = []
    for module, name in imports(source):
        path = [*module.split(".")[1:], name]
        if path == ["__version__"]:
            continue  # a constant that the package itself defines
        assert path[0] in FLOOR, (
            f"'{path[0]}' stands on no floor: add it to FLOORS, where it belongs"
        )
        if FLOOR[path[0]] < FLOOR[part]:
            found.append(f"{part} imports {module}.{name}")
    return found


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_points_up(file):
    assert part_of(file) in FLOOR, (
        f"'{part_of(file)}' stands on no floor: add it to FLOORS, where it belongs"
    )
    assert upward(part_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from optimum_order.compressor import JointCompressor",
        "from optimum_order.engine import run",
        "import optimum_order.cli.compress",
        "def f():\n    from optimum_order.formats import dense",
        "if TYPE_CHECKING:\n    from optimum_order.compressor import CompressedModel",
    ],
)
def test_an_import_that_points_up_is_seen(source):
    assert len(upward("backends", source)) == 1
    assert upward("cli", source) == []


def test_only_calibration_owns_a_hook():
    hooked = [
        str(file.relative_to(ROOT))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("register_")
        and "hook" in node.attr
        if part_of(file) != "calibration"
    ]
    assert hooked == []
