"""What a study runs, that it can be killed at any moment, and that it mixes nothing up."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers

from optimum_order.backends.base import Backend
from optimum_order.errors import DataError, ModelError, OutputError
from optimum_order.order import Order
from optimum_order.study.grid import draws_matter
from optimum_order.study.run import Study, _prefix_folder, quiet
from optimum_order.study.trials import ORIGINAL, TRIALS, Trials
from optimum_order.study.worker import Worker

ORDERS = [
    "wanda:0.5 > rtn:4",
    "rtn:4 > wanda:0.5",
    "magnitude:0.5 > rtn:4",
    "wanda:0.5 > rtn:3 > magnitude:0.7",
]
SMALL = {"evaluation_samples": 4, "draws": 2, "progress": False}


@pytest.fixture
def compressor(make_compressor):
    return make_compressor(calibration_samples=2)


@pytest.fixture(scope="module")
def finished(make_compressor, text_file, tmp_path_factory):
    """The folder of a study of `ORDERS` with two draws, and its summary."""
    folder = tmp_path_factory.mktemp("finished")
    compressor = make_compressor(calibration_samples=2)
    return folder, compressor.study(ORDERS, folder, evaluation=str(text_file), **SMALL)


@pytest.fixture
def study(compressor, text_file, monkeypatch):
    """`study(orders, folder)`: a study without its report, which takes most of the time."""
    monkeypatch.setattr("optimum_order.study.report.write", lambda trials, folder: {})

    def run(orders, folder, compressor=compressor, **changes):
        return compressor.study(orders, folder, evaluation=str(text_file), **SMALL | changes)

    return run


# What is stored


def test_every_trial_is_stored(finished, read_rows):
    folder, summary = finished
    reference = [f"rtn:{bits}" for bits in (2, 3, 4, 5, 6, 8)]
    names = {*ORDERS, "wanda:0.5", "magnitude:0.5", "magnitude:0.7", *reference}
    calibrated = {name for name in names if "wanda" in name}
    trials = {(name, 0) for name in names} | {(name, 1) for name in calibrated}
    assert set(read_rows(folder)) == trials | {(ORIGINAL, 0)}
    assert set(Trials.open(folder).planned()) == trials
    count = len(trials)
    assert summary["trials"] == {"done": count, "planned": count, "missing": [], "failed": []}
    assert summary["draws"] == [0, 1]
    report = {"trials.csv", "summary.json", "plots", "report.html"}
    assert {file.name for file in folder.iterdir()} == {TRIALS, *report}, "prefixes are removed"


def test_a_trial_is_what_a_run_of_its_own_gives(
    finished, compressor, text_file, tmp_path, read_rows
):
    rows = read_rows(finished[0])
    row = rows["wanda:0.5 > rtn:4", 0]
    alone = compressor.compress("wanda:0.5 > rtn:4", progress=False)
    samples = compressor.evaluation_samples(str(text_file), 4)
    metric = compressor.metric(alone.model, "auto")
    measured = metric.measure(alone.model, samples, batch_size=128, progress=False)
    assert row["performances"] == pytest.approx(measured.performances.tolist(), rel=1e-6)
    assert row["performance"] == pytest.approx(measured.performance, rel=1e-6)
    assert row["value"] == pytest.approx(measured.value, rel=1e-6)
    assert row["sparsity"] == alone.sparsity == 0.5
    assert row["bits"] == 4
    assert row["stages"] == ["wanda:0.5", "rtn:4"]
    assert set(row["layer_errors"]) == set(alone.layers)
    # bytes are of real files
    assert "sparse" in row["bytes"]
    for name, size in row["bytes"].items():
        alone.save_pretrained(tmp_path / name, format=name)
        saved = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        assert 0 <= saved - size < 2000, f"{name}: all but the header of an artifact"
    assert rows[ORIGINAL, 0]["bytes"]["dense"] > 1.5 * row["bytes"]["sparse"]


def test_a_draw_changes_what_calibrates_and_nothing_else(finished, read_rows):
    rows = read_rows(finished[0])
    assert rows["wanda:0.5", 0]["performances"] != rows["wanda:0.5", 1]["performances"]
    assert ("magnitude:0.5 > rtn:4", 1) not in rows
    assert "bytes" not in rows["wanda:0.5", 1]


def test_the_parts_of_a_pair_sum_to_the_whole(finished, read_rows):
    pairs = read_rows(finished[0], "pairs")
    assert set(pairs) == {(f"{ORDERS[0]} | {ORDERS[1]}", draw) for draw in (0, 1)}
    trials = read_rows(finished[0])
    for (_, draw), layers in pairs.items():
        for name, (whole, owner, interference) in layers.items():
            assert owner + interference == pytest.approx(whole, rel=1e-6, abs=1e-12)
            # positive where the first order of the pair has less error
            first, second = (trials[order, draw]["layer_errors"][name] for order in ORDERS[:2])
            assert whole == pytest.approx(second - first, rel=1e-3, abs=1e-6)


def test_samples_to_measure_on_come_from_all_over_the_text(compressor, text_file):
    windows = compressor.evaluation_samples(str(text_file))
    few = compressor.evaluation_samples(str(text_file), 4)
    assert few.ids.tolist() == windows.ids[[i * len(windows) // 4 for i in range(4)]].tolist()
    assert compressor.evaluation_samples(str(text_file), 10**6).digest == windows.digest


# Stopped and started again

CHILD = """
import json, sys
from optimum_order import JointCompressor
from optimum_order.backends.base import Backend
model, text, folder, log, orders = sys.argv[1:]
apply = Backend.apply
def counted(self, state, statistics=None, *, where="layer"):
    if where == "model.layers.0.self_attn.q_proj":
        with open(log, "a") as file:
            file.write(f"{self.stage}\\n")
    return apply(self, state, statistics, where=where)
