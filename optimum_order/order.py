"""What is done to a model, in which order: `Stage`, `Order` and the text they are written in.

    order  =  stage ( ">" stage )*
    stage  =  method  |  method ":" value  |  method "(" key "=" value ( "," key "=" value )* ")"
    value  =  number  |  true  |  false  |  word  |  "[" value ( "," value )* "]"

`wanda:0.5 > gptq(bits=4, group_size=64)` prunes first. The value after the colon is the method's main knob:
the sparsity of a pruner, the bits of a quantiser, the data type of bitsandbytes. This module knows the syntax
only; what a method is called and which options it has is for `optimum_order.backends` to say.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from optimum_order.errors import OrderError

Value = bool | int | float | str | tuple

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_WORD = re.compile(r"[A-Za-z0-9_.:/+-]+")
_MAX_LENGTH, _MAX_DEPTH, _MAX_DIGITS = 20_000, 8, 18


def _print_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_print_value, value)) + "]"
    return repr(value) if isinstance(value, (int, float)) else value


def _checked(value: object, where: str, depth: int = 0) -> Value:
    """The value in the one form it has after printing and parsing, or an error."""
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
    if isinstance(value, str) and _WORD.fullmatch(value) and _parse_word(value) == value:
        return value
    raise OrderError(
        f"{where} must be a number, true, false, a word of letters, digits and _ . : / + -, or a list of those, "
        f"got {value!r}."
    )


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
    """One method with its options, as written: `Stage("gptq", 4)`, `Stage("gptq", bits=4, group_size=64)`.

    Args:
        method: The name of a backend.
        value: The method's main knob, when it is given without its name.
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
        object.__setattr__(self, "method", method)
        object.__setattr__(
            self,
            "value",
            None if value is None else _checked(value, f"Stage '{method}': the value"),
        )
        pairs = sorted(
            (k, _checked(v, f"Stage '{method}': option '{k}'")) for k, v in options.items()
        )
        object.__setattr__(self, "options", tuple(pairs))

    @classmethod
    def parse(cls, text: str) -> Stage:
        """The one stage that `text` spells."""
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
        """An `Order` from any of the ways a user may write one."""
        if isinstance(order, Order):
            return order
        if isinstance(order, str):
            return cls.parse(order)
        return cls([order] if isinstance(order, Stage) else order)

    def permutations(self) -> Iterator[Order]:
        """Every distinct order of these stages, this one first."""
        seen = set()
        for stages in itertools.permutations(self.stages):
            if stages not in seen:
                seen.add(stages)
                yield Order(stages)

    def __str__(self) -> str:
        return " > ".join(map(str, self.stages))

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]


def parse_stages(text: str) -> list[Stage]:
    """Read stages in no order yet, separated by commas: `wanda:0.5, gptq(bits=4, group_size=64)`.

    Raises:
        OrderError: With the position and the piece of text that could not be read.
    """
    parser = _Parser(text)
    stages = [parser.stage()]
    while parser.accept(","):
        stages.append(parser.stage())
    if parser.peek():
        parser.fail("',' and another stage, or the end")
    return stages


class _Parser:
    """Recursive descent over one line; every failure says where it stood."""

    def __init__(self, text: str):
        if len(text) > _MAX_LENGTH:
            raise OrderError(f"An order is at most {_MAX_LENGTH} characters long, got {len(text)}.")
        self.text, self.at = text, 0

    def order(self) -> list[Stage]:
        stages = []
        if self.peek():
            stages.append(self.stage())
            while self.accept(">"):
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
        if self.accept("["):
            if depth >= _MAX_DEPTH:
                self.fail(f"lists nested at most {_MAX_DEPTH} deep")
            items = []
            if not self.accept("]"):
                items.append(self.value(depth + 1))
                while self.accept(","):
                    items.append(self.value(depth + 1))
                self.expect("]")
            return tuple(items)
        return _parse_word(self.match(_WORD, "a value"))

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def accept(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self.at += 1
        return True

    def expect(self, character: str) -> None:
        if not self.accept(character):
            self.fail(f"'{character}'")

    def match(self, pattern: re.Pattern, what: str) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if not found:
            self.fail(what)
        self.at = found.end()
        return found.group()

    def fail(self, expected: str) -> None:
        got = repr(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "the end"
        raise OrderError(
            f"Cannot read the order {self.text[:200]!r}: expected {expected} at character {self.at + 1}, got {got}. "
            "Write it like 'wanda:0.5 > gptq(bits=4, group_size=64)'."
        )
