"""The program as a whole: its help, its commands and their aliases, and `optimum-cli order`."""

import argparse
import re
import sys
import types

import pytest
from optimum.commands.base import RootOptimumCLICommand

from optimum_order import __version__
from optimum_order.cli import OrderCommand, available, main
from optimum_order.cli.base import Command
from optimum_order.cli.methods import MethodsCommand


def test_the_commands_are_found_by_walking_the_folder():
    names = [
        "bench",
        "compress",
        "convert",
        "env",
        "evaluate",
        "inspect",
        "methods",
        "plan",
        "push",
    ]
    assert list(available()) == [*names, "search", "study", "verify"]
    for command in available().values():
        assert issubclass(command, Command) and "\n" not in command.summary


def test_without_a_command_the_help_lists_every_command_and_no_alias(program):
    done = program()
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("usage: optimum-order [-h] [--version] COMMAND")
    listed = {line.split()[0] for line in done.out.splitlines() if line.startswith("    ")}
    assert listed == set(available())
    assert "export" not in done.out and "backends" not in done.out


def test_the_version(program):
    assert program("--version").out == f"optimum-order {__version__}\n"


def test_every_command_explains_itself(program):
    for name, command in available().items():
        done = program(name, "--help")
        assert done.code == 0 and done.out.startswith(f"usage: optimum-order {name}")
        assert command.description.splitlines()[0] in done.out and "--json" in done.out


def test_an_alias_is_the_command(program):
    for alias, name in (("export", "compress"), ("backends", "methods")):
        assert alias in available()[name].aliases
        assert program(alias, "--help") == program(name, "--help")
    assert program("backends", "--json") == program("methods", "--json")


def test_the_help_of_compress_is_enough_to_begin(program):
    text = program("compress", "--help").out
    assert 'optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4"' in text
    assert "optimum-order methods" in text


def test_a_wrong_command_line_exits_with_2(program):
    for arguments in (
        ["comprss"],
        ["compress"],
        ["compress", "m", "out"],
        ["export", "m", "out"],
        ["verify"],
        ["methods", "--jsn"],
    ):
        done = program(*arguments)
        assert done.code == 2 and done.out == "" and "error:" in done.err


def test_optimum_cli_has_the_same_commands_aliases_and_errors(tmp_path, capsys):
    root = RootOptimumCLICommand("optimum-cli")
    OrderCommand(root.subparsers)
    for name, cls in (("backends", MethodsCommand), ("methods", MethodsCommand)):
        args = root.parser.parse_args(["order", name])
        assert isinstance(args.func(args), cls)
    args = root.parser.parse_args(["order", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        args.func(args).run()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("optimum-order: error: ") and err.count("\n") == 1
    args = root.parser.parse_args(["order"])
    args.func(args).run()
    out, _ = capsys.readouterr()
    assert out.startswith("usage: optimum-cli order") and all(name in out for name in available())


def test_a_shell_is_answered_where_the_extra_is_installed(monkeypatch):
    asked = []
    fake = types.ModuleType("argcomplete")
    fake.autocomplete = lambda parser: asked.append(parser.format_help())
    monkeypatch.setitem(sys.modules, "argcomplete", fake)
    main([])
    assert asked == [], "no shell asks"
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    main([])
    assert len(asked) == 1 and "compress" in asked[0]
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    main([])


def test_every_help_fits_into_80_columns_and_begins_with_what_is_done(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in available():
        text = program(name, "--help").out
        options = [line for line in text.splitlines() if line.startswith("  -")]
        # a list of choices is one word
        wide = [line for line in text.splitlines() if len(line) > 78 and line not in options]
        assert wide == [], name
        groups = re.findall(r"^(\S.*):$", text, re.M)
        assert groups[-1] != "options" and "what is printed" in groups
        assert len(groups) == len(set(groups)), "every group stands there once"
    assert "{stage,block}" in program("compress", "--help").out


def test_every_command_has_the_same_options_for_the_same_things():
    common = {"--json", "--quiet", "--verbose", "--no-progress", "--debug"}
    model = {"--revision", "--token", "--cache-dir", "--trust-remote-code", "--dtype"}
    for name, command in available().items():
        parser = argparse.ArgumentParser()
        command.parse_args(parser)
        options = {option for action in parser._actions for option in action.option_strings}
        assert common <= options, name
        if name in ("compress", "evaluate", "plan", "search", "study"):
            assert model | {"--config", "--device", "--num-threads"} <= options, name
