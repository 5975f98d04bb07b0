"""Count how the package is built: modules, frames, parameters, code lines, names, docstrings.

python benchmarks/house.py

Everything but the frames is counted from the source files alone. The frames are those of the
package between the user's call of `JointCompressor.compress` and the equation of GPTQ, both
included, in a run on a tiny model. `--json` prints one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import io
import json
import pydoc
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "optimum_order"
FOLDERS = ("optimum_order", "tests", "benchmarks", "examples")
"""Where vague names are looked for."""
VAGUE = frozenset({"found", "there", "kept", "known", "given", "each"})
"""Names that do not say the thing."""
LAYOUT = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)
"""Tokens that are no code."""
TOP = 10


class Definition(NamedTuple):
    """One class or function of the package.

    Attributes:
        name: Its dotted path inside the package.
        node: Its syntax tree.
        owner: The class it is a method of, or None.
        is_public: Whether no part of the path begins with an underscore or is inside a function.
    """

    name: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None
    is_public: bool

    @property
    def docstring(self) -> str:
        """The docstring, else that of the method that it overrides, or "" if there is none."""
        written = ast.get_docstring(self.node)
        if written is None and self.owner is not None:
            written = inspect.getdoc(pydoc.locate(f"{PACKAGE.name}.{self.name}"))
        return written or ""

    @property
    def parameters(self) -> int:
        """The number of parameters without `self` or `cls`; 0 for a class."""
        if isinstance(self.node, ast.ClassDef):
            return 0
        arguments = self.node.args
        plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        variadic = [arguments.vararg, arguments.kwarg]
        names = [argument.arg for argument in (*plain, *variadic) if argument is not None]
        is_bound = self.owner is not None and names[:1] in (["self"], ["cls"])
        return len(names) - is_bound

    @property
    def raises(self) -> bool:
        """Whether the body has a `raise` statement of its own."""
        return any(isinstance(node, ast.Raise) for node in own_nodes(self.node))


def own_nodes(outer: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes inside a node, without those inside functions and classes in it."""
    for node in ast.iter_child_nodes(outer):
        yield node
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from own_nodes(node)


def definitions(folder: Path) -> Iterator[Definition]:
    """Yield every class and function in a folder's Python files."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        is_public = not any(name.startswith("_") for name in names)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield from inner_definitions(tree, ".".join(names), is_public)


def inner_definitions(outer: ast.AST, path: str, is_public: bool) -> Iterator[Definition]:
    """Yield the classes and functions inside a node, outer before inner.

    Args:
        outer: A module, class or function.
        path: Its dotted name.
        is_public: Whether a definition directly inside can be public.
    """
    owner = outer if isinstance(outer, ast.ClassDef) else None
    for node in own_nodes(outer):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{path}.{node.name}".lstrip(".")
            visible = is_public and not node.name.startswith("_")
            yield Definition(name, node, owner, visible)
            yield from inner_definitions(node, name, visible and isinstance(node, ast.ClassDef))


def public_names() -> set[str]:
    """Return the names of the package's `__all__`, and of the classes that these inherit from."""
    package = importlib.import_module(PACKAGE.name)
    names = set(package.__all__)
    for name in package.__all__:
        bases = getattr(getattr(package, name), "__mro__", ())
        names |= {base.__name__ for base in bases if base.__module__.startswith(PACKAGE.name)}
    return names


def is_verb(definition: Definition, exported: set[str]) -> bool:
    """Return whether users call it by a public name: a method of an exported class or its base.

    A constructor counts where the class documents its arguments; otherwise the package calls it.

    Args:
        definition: The function.
        exported: From `public_names`.
    """
    owner = definition.owner
    if owner is None or owner.name not in exported:
        return False
    if definition.node.name == "__init__":
        return "Args:" in (ast.get_docstring(owner) or "")
    return definition.is_public


