"""Bars: they move on a terminal, and are few lines elsewhere."""

import io
import sys

from optimum_order import progress
from optimum_order.progress import Bar


def log_file(monkeypatch):
    """Make stderr no terminal, on which a line may follow another at once.

    No fixture: pytest captures stderr anew when a test begins.
    """
    monkeypatch.setattr(progress, "_SECONDS", -1.0)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_elsewhere_a_bar_is_one_line_for_each_tenth(monkeypatch):
    lines = log_file(monkeypatch)
    with Bar(total=1000, desc="rtn:4", unit="block") as bar:
        for _ in range(1000):
            bar.update()
    written = lines.getvalue().splitlines()
    assert len(written) == 10
    assert written[0].startswith("rtn:4: 10% (100 of 1000 blocks), 00:00 so far, about 00:0")
    assert written[-1].startswith("rtn:4: 100% (1000 of 1000 blocks)")


def test_work_that_grows_is_shown_again(monkeypatch):
    lines = log_file(monkeypatch)
    with Bar(total=10, unit="step") as bar:
        bar.update(10)
        bar.total = 40
        for _ in range(30):
            bar.update()
    written = lines.getvalue().splitlines()
    assert [line.split()[1] for line in written[:3]] == ["100%", "30%", "40%"]
    assert len(written) == 9 and written[-1].startswith("done: 100% (40 of 40 steps)")


def test_lines_are_a_second_apart_but_the_last_is_always_written(monkeypatch):
    lines = log_file(monkeypatch)
    monkeypatch.setattr(progress, "_SECONDS", 60.0)
    with Bar(total=10, unit="block") as bar:
        for _ in range(10):
            bar.update()
    assert lines.getvalue().startswith("done: 100% (10 of 10 blocks)")
    assert lines.getvalue().count("\n") == 1


def test_what_was_there_before_counts_for_no_time(monkeypatch):
    lines = log_file(monkeypatch)
    with Bar(total=10, initial=5, unit="trial") as bar:
        bar.update()
        assert bar.n == 6
    assert "60% (6 of 10 trials)" in lines.getvalue()


def test_a_bar_can_be_switched_off(monkeypatch):
    lines = log_file(monkeypatch)
    with Bar(total=2, unit="block", disable=True) as bar:
        bar.update(2)
    with progress.hidden(bars=True), Bar(total=2, unit="block") as bar:
        bar.update(2)
    assert lines.getvalue() == "" and not Bar.hidden


def test_a_long_description_leaves_room_for_the_figures(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(total=4, unit="block", ncols=80) as bar:
        assert bar in Bar.live
        bar.set_description("sparsegpt(sparsity=0.5, pattern=2:4) > gptq(bits=4, group_size=64)")
        bar.update(4)
    assert bar not in Bar.live
    last = stream.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("sparsegpt(sparsity=0.5, patte...: 100%") and "4/4" in last
