"""How results, errors and signals become output and an exit code."""

import argparse
import io
import json
import os
import signal
import sys
import time

import pytest

from optimum_order.cli.base import Command, printable
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


def test_our_errors_become_one_line_and_exit_code_2(capsys):
    for error in (
        OrderError("no such order"),
        OutputError("the disk is full"),
        ModelError("NaN\n in w"),
    ):
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


def test_a_termination_is_no_traceback_either(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(SystemExit) as end:
        command(work).run()
    assert end.value.code == 143
    assert capsys.readouterr() == ("", "optimum-order: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_advice_stands_before_the_last_line(capsys):
    for error in (KeyboardInterrupt(), ModelError("no")):
        failed = failing(error)
        failed.advice = lambda: "try again"
        with pytest.raises(SystemExit):
            failed.run()
        assert capsys.readouterr().err.splitlines()[0] == "optimum-order: try again"


def test_a_fault_of_ours_is_said_to_be_one_and_debug_shows_where(capsys):
    for debug in (False, True):
        faulty = failing(ZeroDivisionError("division by\nzero with hf_abcdefghijk"))
        faulty.args.debug = debug
        with pytest.raises(SystemExit) as end:
            faulty.run()
        out, err = capsys.readouterr()
        assert end.value.code == 70 and out == ""
        last = err.splitlines()[-1]
        assert "unexpected ZeroDivisionError: division by zero with ***" in last
        assert "please report" in last and "--debug" in last
        assert ("Traceback" in err) is debug


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    for name in ("n" * 300, "missing"):
        with pytest.raises(SystemExit) as end:
            command(lambda name=name: (tmp_path / name).read_text()).run()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("optimum-order: error: '")


def test_a_console_of_few_characters_prints_others(monkeypatch):
    for encoding, expected in (("cp1252", b"29 -> 38 \xe9\n"), ("ascii", b"29 -> 38 ?\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", stream)
        shown = command(dict)
        shown.show = lambda result: print("29 → 38 é")
        with pytest.raises(SystemExit) as end:
            shown.run()
        stream.flush()
        assert end.value.code == 0 and stream.buffer.getvalue() == expected


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end:
            command(dict).run()
        assert end.value.code == 0


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


def test_control_characters_are_not_printed():
    assert printable("a\x1b[2Jb\nc é") == "a?[2Jb?c é"


def test_the_parser_has_the_texts_of_the_class_and_json():
    class Example(Command):
        description = "two\nlines"
        epilog = "below"
        json_help = "all of it"

        @classmethod
        def add_arguments(cls, parser):
            parser.add_argument("path")

    parser = argparse.ArgumentParser()
    Example.parse_args(parser)
    text = parser.format_help()
    assert "\ntwo\nlines\n" in text and text.endswith("\nbelow\n") and "all of it" in text
    args = parser.parse_args(["here", "--json"])
    assert (args.path, args.json) == ("here", True)
