"""The command line: `optimum-order`, and the same commands as `optimum-cli order`. One command is one file here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo, RootOptimumCLICommand

from optimum_order import __version__
from optimum_order.cli.backends import BackendsCommand
from optimum_order.cli.export import ExportCommand
from optimum_order.cli.inspect import InspectCommand
from optimum_order.cli.plan import PlanCommand
from optimum_order.cli.push import PushCommand
from optimum_order.cli.study import StudyCommand
from optimum_order.cli.verify import VerifyCommand

SUMMARY = "Prune and quantise a Hugging Face model, in the order that hurts it least."

COMMANDS = (
    CommandInfo("export", "compress a model and save it", ExportCommand),
    CommandInfo(
        "study", "run many orders of a model and report what the order is worth", StudyCommand
    ),
    CommandInfo("plan", "find the order of some stages that hurts a model least", PlanCommand),
    CommandInfo("inspect", "show what was done to a saved model, and what it cost", InspectCommand),
    CommandInfo("verify", "check that a saved model is what it says it is", VerifyCommand),
    CommandInfo("push", "upload a saved model to the Hub, with a model card", PushCommand),
    CommandInfo(
        "backends",
        "list the compression methods with their options, and the formats",
        BackendsCommand,
    ),
)


class OrderCommand(BaseOptimumCLICommand):
    """`optimum-cli order`; without a command it prints its help."""

    COMMAND = CommandInfo("order", SUMMARY)
    SUBCOMMANDS = COMMANDS

    @staticmethod
    def parse_args(parser):
        parser.description = SUMMARY


def main(argv: Sequence[str] | None = None) -> None:
    """The program `optimum-order`.

    Args:
        argv: Its arguments; None for those of this process.

    Raises:
        SystemExit: With the exit code, once a command has run.
    """
    root = RootOptimumCLICommand("optimum-order")
    root.parser.description = SUMMARY
    root.parser.epilog = "'optimum-order COMMAND --help' explains a command; begin with 'optimum-order export --help'."
    root.parser.add_argument("--version", action="version", version=f"optimum-order {__version__}")
    for command in COMMANDS:
        root.register_subcommand(command)
    given = list(sys.argv[1:] if argv is None else argv)
    args = root.parser.parse_args(given, argparse.Namespace(argv=given))
    if "func" not in args:
        root.parser.print_help()
        return
    args.func(args).run()
