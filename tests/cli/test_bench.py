"""`optimum-order bench` prints a table, or one JSON object, and says what did not run."""

import json
import sys

import pytest

from optimum_order import bench
from optimum_order.bench import Speed

FINE = Speed("transformers", "ok", None, "5.0", "cpu", 1.5, 100.0, 20.0, 300_000_000, 0)
ABSENT = Speed("llama.cpp", "not installed", "pip install llama-cpp-python")


@pytest.fixture
def asked(monkeypatch):
    """What was asked for, in place of a measurement."""
    calls = []

    def measure(folder, engines, load, *, progress):
        calls.append((folder, [(engine.name, python) for engine, python in engines], load))
        return [FINE, ABSENT][-len(calls[-1][1]) :]

    monkeypatch.setattr(bench, "measure", measure)
    return calls


def test_by_default_all_engines_of_this_environment(program, asked, tmp_path):
    done = program("bench", tmp_path)
    ((folder, engines, load),) = asked
    assert folder == tmp_path
    assert engines == [(name, sys.executable) for name in ("transformers", "llama.cpp", "vllm")]
    assert (load.prompt, load.generate, load.repeats, load.timeout) == (128, 32, 3, 600.0)
    assert load.threads >= 1
    assert done.code == 0 and done.err == ""
    for text in ("transformers 5.0", "100.0", "20.0", "300 MB", "1.5 s", "not installed"):
        assert text in done.out
    assert "llama.cpp not installed: pip install llama-cpp-python" in done.out


def test_engines_and_numbers_can_be_named(program, asked, tmp_path):
    words = ["--engine", f"llama.cpp={sys.executable}", "--threads", 2, "--prompt", 5, "--json"]
    done = program("bench", tmp_path, *words, "--generate", 6, "--repeats", 1, "--timeout", 9)
    ((_, engines, load),) = asked
    assert engines == [("llama.cpp", sys.executable)]
    assert load == bench.Load(5, 6, 1, 2, 9.0)
    result = json.loads(done.out)
    assert done.code == 1, "no engine ran it"
    assert result["engines"][0]["status"] == "not installed" and result["threads"] == 2


def test_what_cannot_be_is_one_line(program, tmp_path):
    for words, message in (
        (["--engine", "vlm"], "Unknown engine 'vlm'. Did you mean 'vllm'?"),
        (["--threads", "0"], "'threads' must be at least 1, got 0."),
        ([], "has no config.json; give the folder of a saved model."),
    ):
        done = program("bench", tmp_path, *words)
        assert done.code == 2 and done.out == ""
        assert message in done.err and len(done.err.splitlines()) == 1
