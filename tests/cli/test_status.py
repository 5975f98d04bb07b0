"""The line that says what a command is doing."""

import io
import logging
import sys
import time

import pytest

from optimum_order.cli import status
from optimum_order.progress import Bar

logger = logging.getLogger("optimum_order.example")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr(status, "PATIENCE", 0.05)
    monkeypatch.setattr(status, "_BEAT", 0.05)


def shown(stream, monkeypatch, work, **options) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with status.shown("Importing", **options):
        work()
    return stream.getvalue()


def test_what_takes_a_while_says_so_and_what_does_not_is_silent(monkeypatch):
    slow = shown(io.StringIO(), monkeypatch, lambda: time.sleep(0.2))
    assert slow == "optimum-order: Importing\n"
    monkeypatch.setattr(status, "PATIENCE", 60)
    assert shown(io.StringIO(), monkeypatch, lambda: None) == ""


def test_steps_are_lines_where_there_is_no_terminal(monkeypatch):
    def work():
        logger.info("Loading %s", "1 GB")
        logger.debug("a detail")
        logger.warning("a warning\n\x1b[2J")

    text = shown(io.StringIO(), monkeypatch, work)
    assert text == "optimum-order: Loading 1 GB\noptimum-order: warning: a warning??[2J\n"
    text = shown(io.StringIO(), monkeypatch, work, level=logging.WARNING)
    assert text == "optimum-order: warning: a warning??[2J\n", "--quiet"
    text = shown(io.StringIO(), monkeypatch, work, level=logging.DEBUG)
    assert "optimum-order: a detail\n" in text, "--verbose"


def test_on_a_terminal_the_clock_goes_on_and_the_line_goes_away(monkeypatch):
    def work():
        logger.info("Loading")
        time.sleep(0.4)

    text = shown(Terminal(), monkeypatch, work)
    assert text.count("Loading ... 00:00") >= 4, "it is drawn again and again"
    assert "\n" not in text and not text.rsplit("\r", 1)[-1].strip()


def test_a_bar_goes_on_while_nothing_is_counted(monkeypatch):
    def work():
        with Bar(total=2, desc="rtn:4", unit="block"):
            time.sleep(0.4)

    assert shown(Terminal(), monkeypatch, work).count("rtn:4:   0%") >= 4
    assert "rtn:4" not in shown(Terminal(), monkeypatch, work, bars=False)


def test_a_step_gives_way_to_a_bar(monkeypatch):
    """Beside a bar it would keep the time of what is over, and be drawn over what a bar left."""

    def work():
        logger.info("Tokenizing")
        time.sleep(0.2)
        with Bar(total=2, desc="rtn:4", unit="block") as bar:
            bar.update(2)
            time.sleep(0.2)
        time.sleep(0.3)
        logger.info("Writing")
        time.sleep(0.2)

    text = shown(Terminal(), monkeypatch, work)
    before, _, rest = text.partition("rtn:4:   0%")
    assert "Tokenizing" in before and not before.rsplit("\r", 1)[-1]
    during, _, after = rest.rpartition("rtn:4: 100%")
    assert "Tokenizing" not in rest and "\x1b[A" not in text, "the bar is alone on its line"
    assert after.index("Working ... 00:00") < after.index("Writing ... 00:00")
    assert "Working" not in during and Bar.step is None


def test_nothing_is_left_behind(monkeypatch):
    package = logging.getLogger("optimum_order")
    before = (package.level, list(package.handlers), Bar.hidden)
    with pytest.raises(ValueError, match="failed"):
        with status.shown("Importing", bars=False):
            raise ValueError("failed")
    assert (package.level, list(package.handlers), Bar.hidden) == before
