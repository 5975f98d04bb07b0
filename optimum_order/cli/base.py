"""The base of every command: its parser, and how a result or an error becomes output."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from optimum_order.cli import status
from optimum_order.errors import OptimumOrderError, redacted

_ISSUES = "https://github.com/optimum-order/optimum-order/issues"
_REPLACEMENTS = {
    "→": "->",
    "−": "-",
    "–": "-",
    "…": "...",
    "×": "x",
    "·": ".",
    "≥": ">=",
    "≤": "<=",
}


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
    shares: ClassVar[bool] = False
    """Whether several processes that torchrun has started together share the work."""
    begins: ClassVar[str] = "Importing PyTorch and transformers"
    """What the command does first, for the line that says so."""

    @classmethod
    def parse_args(cls, parser: argparse.ArgumentParser) -> None:
        """Set up the parser of the command."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = cls.description
        parser.epilog = cls.epilog
        cls.add_arguments(parser)
        group = parser.add_argument_group("what is printed")
        group.add_argument("--json", action="store_true", help=cls.json_help)
        group.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            help="print no progress: results and warnings only",
        )
        group.add_argument(
            "-v", "--verbose", action="store_true", help="print every step as a line of its own"
        )
        group.add_argument("--no-progress", action="store_true", help="show no bars")
        group.add_argument(
            "--debug", action="store_true", help="show the traceback of an unexpected error"
        )
        words = [_word(action) for action in parser._actions if not action.option_strings]
        parser.usage = " ".join([parser.prog, *words, "[options]"])

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
        """Do the work and exit.

        The exit code is 0 if all is done, 1 for bad news, 2 for what is impossible, 70 for an error
        that nobody expected, 130 if interrupted, 143 if terminated.

        Raises:
            SystemExit: Always.
        """
        _let_consoles_replace()
        try:
            # stdout holds the result and nothing else
            with contextlib.redirect_stdout(sys.stderr), _terminable(), self._told():
                self._refuse_others()
                result = self.work()
        except OptimumOrderError as error:
            self._fail(2, f"error: {in_options(str(error))}")
        except OSError as error:
            if error.filename is None:
                self._fail_unexpectedly(error)
            self._fail(2, f"error: '{error.filename}': {error.strerror}.")
        except _Terminated:
            self._fail(143, "terminated")
        except KeyboardInterrupt:
            self._fail(130, "interrupted")
        except Exception as error:
            self._fail_unexpectedly(error)
        try:
            if self.args.json:
                print(json.dumps(result, indent=2, allow_nan=False))
            else:
                self.show(result)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(self.exit_code(result))

    def speaks(self) -> bool:
        """Return whether this process says why the work failed: one of those that share it."""
        return launched()[0] == 0

    def _refuse_others(self) -> None:
        """Refuse to do in several processes, each by itself, what one is to do."""
        _, processes = launched()
        if processes > 1 and not self.shares:
            raise OptimumOrderError(
                f"'{self.name}' runs in one process, and {processes} were started together: start "
                "it without torchrun. 'compress' with an order shares its work."
            )

    def _told(self) -> contextlib.AbstractContextManager[None]:
        """Show what is being done, as much of it as the user wants."""
        quiet = getattr(self.args, "quiet", False)
        level = logging.WARNING if quiet else logging.INFO
        if getattr(self.args, "verbose", False):
            level = logging.DEBUG
        bars = not (quiet or getattr(self.args, "no_progress", False))
        if launched()[0] != 0:  # the first process speaks for all
            level = logging.ERROR
            bars = False
        return status.shown(self.begins, level=level, bars=bars)

    def _fail_unexpectedly(self, error: Exception) -> NoReturn:
        """Report an error that is a fault of this package."""
        if getattr(self.args, "debug", False):
            traceback.print_exception(error)
        reason = redacted(" ".join(str(error).split()))[:300]
        self._fail(
            70,
            f"unexpected {type(error).__name__}: {reason} This is a fault of optimum-order: please "
            f"report it at {_ISSUES}, with what --debug shows.",
        )

    def _fail(self, code: int, message: str) -> NoReturn:
        for line in filter(None, (self.advice(), message if self.speaks() else "")):
            print("optimum-order: " + printable(" ".join(line.splitlines())), file=sys.stderr)
        sys.exit(code)


def launched() -> tuple[int, int]:
    """Return the rank of this process, and how many torchrun has started together."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    from optimum_order.calibration import ranks

    return ranks.launched()


def _let_consoles_replace() -> None:
    """Have consoles that know few characters print others for those that they lack."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors=_REPLACING)


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(character, "?") for character in lacking), error.end


_REPLACING = "optimum_order.replace"
codecs.register_error(_REPLACING, _replacement)


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


def _word(action: argparse.Action) -> str:
    """Return a path as the usage line names it."""
    name = str(action.metavar or action.dest)
    return name if action.required else f"[{name}]"


_KEYWORD = re.compile(
    r"""(?:\b[a-z_]+=(?:'[^']*'|\[[^\]]*\]|\.\.\.|\w+)|'[a-z_]+'|\b[a-z]+_[a-z_]+)
        [ ]\((--[a-z][^)]*)\)""",
    re.VERBOSE,
)


def in_options(text: str) -> str:
    """Return a message as the command line says it: `seed=3 (--seed)` is `--seed`.

    Args:
        text: A message that names keyword arguments, each with its option in brackets after it.
    """
    text = re.sub(r"\([a-z_]+=\.\.\., (--[a-z-]+)\)", r"(\1)", text)
    return _KEYWORD.sub(r"\1", text)


def printable(text: str) -> str:
    """Return a text without control characters, which text of others could use on the screen."""
    return "".join(character if character.isprintable() else "?" for character in text)