Backend.apply = counted
compressor = JointCompressor.from_pretrained(
    model, calibration=text, calibration_samples=2, sequence_length=32, device="cpu"
)
options = dict(evaluation=text, evaluation_samples=4, draws=2, progress=False)
compressor.study(json.loads(orders), folder, **options)
"""


def start(*arguments) -> subprocess.Popen:
    """Run `CHILD` for a model, a text, a folder and a log."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)]
    return subprocess.Popen([*command, json.dumps(ORDERS)], stderr=subprocess.PIPE, text=True)


def stored(folder: Path) -> int:
    """Return the number of trials in the file of a study that is being written."""
    if not (folder / TRIALS).is_file():
        return 0
    with sqlite3.connect(f"{(folder / TRIALS).as_uri()}?mode=ro", uri=True, timeout=60) as db:
        try:
            return db.execute("SELECT count(*) FROM trials").fetchone()[0]
        except sqlite3.OperationalError:  # no table yet
            return 0


@pytest.fixture
def stages_run(monkeypatch):
    """The stages that were applied to the first layer, in order."""
    stages = []
    apply = Backend.apply

    def counted(self, state, statistics=None, *, where="layer"):
        if where == "model.layers.0.self_attn.q_proj":
            stages.append(str(self.stage))
        return apply(self, state, statistics, where=where)

    monkeypatch.setattr(Backend, "apply", counted)
    return stages


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(
    finished, study, tiny_llama_folder, text_file, tmp_path, read_rows, stages_run
):
    folder = tmp_path / "study"
    log = tmp_path / "log"
    expected = read_rows(finished[0])
    generator = random.Random(os.getpid())
    child = start(tiny_llama_folder, text_file, folder, log)
    wanted = generator.randint(1, len(expected) - 3)
    while stored(folder) < wanted and child.poll() is None:
        time.sleep(0.005)
    time.sleep(generator.random() * 0.1)  # some moment in a trial
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr.read()
    child.stderr.close()
    done = read_rows(folder)
    assert done.items() <= expected.items(), "what is stored is whole"
    assert wanted <= len(done) < len(expected)

    before = log.read_text().splitlines()
    study(ORDERS, folder)
    assert read_rows(folder) == expected
    assert read_rows(folder, "pairs") == read_rows(finished[0], "pairs")
    assert not (folder / "prefixes").exists()
    # Every stage of the trie once for each draw that matters to it, rtn:4 also in draw 1, where
    # wanda goes on from it; and the killed trial, of at most three stages, a second time.
    orders = [Order.parse(order) for order, _ in expected if order != ORIGINAL]
    trie = {order.stages[:n] for order in orders for n in range(1, len(order) + 1)}
    once = len(trie) + sum(draws_matter(Order(stages)) for stages in trie) + 1
    assert once <= len(before) + len(stages_run) <= once + 3, (before, stages_run)


