"""The package that docs/plugins.md builds: pip installs it, its tests pass, its commands run."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
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
    small = ["--calibration", str(text_file), "--calibration-samples", "4"]
    lines = []
    for number, command in enumerate(commands):
        verb, model, _, *options = shlex.split(command.replace("builtin", str(text_file)))
        lines.append([verb, model, str(tmp_path / str(number)), *options, *small])
    run(HERE / "commands.py", "my_methods", json.dumps(lines))
