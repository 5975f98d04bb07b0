"""Imports only ever point down, so that every floor can be understood without those above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_order

ROOT = Path(optimum_order.__file__).parent

# Top floor first: folders, and the modules beside them.
FLOORS = [
    "__main__",
    "cli",
    "testing",
    "bench",
    "integrations",
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
    "progress",
    "files",
    "errors",
]
FLOOR = {name: floor for floor, name in enumerate(FLOORS)}
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in FILES
}


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield every (module, name) of ours that a source imports, wherever in the source."""
    for node in ast.walk(tree):
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


def upward(part: str, tree: ast.AST) -> list[str]:
    """Return the imports that point up from a part of the package."""
    wrong = []
    for module, name in imports(tree):
        path = [*module.split(".")[1:], name]
        if path == ["__version__"]:
            continue  # a constant that the package itself defines
        assert path[0] in FLOOR, f"'{path[0]}' stands on no floor: add it to FLOORS"
        if FLOOR[path[0]] < FLOOR[part]:
            wrong.append(f"{part} imports {module}.{name}")
    return wrong


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def test_every_part_stands_on_a_floor():
    assert {part_of(file) for file in FILES} == set(FLOORS)


def test_few_modules_lie_at_the_root():
    """`testing` is for authors of plug-ins; the package itself has eight modules at most."""
    modules = {file.stem for file in ROOT.glob("*.py")} - {"__init__", "__main__", "testing"}
    assert len(modules) <= 8


def test_no_import_points_up():
    wrong = [line for file in FILES for line in upward(part_of(file), tree_of(file))]
    assert wrong == []


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
    assert len(upward("backends", ast.parse(source))) == 1
    assert upward("cli", ast.parse(source)) == []


def loaded_by(name: str) -> set[str]:
    """Return the modules of ours that the top level of a module imports."""
    body = [
        node
        for node in tree_of(MODULES[name]).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    loaded = set()
    for module, member in imports(ast.Module(body, [])):
        path = module.removeprefix("optimum_order").lstrip(".")
        inner = f"{path}.{member}".lstrip(".")
        loaded |= {inner if inner in MODULES else path} & set(MODULES)
    return loaded - {name}


def test_no_module_is_imported_by_one_that_it_imports():
    """A circle would make the order of imports matter; what only types need is left out."""
    remaining = {name: loaded_by(name) for name in MODULES}
    while free := [name for name, needs in remaining.items() if not needs & set(remaining)]:
        for name in free:
            del remaining[name]
    assert remaining == {}


def test_only_calibration_and_what_layers_compute_beside_weights_own_a_hook():
    own = {ROOT / "models" / "inputs.py", ROOT / "models" / "adapted.py"}
    hooked = [
        str(file.relative_to(ROOT))
        for file in FILES
        if part_of(file) not in ("calibration", "testing") and file not in own
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("register_")
        and "hook" in node.attr
    ]
    assert hooked == []


def test_only_the_recipe_asks_which_methods_exist():
    """The command that lists methods asks too; a snapshot has other people's grids imported."""
    allowed = {"engine/recipe.py", "engine/snapshot.py", "cli/methods.py"}
    asking = {
        str(file.relative_to(ROOT))
        for file in FILES
        for module, name in imports(tree_of(file))
        if (module, name) == ("optimum_order.engine.recipe", "available")
        or (module, name) == ("optimum_order.backends", "available")
    }
    assert asking <= allowed


def test_only_the_kinds_ask_what_a_method_is():
    """No isinstance on the kind of a method outside backends/base.py."""
    kinds = {"Method", "Backend", "Allocator", "Reshaper", "Transform", "Recovery"}
    asking = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        if file != ROOT / "backends" / "base.py"
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and kinds & {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
    ]
    assert asking == []
