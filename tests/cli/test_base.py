import argparse
import json
import os
import signal
import sys
import time

import pytest

from optimum_order.cli.base import Command, size
from optimum_order.errors import ModelError, OrderError, OutputError


def command(work, *, json=False, code=0):
    """A command that does `work`."""

    class Example(Command):
        def work(self):
            return work()

        def show(self, result):
            print("shown:", result)

        def exit_code(self, result):
            return code

    return Example(
        None,
        argparse.Namespace(json=json),
        from_defaults_factory=True,
        parser=argparse.ArgumentParser(),
    )


def failing(error):
    def work():
        raise error

    return command(work)


@pytest.mark.parametrize(
    "error",
    [OrderError("no such order"), OutputError("the disk is full"), ModelError("NaN\n in w")],
)
def test_our_errors_become_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as end:
        failing(error).run()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err == f"optimum-order: error: {' '.join(str(error).splitlines())}\n"


def test_an_interruption_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        failing(KeyboardInterrupt()).run()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "optimum-order: interrupted\n")


def test_a_termination_is_none_either(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(SystemExit) as end:
        command(work).run()
    assert end.value.code == 143
    assert capsys.readouterr() == ("", "optimum-order: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("no")])
def test_advice_stands_before_the_last_line(error, capsys):
    failed = failing(error)
    failed.advice = lambda: "try again"
    with pytest.raises(SystemExit):
        failed.run()
    assert capsys.readouterr().err.splitlines()[0] == "optimum-order: try again"


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0).run()


def test_json_is_alone_on_stdout(capsys):
    def work():
        print("a library says hello")
        sys.stdout.write("and again")
        return {"answer": [1, 2.5, None, "é"]}

    with pytest.raises(SystemExit) as end:
        command(work, json=True).run()
    out, err = capsys.readouterr()
    assert end.value.code == 0
    assert json.loads(out) == {"answer": [1, 2.5, None, "é"]}
    assert "a library says hello" in err and "and again" in err


def test_without_json_the_result_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        command(lambda: {"answer": 42}, code=1).run()
    assert end.value.code == 1
    assert capsys.readouterr().out == "shown: {'answer': 42}\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (11_720_000, "11.7 MB"), (5_000_000_000_000, "5e+03 GB")],
)
def test_sizes_are_in_units_people_read(count, text):
    assert size(count) == text
