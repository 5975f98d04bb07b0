"""The documentation is true: its code runs, its commands parse, its links name files."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_order
from optimum_order.cli import main
from optimum_order.cli.base import Command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```", re.M | re.S
)
REPOSITORY = "https://github.com/optimum-order/optimum-order/blob/main/"


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are no files of a package.

    Args:
        page: A Markdown file.
        language: What the blocks are marked as.

    Returns:
        The code of each block.
    """
    matches = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [
        match["code"] for match in matches if match["language"] == language and not match["title"]
    ]


def commands(page: Path) -> list[str]:
    """Return the `optimum-order` commands of a page, without comments."""
    code = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in code.splitlines()]
    return [line for line in lines if line.startswith("optimum-order ")]


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder with the programs of this environment, and return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_python_code_of_the_quick_start_runs(tmp_path):
    codes = blocks(DOCS / "index.md", "python")
    assert len(codes) == 2
    # The second block loads what the first one saved, in a process of its own.
    for code in codes:
        assert run([sys.executable, "-c", code], tmp_path)


def test_the_commands_of_the_readme_run(tmp_path):
    lines = commands(ROOT / "README.md")
    assert [shlex.split(line)[1] for line in lines] == ["compress", "inspect", "verify", "methods"]
    for line in lines:
        small = ["--calibration-samples", "8"] if " compress " in line else []
        assert run([*shlex.split(line), *small], tmp_path)


def test_the_quick_start_shows_the_code_of_the_readme():
    assert set(blocks(ROOT / "README.md", "python")) < set(blocks(DOCS / "index.md", "python"))
    assert set(commands(ROOT / "README.md")) < set(commands(DOCS / "index.md"))


def test_every_command_parses(monkeypatch):
    monkeypatch.setattr(Command, "run", lambda self: None)
    lines = [(page, line) for page in PAGES for line in commands(page)]
    assert len(lines) > 20
    for page, line in lines:
        try:
            main(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {line}")


def test_every_python_block_compiles():
    matches = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))]
    python = [(page, match["code"]) for page, match in matches if match["language"] == "python"]
    assert len(python) > 8
    for page, code in python:
        ast.parse(code, filename=str(page))


def test_every_link_into_the_repository_names_a_file():
    links = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith(REPOSITORY):
                links.append((page, ROOT / link.removeprefix(REPOSITORY)))
            elif page.parent == ROOT and not link.startswith("http"):
                links.append((page, ROOT / link.partition("#")[0]))
    assert len(links) > 10
    assert [(page.name, str(file)) for page, file in links if not file.exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 650


def test_the_glossary_defines_each_term_once():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)\n", text, flags=re.M)
    terms = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = [name.lower() for name in parts[1::2]]
    assert sorted(set(names)) == sorted(names)
    assert [
        name for name, meaning in terms.items() if not meaning.partition("## ")[0].strip()
    ] == []


def test_the_reference_names_everything_public():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    missing = [name for name in optimum_order.__all__ if not re.search(rf"\b{name}\b", page)]
    assert missing == []


def test_every_page_is_in_the_navigation():
    # mkdocs warns of a page that is not, and `make docs` fails then; this says so without mkdocs.
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [
        page.name for page in DOCS.rglob("*.md") if f" {page.relative_to(DOCS)}\n" not in navigation
    ] == []