def test_a_finished_study_runs_nothing(finished, study, monkeypatch, read_rows):
    before = read_rows(finished[0])
    monkeypatch.setattr(Backend, "apply", lambda *a, **k: pytest.fail("a stage was run"))
    monkeypatch.setattr(Study, "_trial", lambda *a: pytest.fail("a trial was run"))
    study(ORDERS[:2], finished[0])
    assert read_rows(finished[0]) == before


def test_orders_may_be_added_later(finished, study, tmp_path, read_rows):
    pairs = {key: row for key, row in read_rows(finished[0], "pairs").items() if key[1] == 0}
    study(ORDERS[:1], tmp_path, draws=1)
    assert read_rows(tmp_path, "pairs") == {}
    study(ORDERS[1:2], tmp_path, draws=1)
    assert read_rows(tmp_path, "pairs") == pairs, "the reverse is run again for the split"


def test_the_split_is_stored_also_where_no_prefix_is(finished, study, tmp_path, read_rows):
    pairs = {key: row for key, row in read_rows(finished[0], "pairs").items() if key[1] == 0}
    study(ORDERS[:2], tmp_path, draws=1, prefix_limit=0)
    assert read_rows(tmp_path, "pairs") == pairs


def test_processes_share_a_study_by_draw(finished, study, tmp_path, read_rows):
    with (
        _prefix_folder(tmp_path, 1),
        pytest.raises(OutputError, match="Another process is running draw 1 of the study"),
    ):
        study(ORDERS, tmp_path)
    assert read_rows(tmp_path) == {}
    for draw in (1, 0):
        study(ORDERS, tmp_path, draws=[draw])
    assert read_rows(tmp_path) == read_rows(finished[0])


def test_an_order_that_breaks_the_model_is_a_trial_without_performance(
    compressor, text_file, tmp_path, monkeypatch, read_rows
):
    measured = Worker._measured

    def fragile(self):
        targets = [target for unit in self.runner.units for target in unit.targets]
        if sum((target.read() == 0).sum().item() for target in targets) > 30_000:
            raise ModelError("The perplexity of window 1 of 4 is not finite.")
        return measured(self)

    monkeypatch.setattr(Worker, "_measured", fragile)
    orders = ["magnitude:0.5 > rtn:8", "magnitude:0.1 > rtn:8"]
    options = SMALL | {"draws": 1}
    summary = compressor.study(orders, tmp_path, evaluation=str(text_file), **options)
    failed = {trial["order"] for trial in summary["trials"]["failed"]}
    assert {"magnitude:0.5", "magnitude:0.5 > rtn:8"} <= failed
    assert "magnitude:0.1 > rtn:8" not in failed
    assert read_rows(tmp_path)["magnitude:0.5", 0]["performance"] is None
    assert "broke the model" in (tmp_path / "report.html").read_text()


# Refused, with nothing lost


