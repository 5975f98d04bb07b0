"""What is done to a model, in which order: `Stage`, `Order` and the text they are written in.

    order  =  stage ( ">" stage )*          "->", "→" and "+" are read as ">"
    stage  =  method  |  method ":" value  |  method "(" key "=" value ( "," key "=" value )* ")"
    value  =  number  |  true  |  false  |  word  |  quoted  |  "[" value ( "," value )* "]"

`wanda:0.5 > gptq(bits=4, group_size=64)` prunes first. The value after the colon is the method's
main
knob: the sparsity of a pruner, the bits of a quantizer, the data type of bitsandbytes. A word has
letters, digits and `_ . : / - + * ?`, so that layers are named as they are: `gptq(bits=3,
targets=[*.q_proj,*.k_proj])`. Text with other characters stands in quotes:
`targets='re:.*[qk]_proj'`. This module knows the syntax only; the names of methods and their
options are for `optimum_order.backends` to say.
"""

from __future__ import annotations

import fnmatch
import html
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from optimum_order.errors import OrderError

Value = bool | int | float | str | tuple[Any, ...]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
# "a:b->c" and "a:b+c" are two stages; "a:1e-3" and "a:1e+3" are numbers.
_WORD = re.compile(r"(?:[A-Za-z0-9_.:/*?]|-(?!>)|\+(?=[0-9]))+")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_ARROW = re.compile(r">|->|→|\+")
_MAX_LENGTH = 20_000
_MAX_DEPTH = 8
_MAX_DIGITS = 18


def _print_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_print_value, value)) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    if _WORD.fullmatch(value):
        return value
    return f'"{value}"' if "'" in value else f"'{value}'"


def _checked(value: object, where: str, depth: int = 0) -> Value:
    """Return the value in the one form that it has after printing and parsing.

    Args:
        value: A value of any type.
        where: What the error calls it.
        depth: How many lists it is inside of.

    Raises:
        OrderError: If the value cannot be printed and parsed back.
    """
    if isinstance(value, (list, tuple)):
        if depth >= _MAX_DEPTH:
            raise OrderError(f"{where} must have lists nested at most {_MAX_DEPTH} deep.")
        return tuple(_checked(item, where, depth + 1) for item in value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 10**_MAX_DIGITS:
        return int(value)  # not a subclass that prints otherwise, such as numpy's float below
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OrderError(f"{where} must be a finite number, got {value}.")
        return float(value)
    if isinstance(value, str) and _is_text(value):
        return value
    raise OrderError(
        f"{where} must be a number, true, false, one line of text (no number, at most one kind of "
        f"quotes) or a list of those, got {value!r}."
    )


def _is_text(value: str) -> bool:
    """Return whether text can be written, bare or in quotes, and stays text when it is read."""
    quotable = value.isprintable() and not ("'" in value and '"' in value)
    return quotable and value != "" and _parse_word(value) == value


def _parse_word(word: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    if _INTEGER.fullmatch(word):
        return int(word) if len(word.lstrip("+-").lstrip("0")) <= _MAX_DIGITS else word
    try:
        number = float(word) if word[-1].isdigit() or word[-1] == "." else math.nan
    except ValueError:
        return word
    return number if math.isfinite(number) else word


@dataclass(frozen=True)
class Stage:
    """One method with its options, as written: `Stage("gptq", 4)`, `Stage("gptq", bits=4)`.

    Args:
        method: The name of a method.
        value: The method's main knob, where its name is left out.
        options: Options by name.

    Raises:
        OrderError: If a name or value could not be printed and parsed back.
    """

    method: str
    value: Value | None = None
    options: tuple[tuple[str, Value], ...] = field(default=())

    def __init__(self, method: str, value: Value | None = None, /, **options: Value):
        if not isinstance(method, str) or not _NAME.fullmatch(method):
            raise OrderError(
                f"A stage begins with the name of a method such as 'wanda', got {method!r}."
            )
        if value is not None and options:
            raise OrderError(
                f"Stage '{method}' has both a bare value and named options; name them all."
            )
        for key in options:
            if not _NAME.fullmatch(key):
                raise OrderError(f"Stage '{method}': {key!r} cannot be the name of an option.")
        if value is not None:
            value = _checked(value, f"Stage '{method}': the value")
        pairs = sorted(
            (key, _checked(option, f"Stage '{method}': option '{key}'"))
            for key, option in options.items()
        )
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "options", tuple(pairs))

    def having(self, knob: str, **options: Value) -> Stage:
        """Return the stage with other options beside its own.

        Args:
            knob: The name of the option that a bare value is.
            options: By name; they replace those that the stage has.
        """
        own = dict(self.options) if self.value is None else {knob: self.value}
        return Stage(self.method, **own | options)

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read one stage.

        Raises:
            OrderError: If the text is not one stage.
        """
        order = Order.parse(text)
        if len(order) != 1:
            raise OrderError(f"Expected one stage, got {len(order)}: {text[:200]!r}.")
        return order[0]

    def __str__(self) -> str:
        if self.options:
            return f"{self.method}({', '.join(f'{k}={_print_value(v)}' for k, v in self.options)})"
        return self.method if self.value is None else f"{self.method}:{_print_value(self.value)}"


@dataclass(frozen=True)
class Order:
    """A sequence of stages, first to last. Behaves as a tuple of `Stage`.

    Raises:
        OrderError: If there is no stage.
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: str | Iterable[Stage | str]):
        if isinstance(stages, str):
            stages = _Parser(stages).order()
        stages = tuple(Stage.parse(s) if isinstance(s, str) else s for s in stages)
        if not stages:
            raise OrderError(
                "An order needs at least one stage, such as 'wanda:0.5 > gptq:4', got none."
            )
        for stage in stages:
            if not isinstance(stage, Stage):
                raise OrderError(f"An order is made of Stage objects or their text, got {stage!r}.")
        object.__setattr__(self, "stages", stages)
        if len(str(self)) > _MAX_LENGTH:
            raise OrderError(
                f"An order is at most {_MAX_LENGTH} characters long, got {len(str(self))}."
            )

    @classmethod
    def parse(cls, text: str) -> Order:
        """Read an order; `Order.parse(str(order)) == order` for every order.

        Raises:
            OrderError: With the position and the piece of text that could not be read.
        """
        if not isinstance(text, str):
            raise OrderError(f"An order is text such as 'wanda:0.5 > gptq:4', got {text!r}.")
        return cls(text)

    @classmethod
    def of(cls, order: Order | Stage | str | Iterable[Stage | str]) -> Order:
        """Return an `Order` from any of the ways a user may write one.

        Raises:
            OrderError: If it cannot be read as one.
        """
        if isinstance(order, Order):
            return order
        if isinstance(order, str):
            return cls.parse(order)
        return cls([order] if isinstance(order, Stage) else order)

    def permutations(self) -> Iterator[Order]:
        """Yield every distinct order of these stages, this one first."""
        seen = set()
        for stages in itertools.permutations(self.stages):
            if stages not in seen:
                seen.add(stages)
                yield Order(stages)

    def __str__(self) -> str:
        return " > ".join(map(str, self.stages))

    def __repr__(self) -> str:
        return f"Order({str(self)!r})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(str(self))}</code>"

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]


