"""Parsers of the command line: their errors are one line that says what to type."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from optimum_order.errors import OptimumOrderError, unknown

_ARROWS = {"+", "-", "->", "→", ">"}
_BAD_CHOICE = re.compile(r"argument COMMAND: invalid choice: '([^']*)'")


class Parser(argparse.ArgumentParser):
    """The parser of the program; knows no abbreviations."""

    commands: Sequence[str] = ()
    """The commands that a message may suggest; aliases are left out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2.

        Raises:
            SystemExit: Always.
        """
        if match := _BAD_CHOICE.match(message):
            message = unknown("command", match[1], self.commands)
        line = " ".join(message.split())
        end = "" if line.endswith((".", "?")) else "."
        self.exit(2, f"optimum-order: error: {line}{end} '{self.prog} --help' explains.\n")


class CommandParser(Parser):
    """The parser of one command: options and paths in any order, unknown options with advice.

    A path may be left out (`nargs="?"`) and still be required: what it is then comes from a file
    of options. The parser says so once all is read.
    """

    settings: Callable[[str], dict[str, Any]] | None = None
    """Reads the options in the file that `--config` names."""
    _within = False

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the arguments, and no rest: what is unknown is an error here.

        Args:
            args: The words after the name of the command.
            namespace: What is known already.
        """
        if self._within:  # the method of argparse below parses twice by this one
            return super().parse_known_args(args, namespace)
        earlier = dict(vars(namespace)) if namespace is not None else {}
        self._within = True
        try:
            result = self._read(args, earlier)
            if getattr(result, "config", None) is not None and self.settings is not None:
                result = self._configured(args, earlier, result.config)
        finally:
            self._within = False
        self._refuse_missing(result)
        return result, []

    def _read(self, args: Sequence[str] | None, earlier: dict[str, Any]) -> argparse.Namespace:
        result, rest = self.parse_known_intermixed_args(args, argparse.Namespace(**earlier))
        if rest:
            self.error(self._advice(rest))
        return result

    def _configured(
        self, args: Sequence[str] | None, earlier: dict[str, Any], file: str
    ) -> argparse.Namespace:
        """Return the arguments with those of a file where none was typed."""
        assert self.settings is not None
        try:
            settings = self.settings(file)
        except OptimumOrderError as error:
            self.error(str(error))
        model = settings.pop("model", None)
        options = {action.dest: action.default for action in self._actions}
        self.set_defaults(**{name: settings[name] for name in settings if name in options})
        result = self._read(args, earlier)
        self.set_defaults(**{name: options[name] for name in settings if name in options})
        if model is not None and "output" in options and result.output is None:
            result.output, result.model = result.model, model  # one path is the place to write to
        elif model is not None and getattr(result, "model", None) is None:
            result.model = model
        return result

    def _refuse_missing(self, result: argparse.Namespace) -> None:
        missing = [
            str(action.metavar or action.dest)
            for action in self._actions
            if not action.option_strings and action.required and not getattr(result, action.dest)
        ]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")

    def _advice(self, words: Sequence[str]) -> str:
        """Return the message for words that mean nothing to the command."""
        if _ARROWS & set(words):
            return (
                f"the shell split the order at its spaces, and {' '.join(words)!r} was left over. "
                'Quote the order: --order "wanda:0.5 > gptq:4"'
            )
        names = [name for action in self._actions for name in action.option_strings]
        advice = ""
        for word in words:
            near = difflib.get_close_matches(word.partition("=")[0], names, n=1)
            if word.startswith("-") and near:
                advice = f". Did you mean '{near[0]}'?"
                break
        return f"unknown arguments: {' '.join(words)}{advice}"


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """Return the type of an option that takes one of some names.

    Args:
        kind: The word for such a name, for messages.
        names: The names.
    """
    allowed = tuple(names)

    def read(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(unknown(kind, text, allowed))
        return text

    return read


def listed(names: Iterable[str]) -> str:
    """Return names as a usage line shows them: `{stage,block}`."""
    return "{" + ",".join(names) + "}"


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the group of options with a title, a new one where there is none.

    Args:
        parser: The parser of a command.
        title: The title.
    """
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)