def test_trials_of_other_settings_are_refused(finished, study, make_compressor, read_rows):
    before = read_rows(finished[0])
    for changes, name in (
        ({"seed": 3}, "calibration.digest"),
        ({"calibration_samples": 3}, "calibration.samples"),
        ({"sequence_length": 16}, "evaluation.digest"),
        ({"ignore": ["*.o_proj"]}, "layers"),
        ({"dtype": "bfloat16"}, "weights"),
    ):
        other = make_compressor(**{"calibration_samples": 2} | changes)
        with pytest.raises(OutputError, match="holds the trials of another study") as error:
            study(ORDERS, finished[0], other)
        assert name in str(error.value)
        assert len(str(error.value)) < 700
    with pytest.raises(OutputError, match=r"'evaluation\.samples' is 4 there and 3 now"):
        study(ORDERS, finished[0], evaluation_samples=3)
    with pytest.raises(OutputError, match="'pause' is 'group' there"):
        study(ORDERS, finished[0], pause="block")
    assert read_rows(finished[0]) == before


def test_what_cannot_be_run_is_refused_at_once(study, tmp_path, read_rows):
    for changes, error, message in (
        ({"draws": 0}, DataError, "a draw or more"),
        ({"draws": [-1]}, DataError, "numbered from 0"),
        ({"draws": 1000}, DataError, "1000 are needed"),
        ({"evaluation_samples": 1}, DataError, "two samples or more"),
        ({"prefix_limit": -1}, DataError, "0 GB or more"),
        ({"metric": "accuracy"}, ModelError, "Accuracy is for image classifiers"),
        ({"metric": "acuracy"}, ModelError, "Did you mean 'accuracy'"),
    ):
        with pytest.raises(error, match=message):
            study(ORDERS, tmp_path, **changes)
        assert not (tmp_path / TRIALS).exists() or read_rows(tmp_path) == {}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Not a directory.*can be written"):
        study(ORDERS, tmp_path / "file" / "study")


def test_a_study_needs_two_samples(make_study, tmp_path):
    with pytest.raises(DataError, match=r"at least two windows to measure on, got 1 from"):
        make_study(tmp_path, samples=1)


def test_without_calibration_only_orders_that_need_none_are_run(
    study, make_compressor, tmp_path, read_rows
):
    bare = make_compressor(calibration=None)
    with pytest.raises(DataError, match="needs calibration data"):
        study(ORDERS, tmp_path, bare)
    orders = ["magnitude:0.5 > rtn:4", "rtn:4 > magnitude:0.5"]
    study(orders, tmp_path, bare)
    rows = read_rows(tmp_path)
    assert {draw for _, draw in rows} == {0}
    assert rows[orders[0], 0]["correlation"] == []
    assert read_rows(tmp_path, "pairs") == {}


def test_one_bar_is_shown_and_no_other(study, tmp_path, capsys):
    capsys.readouterr()
    transformers.utils.logging.enable_progress_bar()
    study(["rtn:4 > magnitude:0.5"], tmp_path, draws=1, progress=True)
    shown = capsys.readouterr().err
    assert "trial" in shown
    assert "100%" in shown
    assert not any(word in shown for word in ("Loading weights", "Writing", "block", "perplexity"))
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_quiet_leaves_disabled_bars_disabled():
    transformers.utils.logging.disable_progress_bar()
    with quiet():
        assert not transformers.utils.logging.is_progress_bar_enabled()
    assert not transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()


def test_means_are_over_weights(make_study, tmp_path):
    """Layers differ in size: the down projection has twice the weights of a query's."""
    small = make_study(tmp_path)
    node = small.runner.run(Order.parse("magnitude:0.5"))
    states = dict(node.result.states)
    name = next(iter(states))
    states[name] = small.runner.original.states[name]
    from optimum_order.study.worker import _mean

    sizes = torch.tensor([state.weight.numel() for state in states.values()], dtype=torch.float64)
    expected = 0.5 * (1 - sizes[0] / sizes.sum())
    assert _mean(states, "sparsity") == pytest.approx(expected.item())
    assert len(set(sizes.tolist())) > 1
