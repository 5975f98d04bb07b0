"""The command line: `optimum-order`, and the same commands as `optimum-cli order`.

One command is one file here, or an entry point of `optimum_order.commands`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_order import __version__
from optimum_order.cli.base import Command
from optimum_order.cli.parser import CommandParser, Parser
from optimum_order.registry import discover

SUMMARY = "Prune and quantize a Hugging Face model, in the order that hurts the model least."
EPILOG = """\
begin with:
  optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4"

'optimum-order COMMAND --help' explains a command.
"""


@functools.cache
def available() -> dict[str, type[Command]]:
    """Return every command by name."""
    return discover(sys.modules[__name__], Command, "optimum_order.commands")


class OrderCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """`optimum-cli order`; without a command it prints its help."""

    COMMAND = CommandInfo("order", SUMMARY)

    def __init__(self, *args: Any, from_defaults_factory: bool = False, **options: Any) -> None:
        super().__init__(*args, from_defaults_factory=from_defaults_factory, **options)
        if not from_defaults_factory:
            _register(self)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Describe the group of commands."""
        parser.description = SUMMARY


class Program(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """The program `optimum-order`."""

    def __init__(self) -> None:
        self.parser = Parser("optimum-order", formatter_class=argparse.RawDescriptionHelpFormatter)
        self.args = None
        _register(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program `optimum-order`.

    Args:
        argv: The arguments; None takes those of this process.

    Raises:
        SystemExit: With the exit code, once a command has run.
    """
    program = Program()
    parser = program.parser
    parser.description = SUMMARY.replace(", in", ",\nin")
    parser.epilog = EPILOG
    parser.add_argument("--version", action="version", version=f"optimum-order {__version__}")
    _let_shells_complete(parser)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words, argparse.Namespace(argv=words))
    if "func" not in args:
        parser.print_help()
        return
    args.func(args).run()


def _register(group: BaseOptimumCLICommand) -> None:
    """Add every command to a group; aliases work and are in no help."""
    group.subparsers = group.parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=CommandParser
    )
    for command in available().values():
        group.register_subcommand(CommandInfo(command.name, command.summary, command))
        parsers = group.subparsers.choices
        parsers.update(dict.fromkeys(command.aliases, parsers[command.name]))
    group.parser.commands = list(available())


def _let_shells_complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, where `argcomplete` is installed."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