def code_lines(text: str) -> int:
    """Return the number of lines without blank ones, comments and strings that stand alone."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.difference_update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(lines)


def lines_by_folder() -> dict[str, int]:
    """Return the code lines of each folder of the package and of each module at its root."""
    lines: Counter[str] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        lines[file.relative_to(PACKAGE).parts[0]] += code_lines(file.read_text(encoding="utf-8"))
    return dict(lines)


def vague_assignments(folder: Path) -> Counter[str]:
    """Return how often each vague name is assigned in a folder, loop variables included."""
    names: Counter[str] = Counter()
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
                names[node.id] += 1
    return names


def frames() -> list[str]:
    """Return the package's own frames from `JointCompressor.compress` to `GPTQ.compress`."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    from optimum_order import JointCompressor
    from optimum_order.backends.gptq import GPTQ

    stack: list[str] = []
    original = GPTQ.compress

    def probe(self: Any, *arguments: Any, **options: Any) -> Any:
        if not stack:
            stack.append("GPTQ.compress")
            frame = sys._getframe(1)
            while frame is not None:
                code = frame.f_code
                if Path(code.co_filename).is_relative_to(PACKAGE):
                    file = Path(code.co_filename).relative_to(PACKAGE)
                    stack.append(f"{file}:{code.co_name}")
                frame = frame.f_back
        return original(self, *arguments, **options)

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, **sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config)
    settings: dict[str, Any] = {"calibration_samples": 2, "sequence_length": 32, "device": "cpu"}
    ids = torch.arange(64).view(2, 32)
    compressor = JointCompressor(model, calibration=ids, **settings)
    with mock.patch.object(GPTQ, "compress", probe):
        compressor.compress("gptq:4", progress=False)
    return stack[::-1]


def figures() -> dict[str, Any]:
    """Return all that is counted."""
    everything = list(definitions(PACKAGE))
    public = [definition for definition in everything if definition.is_public]
    functions = [item for item in public if not isinstance(item.node, ast.ClassDef)]
    exported = public_names()
    internal = [item for item in everything if not is_verb(item, exported)]
    raising = [item for item in functions if item.raises]
    wide = [item for item in functions if item.parameters >= 2]
    documented = [item for item in public if item.docstring]
    lines = lines_by_folder()
    stack = frames()
    modules = sorted(file.stem for file in PACKAGE.glob("*.py") if file.stem != "__init__")
    return {
        "root modules": modules,
        "frames": stack,
        "widest functions": widest(everything, exported),
        "most parameters": max(item.parameters for item in internal),
        "code lines": sum(lines.values()),
        "code lines by folder": lines,
        "vague assignments": {folder: vague_assignments(ROOT / folder) for folder in FOLDERS},
        "public definitions": len(public),
        "documented": round(len(documented) / len(public), 4),
        "undocumented": [item.name for item in public if not item.docstring],
        "raising functions": len(raising),
        "without Raises": [item.name for item in raising if "Raises:" not in item.docstring],
        "functions with two parameters or more": len(wide),
        "without Args": [item.name for item in wide if "Args:" not in item.docstring],
    }


def widest(everything: list[Definition], exported: set[str]) -> list[tuple[int, str, bool]]:
    """Return the functions of most parameters: their number, the name, whether it is a public verb.

    Args:
        everything: All definitions.
        exported: From `public_names`.
    """
    ranked = sorted(everything, key=lambda item: (-item.parameters, item.name))[:TOP]
    return [(item.parameters, item.name, is_verb(item, exported)) for item in ranked]


def show(counted: dict[str, Any], names: bool) -> None:
    """Print the figures for people.

    Args:
        counted: From `figures`.
        names: Whether to list each name that lacks something.
    """
    modules = counted["root modules"]
    stack = counted["frames"]
    print(f"modules at the root           {len(modules)}: {', '.join(modules)}")
    print(f"frames from compress to GPTQ  {len(stack)}: {' > '.join(stack)}")
    print(f"most parameters               {counted['most parameters']} (public verbs aside)")
    for parameters, name, verb in counted["widest functions"]:
        print(f"{parameters:34}  {name}{' (public verb)' if verb else ''}")
    print(f"code lines                    {counted['code lines']:,}")
    for folder, lines in counted["code lines by folder"].items():
        print(f"{lines:34,}  {folder}")
    for folder, vague in counted["vague assignments"].items():
        detail = ", ".join(f"{name} {count}" for name, count in vague.most_common())
        print(f"{'vague names in ' + folder:29} {vague.total()}{': ' + detail if detail else ''}")
    share = f"{counted['documented']:.1%} of {counted['public definitions']}"
    print(f"public definitions documented {share}")
    listed = {"undocumented": counted["undocumented"]}
    totals = {
        "without Raises": counted["raising functions"],
        "without Args": counted["functions with two parameters or more"],
    }
    for label, total in totals.items():
        listed[label] = counted[label]
        bare = sum(name in counted["undocumented"] for name in counted[label])
        more = f"{len(counted[label])} of {total} ({bare} of these have no docstring)"
        print(f"{'public functions ' + label:29} {more}")
    if names:
        for label, group in listed.items():
            print(f"\n{label}:\n" + "\n".join(f"  {name}" for name in group))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--names", action="store_true", help="list each name that lacks something")
    args = parser.parse_args()
    counted = figures()
    if args.json:
        print(json.dumps(counted, indent=2))
    else:
        show(counted, args.names)


if __name__ == "__main__":
    main()
