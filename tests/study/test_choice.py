"""Which model of a study to take, and the command that makes it."""

import shlex

import pytest

from optimum_order.study import choice
from optimum_order.study.runs import Runs

CALIBRATION = {"source": "calm.txt", "samples": 64, "tokens": 1, "seed": 3, "dtype": "float32"}
SETTINGS = {
    "calibration": CALIBRATION | {"sequence_length": 128},
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "threads": 2,
    "revision": None,
    "adapter": None,
    "targets": ["*.q_proj"],
    "ignore": None,
    "dtype": "bfloat16",
}
SIZES = {
    "original": {"dense": 1000},
    "rtn:8": {"compressed-tensors": 600},
    "gptq:4": {"compressed-tensors": 400},
    "wanda:0.5 > gptq:4": {"compressed-tensors": 400, "sparse": 300},
    "gptq:2": {"compressed-tensors": 200},
}
SCORES = {
    "original": [-3.0, -3.1],
    "rtn:8": [-3.01, -3.11],
    "gptq:4": [-3.03, -3.14],
    "wanda:0.5 > gptq:4": [-3.5, -3.6],
    "gptq:2": [-5.0, -5.1],
    "gptq:4 > wanda(off_grid=true, sparsity=0.5)": [-3.02, -3.12],
}


def summary_of(make_summary, scores=SCORES, **settings):
    more = {order: {"bytes": sizes} for order, sizes in SIZES.items()}
    more["gptq:4 > wanda(off_grid=true, sparsity=0.5)"] = {"bytes": {"dense": 100}}
    return make_summary(scores, more=more, **SETTINGS | settings)


def test_the_models_are_those_on_the_fronts_smallest_first(make_summary):
    models = summary_of(make_summary)["models"]
    rows = [(model["order"], model["format"], model["families"]) for model in models]
    assert rows == [
        ("gptq:2", "compressed-tensors", ["stock", "any"]),
        ("wanda:0.5 > gptq:4", "sparse", ["any"]),
        ("gptq:4", "compressed-tensors", ["stock", "any"]),
        ("rtn:8", "compressed-tensors", ["stock", "any"]),
        ("original", "dense", ["stock", "any"]),
    ]
    assert models[2]["loss"]["mean"] == pytest.approx(0.035)
    more = {"gptq:4": {"bytes": {"compressed-tensors": 400, "sparse": 399}}}
    (model,) = make_summary({"gptq:4": [-3.0, -3.1]}, more=more, **SETTINGS)["models"]
    assert (model["format"], model["families"]) == ("compressed-tensors", ["stock", "any"])


def test_a_command_has_all_that_makes_the_model(make_summary):
    by_order = {model["order"]: model for model in summary_of(make_summary)["models"]}
    words = shlex.split(by_order["wanda:0.5 > gptq:4"]["command"].replace("\\\n", ""))
    assert words[:4] == ["optimum-order", "compress", "made-up", "OUTPUT"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options == {
        "--order": "wanda:0.5 > gptq:4",
        "--format": "sparse",
        "--schedule": "stage",
        "--pause": "block",
        "--calibration": "calm.txt",
        "--calibration-samples": "64",
        "--seed": "3",
        "--calibration-dtype": "float32",
        "--sequence-length": "128",
        "--dtype": "bfloat16",
        "--targets": "*.q_proj",
    }
    assert "--calibration" not in by_order["rtn:8"]["command"], "which needs none"
    assert by_order["original"]["command"] is None


def test_a_command_pauses_where_the_study_did(make_summary):
    model = summary_of(make_summary, pause="group")["models"][0]
    assert "--pause group" in model["command"]


def test_a_study_of_an_earlier_version_has_no_commands(make_trials):
    trials = make_trials(SCORES)
    assert choice._command(trials.settings, "gptq:4", "dense") is None
    assert choice.models(Runs(trials), [], trials.settings) == []


def test_the_smallest_model_with_a_small_loss_is_recommended(make_summary):
    best = summary_of(make_summary)["recommendation"]
    assert (best["model"]["order"], best["within"], best["original_bytes"]) == (
        "gptq:4",
        True,
        1000,
    )
    worse = {name: [score - 0.2 for score in scores] for name, scores in SCORES.items()}
    best = summary_of(make_summary, worse | {"original": [-3.0, -3.1]})["recommendation"]
    assert (best["model"]["order"], best["within"]) == ("rtn:8", False)
    assert summary_of(make_summary, metric="somebody's own")["recommendation"] is None
    assert summary_of(make_summary, {"original": [-3.0, -3.1]})["recommendation"] is None
