"""What a command is doing: a line on stderr within its first second, then one that keeps time."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from time import time

from tqdm import tqdm

from optimum_order.progress import Bar, hidden, screen

PATIENCE = 0.25
"""Seconds after which a command says what it is doing; what is over sooner needs no word."""
_BEAT = 0.5
"""Seconds between two looks of the clock, on a terminal."""
_PACKAGE = "optimum_order"


class Status(logging.Handler):
    """Shows what the package logs: warnings as lines, steps as one line with a clock.

    On a terminal the line of a step gives way to that of the next, and to a bar. Elsewhere each is
    a line.

    Args:
        level: The least level that is shown.
    """

    def __init__(self, level: int):
        super().__init__(level)
        self._step = ""
        self._terminal = sys.stderr.isatty() and level <= logging.INFO
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)

    def begin(self, step: str) -> None:
        """Start the clock.

        Args:
            step: What the command does until the package says what it does next.
        """
        self._step = step
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record.

        Args:
            record: Of the package's own loggers.
        """
        text = "".join(c if c.isprintable() else "?" for c in record.getMessage())
        if record.levelno >= logging.WARNING:
            self._write(f"optimum-order: {record.levelname.lower()}: {text}")
        elif not self._terminal or record.levelno < logging.INFO:
            self._step = ""
            self._write(f"optimum-order: {text}")
        else:
            self._show(text)

    def end(self) -> None:
        """Stop the clock and take the line away."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if Bar.step is not None:
            Bar.step.close()
            Bar.step = None

    def _write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _show(self, step: str) -> None:
        with tqdm.get_lock():
            self._step = step
            if Bar.step is None:
                Bar.step = tqdm(
                    desc=step, bar_format="{desc} ... {elapsed}", leave=False, **screen()
                )
            # the time is that of the step; where it is drawn last, the line is taken away
            Bar.step.start_t = Bar.step.last_print_t = time()
            Bar.step.set_description_str(step)

    def _beat(self) -> None:
        """Say what is done once it takes a while, then keep the time on the screen going."""
        if self._stop.wait(PATIENCE):
            return
        if self._step and Bar.step is None and not Bar.live:
            if not self._terminal:
                if self.level <= logging.INFO:
                    self._write(f"optimum-order: {self._step}")
                return
            self._show(self._step)
        while self._terminal and not self._stop.wait(_BEAT):
            with contextlib.suppress(OSError, ValueError), tqdm.get_lock():
                if Bar.step is None and not Bar.live:
                    self._show("Working")  # a bar is over, and no step was named since
                for bar in (Bar.step, *Bar.live):
                    if bar is not None:
                        bar.refresh(nolock=True)


@contextlib.contextmanager
def shown(step: str, *, level: int = logging.INFO, bars: bool = True) -> Iterator[None]:
    """Show what the package does while active.

    Args:
        step: What it does at first.
        level: The least level of its messages that is shown.
        bars: Whether bars are shown.
    """
    logger = logging.getLogger(_PACKAGE)
    before = logger.level
    status = Status(level)
    logger.addHandler(status)
    logger.setLevel(level)
    try:
        with hidden(bars=not bars):
            status.begin(step)
            yield
    finally:
        logger.removeHandler(status)
        logger.setLevel(before)
        status.end()
