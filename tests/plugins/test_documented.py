"""The package that docs/plugins.md builds: pip installs it, its tests pass, its commands run."""

import re
import shlex
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^optimum-order (.*)$", re.M)
LOAD = (
    "import my_methods, sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return a folder with the files of the page."""
    folder = tmp_path_factory.mktemp("my-methods")
    for name, text in FILE.findall(PAGE):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(install, package):
    """`run(*arguments)`: the output of python where the package is installed."""
    return install(package)


def test_its_tests_pass(run, package):
    tests = package / "tests"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    assert re.search(r"^[1-9]\d+ passed in", done, re.M)


def test_its_commands_run(run, text_file, tmp_path):
    commands = COMMAND.findall(PAGE)
    assert len(commands) == 3
    program = ("-c", "from optimum_order.cli import main; main()")
    small = ("--calibration-samples", 4, "--sequence-length", 64)
    for number, command in enumerate(commands):
        verb, model, _, *options = shlex.split(command.replace("builtin", str(text_file)))
        folder = tmp_path / str(number)
        run(*program, verb, model, folder, *options, *small)
        run("-c", LOAD, folder)
