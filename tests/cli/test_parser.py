"""Parsers: errors are one line with advice, options and paths come in any order."""

import argparse

import pytest

from optimum_order.cli.parser import CommandParser, Parser, group_of, listed, one_of
from optimum_order.errors import OrderError


@pytest.fixture
def parser():
    parser = CommandParser(prog="optimum-order compress")
    for name in ("model", "output"):
        parser.add_argument(name, metavar=name.upper(), nargs="?").required = True
    parser.add_argument("--order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", type=one_of("schedule", ("stage", "block")), default="stage")
    parser.add_argument("--config")
    return parser


def failure(parser, capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("optimum-order: error: ") and err.endswith(" --help' explains.\n")
    return err


def test_paths_and_options_come_in_any_order(parser):
    for words in (
        ["m", "out", "--order", "rtn:4", "--seed", "3"],
        ["--order", "rtn:4", "m", "--seed", "3", "out"],
        ["m", "--order", "rtn:4", "--seed", "3", "out"],
    ):
        args = parser.parse_args(words)
        assert (args.model, args.output, args.order, args.seed) == ("m", "out", "rtn:4", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["m", "out", "--ordr", "rtn:4"],
            "unknown arguments: --ordr rtn:4. Did you mean '--order'?",
        ),
        (["m", "out", "--ord", "rtn:4"], "Did you mean '--order'?"),
        (["m", "out", "third"], "unknown arguments: third"),
        (["m", "out", "--order", "a:1", "+", "b:2"], "Quote the order"),
        (["m", "out", "--order", "a:1", "-"], "Quote the order"),
        (["m"], "required: OUTPUT"),
        ([], "required: MODEL, OUTPUT"),
        (["m", "out", "--seed", "x"], "invalid int value: 'x'"),
        (["m", "out", "--schedule", "blok"], "Did you mean 'block'?"),
        (["m", "out", "--order"], "expected one argument"),
    ],
)
def test_an_error_is_one_line_with_advice(parser, capsys, words, message):
    assert message in failure(parser, capsys, *words)


def test_an_unknown_command_has_a_suggestion_and_no_alias(capsys):
    parser = Parser("optimum-order")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=CommandParser)
    commands.add_parser("compress")
    commands.add_parser("export")
    parser.commands = ["compress"]
    message = failure(parser, capsys, "comprss")
    assert "Did you mean 'compress'? Allowed: compress." in message


def test_options_of_a_file_count_where_none_is_typed(parser):
    parser.settings = lambda file: {"model": "m", "order": "rtn:4", "seed": 5, "draws": 3}
    args = parser.parse_args(["out", "--config", "file"])
    assert (args.model, args.output, args.order, args.seed) == ("m", "out", "rtn:4", 5)
    assert not hasattr(args, "draws"), "the command has no such option"
    args = parser.parse_args(["other", "out", "--config", "file", "--seed", "0"])
    assert (args.model, args.output, args.order, args.seed) == ("other", "out", "rtn:4", 0)
    args = parser.parse_args(["m", "out", "--order", "rtn:3"])
    assert args.seed == 0, "the defaults are as they were"


def test_a_file_that_cannot_be_read_is_one_line(parser, capsys):
    def settings(file):
        raise OrderError(f"The recipe '{file}' cannot be read.")

    parser.settings = settings
    assert "The recipe 'x' cannot be read. " in failure(parser, capsys, "m", "out", "--config", "x")


def test_a_path_is_still_required_where_the_file_names_none(parser, capsys):
    parser.settings = lambda file: {"order": "rtn:4"}
    assert "required: OUTPUT" in failure(parser, capsys, "m", "--config", "x")


def test_a_group_is_made_once():
    parser = argparse.ArgumentParser()
    assert group_of(parser, "model") is group_of(parser, "model")
    assert parser.format_help().count("model:") == 0
    group_of(parser, "model").add_argument("--x", metavar=listed(("a", "b")))
    assert "model:\n  --x {a,b}" in parser.format_help()