def parse_stages(text: str) -> list[Stage]:
    """Read stages in no order yet, separated by commas: `wanda:0.5, gptq(bits=4, group_size=64)`.

    The separators of an order will do as well.

    Raises:
        OrderError: With the position and the piece of text that could not be read.
    """
    parser = _Parser(text)
    stages = [parser.stage()]
    while parser.accept(",") or parser.accept_arrow():
        stages.append(parser.stage())
    if parser.peek():
        parser.fail("',' and another stage, or the end")
    return stages


def matches(layer: str, pattern: str) -> bool:
    """Return whether a layer is meant by a pattern.

    Args:
        layer: The full name of the layer: `model.layers.0.self_attn.q_proj`.
        pattern: A shell pattern such as `*.q_proj`, or a regular expression after `re:`.

    Raises:
        OrderError: If the regular expression cannot be read.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(layer, pattern)
    try:
        return re.fullmatch(pattern[3:], layer) is not None
    except re.error as error:
        raise OrderError(
            f"'{pattern}' is not a regular expression after 're:': {error}."
        ) from error


class _Parser:
    """Recursive descent over one line; every failure names its position."""

    def __init__(self, text: str):
        if len(text) > _MAX_LENGTH:
            raise OrderError(f"An order is at most {_MAX_LENGTH} characters long, got {len(text)}.")
        self.text = text
        self.at = 0

    def order(self) -> list[Stage]:
        stages = []
        if self.peek():
            stages.append(self.stage())
            while self.accept_arrow():
                stages.append(self.stage())
            if self.peek():
                self.fail("'>' and another stage, or the end")
        return stages

    def stage(self) -> Stage:
        method = self.match(_NAME, "the name of a method")
        if self.accept(":"):
            return Stage(method, self.value())
        if not self.accept("("):
            return Stage(method)
        options: dict[str, Value] = {}
        while True:
            key = self.match(_NAME, "the name of an option")
            if key in options:
                raise OrderError(f"Stage '{method}' gives option '{key}' twice.")
            self.expect("=")
            options[key] = self.value()
            if not self.accept(","):
                break
        self.expect(")")
        return Stage(method, **options)

    def value(self, depth: int = 0) -> Value:
        if self.peek() in ("'", '"'):
            return self.match(_QUOTED, "text that ends with the quote it begins with")[1:-1]
        if not self.accept("["):
            return _parse_word(self.match(_WORD, "a value"))
        if depth >= _MAX_DEPTH:
            self.fail(f"lists nested at most {_MAX_DEPTH} deep")
        items: list[Value] = []
        if not self.accept("]"):
            items.append(self.value(depth + 1))
            while self.accept(","):
                items.append(self.value(depth + 1))
            self.expect("]")
        return tuple(items)

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def accept(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self.at += 1
        return True

    def accept_arrow(self) -> bool:
        self.peek()
        arrow = _ARROW.match(self.text, self.at)
        if arrow is not None:
            self.at = arrow.end()
        return arrow is not None

    def expect(self, character: str) -> None:
        if not self.accept(character):
            self.fail(f"'{character}'")

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        self.peek()
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(expected)
        self.at = match.end()
        return match.group()

    def fail(self, expected: str) -> NoReturn:
        rest = repr(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "the end"
        raise OrderError(
            f"Cannot read the order {self.text[:200]!r}: expected {expected} at character "
            f"{self.at + 1}, got {rest}. Write it like 'wanda:0.5 > gptq(bits=4, group_size=64)', "
            "and put text with other characters in quotes."
        )
