"""The program as a whole: what it says before any command runs."""

import subprocess
import sys

import pytest

from optimum_order import __version__
from optimum_order.cli import COMMANDS

NAMES = [command.name for command in COMMANDS]


def test_without_a_command_it_prints_its_help(program):
    done = program()
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("usage: optimum-order") and all(name in done.out for name in NAMES)


def test_the_version(program):
    assert program("--version").out == f"optimum-order {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(program, name):
    done = program(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: optimum-order {name}")


def test_the_help_of_export_is_enough_to_begin(program):
    text = program("export", "--help").out
    assert 'optimum-order export tiny-llama out --order "wanda:0.5 > gptq:4"' in text
    assert "optimum-order backends" in text


@pytest.mark.parametrize(
    "arguments", [["exprot"], ["export"], ["export", "m", "out"], ["verify"], ["backends", "--jsn"]]
)
def test_a_wrong_command_line_exits_with_2(program, arguments):
    done = program(*arguments)
    assert done.code == 2 and done.out == "" and "error:" in done.err


def test_optimum_cli_runs_the_same_commands_and_errors(tmp_path):
    main = "from optimum.commands.optimum_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "order", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("optimum-order: error: ") and done.stderr.count("\n") == 1
