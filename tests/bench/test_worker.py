"""What runs in the process of an engine, with engines in place of the real ones."""

import json
import re
import sys
from pathlib import Path

import pytest

from optimum_order.bench import ENGINES, worker

JOB = {"engine": "fake", "import_first": None, "prompt": [1, 2, 3], "generate": 4, "repeats": 3}


@pytest.fixture
def fake(monkeypatch):
    """Stand in for an engine; `json` is a module that can be imported."""

    def make(load, module="json"):
        monkeypatch.setitem(worker.ENGINES, "fake", (module, "torch", load))

    return make


def test_every_engine_is_known_on_both_sides():
    assert set(worker.ENGINES) == set(ENGINES)
    for name, (module, _, _) in worker.ENGINES.items():
        assert ENGINES[name].module == module


def test_rates_are_tokens_over_the_median_of_passes_after_the_first(fake):
    seconds = iter([(100.0, 100.0), (1.0, 2.0), (3.0, 8.0), (9.0, 4.0)])
    fake(lambda job: (lambda: next(seconds), "cpu"))
    facts = worker.answer(JOB)
    assert (facts["prompt_rate"], facts["generate_rate"]) == (1.0, 1.0)
    assert facts["device"] == "cpu" and facts["version"] and facts["load_seconds"] >= 0
    assert facts["peak_bytes"] > 10e6


def test_a_missing_module_is_not_a_failure_but_one_that_it_lacks_is(fake, tmp_path, monkeypatch):
    fake(lambda job: None, "no_such_engine")
    assert worker.answer(JOB) == {"missing": "no_such_engine"}
    (tmp_path / "broken_engine.py").write_text("import no_such_part")
    monkeypatch.syspath_prepend(str(tmp_path))
    fake(lambda job: None, "broken_engine")
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        worker.answer(JOB)


def test_whatever_an_engine_raises_is_one_short_line(fake):
    def load(job):
        raise ValueError("this\n  folder " + "x" * 500)

    fake(load)
    error = worker.answer(JOB)["error"]
    assert error.startswith("ValueError: this folder xxx") and len(error) == 200


def test_nothing_of_this_package_is_imported_and_the_answer_is_written(fake, tmp_path, monkeypatch):
    source = Path(worker.__file__).read_text()
    assert not re.search(r"^\s*(from|import) optimum_order", source, re.MULTILINE)
    fake(lambda job: (lambda: (1.0, 1.0), "cpu"))
    file, answer = tmp_path / "job.json", tmp_path / "answer.json"
    file.write_text(json.dumps({**JOB, "answer": str(answer)}))
    monkeypatch.setattr(sys, "argv", ["worker.py", str(file)])
    worker.main()
    assert json.loads(answer.read_text())["generate_rate"] == 4.0
