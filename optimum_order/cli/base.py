"""What every command shares: where a result, an error or an interruption becomes output and an exit code."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from optimum_order.errors import OptimumOrderError
from optimum_order.files import size as size

PATH = "a folder that 'optimum-order export' wrote, or the id of such a model on the Hub: namespace/name"


class Command(BaseOptimumCLICommand):
    """One command, under `optimum-order` and `optimum-cli order` alike.

    A subclass declares its arguments in `parse_args`, finds its result in `work` and prints it in `show`. Heavy
    imports belong inside those two, so that help texts appear at once.
    """

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """The result: what `--json` prints. Whatever is printed on the way goes to stderr.

        Raises:
            OptimumOrderError: If it cannot be done; becomes one line and exit code 2.
        """

    @abstractmethod
    def show(self, result: dict[str, Any]) -> None:
        """Print the result on stdout, for people."""

    def exit_code(self, result: dict[str, Any]) -> int:
        """0 unless the result is bad news."""
        return 0

    def advice(self) -> str:
        """What may help someone whose work was cut off, in one line; "" if nothing does."""
        return ""

    def run(self) -> NoReturn:
        """Do the work and leave: 0 done, 1 bad news, 2 cannot be done, 130 interrupted, 143 terminated."""
        try:
            # stdout holds the result and nothing else
            with contextlib.redirect_stdout(sys.stderr), _terminable():
                result = self.work()
        except OptimumOrderError as error:
            self._leave(2, f"error: {error}")
        except _Terminated:
            self._leave(143, "terminated")
        except KeyboardInterrupt:
            self._leave(130, "interrupted")
        if getattr(self.args, "json", False):
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            self.show(result)
        sys.exit(self.exit_code(result))

    def _leave(self, code: int, message: str) -> NoReturn:
        for line in filter(None, (self.advice(), message)):
            print("optimum-order: " + printable(" ".join(line.splitlines())), file=sys.stderr)
        sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as an interruption does, so that everything is left in order."""

    def terminate(*_) -> None:
        raise _Terminated

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only there may a program handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def printable(text: str) -> str:
    """Without control characters, which text from elsewhere could use to rewrite the screen."""
    return "".join(character if character.isprintable() else "?" for character in text)
