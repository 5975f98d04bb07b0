"""The base of every command: its parser, and how a result or an error becomes output."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from optimum_order.errors import OptimumOrderError


class Command(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """One command, under `optimum-order` and `optimum-cli order` alike.

    A subclass is one file: it declares its arguments in `add_arguments`, computes its result in
    `work` and prints it in `show`. Heavy imports belong inside the last two, so that help texts
    appear at once.
    """

    name: ClassVar[str]
    """The word a user types."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Further words that run the command; no help shows them."""
    summary: ClassVar[str]
    """The command in one line."""
    description: ClassVar[str]
    """The text above the arguments in `--help`, printed unchanged."""
    epilog: ClassVar[str] = ""
    """The text below the arguments in `--help`, printed unchanged."""
    json_help: ClassVar[str] = "print one JSON object on stdout and nothing else"
    """The help of `--json`."""

    @classmethod
    def parse_args(cls, parser: argparse.ArgumentParser) -> None:
        """Set up the parser of the command."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = cls.description
        parser.epilog = cls.epilog
        cls.add_arguments(parser)
        parser.add_argument("--json", action="store_true", help=cls.json_help)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command; `--json` is added to every one."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Return the result: the object that `--json` prints. Anything printed goes to stderr.

        Raises:
            OptimumOrderError: If it cannot be done; becomes one line and exit code 2.
        """

    @abstractmethod
    def show(self, result: dict[str, Any]) -> None:
        """Print the result on stdout, for people."""

    def exit_code(self, result: dict[str, Any]) -> int:
        """Return 0, or 1 where the result is bad news."""
        return 0

    def advice(self) -> str:
        """Return one line that helps a user whose work was cut off, or ""."""
        return ""

    def run(self) -> NoReturn:
        """Do the work and exit: 0 done, 1 bad news, 2 impossible, 130 interrupted, 143 terminated.

        Raises:
            SystemExit: Always.
        """
        try:
            # stdout holds the result and nothing else
            with contextlib.redirect_stdout(sys.stderr), _terminable():
                result = self.work()
        except OptimumOrderError as error:
            self._fail(2, f"error: {error}")
        except _Terminated:
            self._fail(143, "terminated")
        except KeyboardInterrupt:
            self._fail(130, "interrupted")
        if self.args.json:
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            self.show(result)
        sys.exit(self.exit_code(result))

    def _fail(self, code: int, message: str) -> NoReturn:
        for line in filter(None, (self.advice(), message)):
            print("optimum-order: " + printable(" ".join(line.splitlines())), file=sys.stderr)
        sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """The process has received SIGTERM."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as an interruption does, so that everything is left in order."""

    def terminate(*_: Any) -> None:
        raise _Terminated

    # only the main thread may handle signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def printable(text: str) -> str:
    """Return a text without control characters, which text of others could use on the screen."""
    return "".join(character if character.isprintable() else "?" for character in text)
