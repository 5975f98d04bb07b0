"""Bars on stderr: with a total, the time so far and the time left.

On a terminal a bar moves. Elsewhere, in a log file say, it is one line for each tenth of the work,
and at most one in a second.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, ClassVar

from tqdm import tqdm

_LONGEST = 32
"""Characters of a description: with the figures, a bar then fits into 80 columns."""
_TENTHS = 10
_SECONDS = 1.0
"""Between two lines at least, where a bar is lines."""


def screen() -> dict[str, int]:
    """Return the size of the terminal as tqdm takes it; tqdm is silent where it is said to be 0."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns - 1, "nrows": size.lines}


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """The progress of one piece of work.

    Args:
        options: As in tqdm: `total`, `desc`, `unit`, `initial` and `disable`.
    """

    hidden: ClassVar[bool] = False
    """Whether no bar is shown, whatever its `disable` says."""
    live: ClassVar[weakref.WeakSet[Bar]] = weakref.WeakSet()
    """The bars that are on the terminal."""
    step: ClassVar[tqdm[Any] | None] = None
    """The line on the terminal that says what is done, which gives way to a bar."""

    def __init__(self, **options: Any) -> None:
        shown = not (options.pop("disable", False) or Bar.hidden)
        self._lines = shown and not sys.stderr.isatty()
        self._begin = self._last = monotonic()
        self._tenth = 0
        if shown and not self._lines and Bar.step is not None:
            with tqdm.get_lock():
                Bar.step.close()
                Bar.step = None
        super().__init__(disable=not shown or self._lines, **screen() | options)
        if self._lines:
            self._first = self.n
            self.unit = options.get("unit", "it")
            self.desc = options.get("desc") or ""
        elif shown:
            Bar.live.add(self)

    def update(self, n: float | None = 1) -> bool | None:
        """Count work that was done.

        Args:
            n: How much.
        """
        if not self._lines:
            shown: bool | None = super().update(n)
            return shown
        self.n += n or 0
        tenth = int(_TENTHS * self.n / self.total) if self.total else 0
        self._tenth = min(self._tenth, tenth)  # there may be more work than it seemed
        finished = self.n >= (self.total or 0)
        if tenth > self._tenth and (finished or monotonic() > self._last + _SECONDS):
            self._tenth = tenth
            self._last = monotonic()
            print(self._line(), file=sys.stderr, flush=True)
        return None

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Say what is being done.

        Args:
            desc: The words.
            refresh: Whether to show them at once.
        """
        if desc and len(desc) > _LONGEST:  # the figures after it are not to be cut off
            desc = f"{desc[: _LONGEST - 3]}..."
        super().set_description(desc, refresh)

    def close(self) -> None:
        """End the bar."""
        Bar.live.discard(self)
        super().close()

    def _line(self) -> str:
        elapsed = monotonic() - self._begin
        done = max(self.n - self._first, 1e-9)
        left = max(self.total - self.n, 0) * elapsed / done
        what = self.desc.rstrip(": ") or "done"
        return (
            f"{what}: {100 * self.n / self.total:.0f}% ({self.n:g} of {self.total:g} "
            f"{self.unit}s), {tqdm.format_interval(elapsed)} so far, about "
            f"{tqdm.format_interval(left)} left"
        )


@contextmanager
def hidden(*, bars: bool) -> Iterator[None]:
    """Show no bar while active.

    Args:
        bars: Whether to hide them at all.
    """
    before = Bar.hidden
    Bar.hidden = bars
    try:
        yield
    finally:
        Bar.hidden = before
