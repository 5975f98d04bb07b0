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

from optimum_order.engine import run as pipeline
from optimum_order.errors import DataError, ModelError, OrderError, OutputError
from optimum_order.order import Order, Stage
from optimum_order.study import study
from optimum_order.study.study import ORIGINAL, TRIALS, Trials, grid, off_grid, with_parts

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
    summary = make_compressor(calibration_samples=2).study(
        ORDERS, folder, evaluation=str(text_file), **SMALL
    )
    return folder, summary


def rows(folder, table="trials"):
    """What trials found, without how long they took."""
    timed = {"seconds", "cpu_seconds", "measure_seconds", "measure_cpu_seconds"}
    found = Trials.open(folder).rows(table)
    return {
        key: {name: value for name, value in row.items() if name not in timed}
        for key, row in found.items()
    }


# Which orders


def test_a_grid_is_both_orders_of_every_pair_and_each_stage_alone():
    found = [
        str(order)
        for order in grid([Stage("wanda"), Stage("magnitude")], [0.3, 0.5], [Stage("rtn")], [4, 3])
    ]
    assert found[:6] == [
        "wanda:0.3",
        "wanda:0.5",
        "magnitude:0.3",
        "magnitude:0.5",
        "rtn:4",
        "rtn:3",
    ]
    assert len(found) == len(set(found)) == 6 + 2 * 8
    assert "wanda:0.3 > rtn:4" in found and "rtn:4 > wanda:0.3" in found


def test_a_grid_keeps_options_and_drops_repetitions():
    pruners = [Stage("sparsegpt", pattern="none"), Stage("sparsegpt")]
    found = [
        str(order) for order in grid(pruners, [0.5, 0.5], [Stage("gptq", group_size=16)], [4, 3, 4])
    ]
    assert len(found) == 3 + 4
    assert "sparsegpt:0.5 > gptq(bits=4, group_size=16)" in found


def test_a_simulated_grid_leaves_the_grid_and_nothing_else():
    plain = grid([Stage("wanda")], [0.5], [Stage("rtn")], [4, 3])
    simulated = grid([Stage("wanda")], [0.5], [Stage("rtn")], [4, 3], simulate=True)
    assert [
        str(order).replace("wanda(off_grid=true, sparsity=0.5)", "wanda:0.5") for order in simulated
    ] == [str(order) for order in plain]
    assert (
        str(off_grid(Order.parse("rtn:4 > wanda(pattern=2:4)")))
        == "rtn:4 > wanda(off_grid=true, pattern=2:4)"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ([Stage("wanda")], [0.5], [Stage("rtn")], [4]),
            "is 1 pairs, and a study compares at least 2",
        ),
        (([Stage("wanda")], [0.5, 0.5], [Stage("rtn")], [4]), "is 1 pairs"),
        (([Stage("wanda")], [0.5], [Stage("rtn")], []), "is 0 pairs"),
        (([], [0.5], [Stage("rtn")], [4]), "is 0 pairs"),
        (
            ([Stage("wanda", 0.5)], [0.5], [Stage("rtn")], [4, 3]),
            "'wanda:0.5' without its sparsity",
        ),
        (([Stage("wanda")], [0.5], [Stage("rtn", bits=4)], [4, 3]), "without its bits"),
        (([Stage("wanda")], [1.5], [Stage("rtn")], [4, 3]), r"in \[0, 1\), got 1.5"),
        (([Stage("wanda")], [0.5], [Stage("rtn")], [4, 9]), "in 2..8, got 9"),
        (([Stage("gptq")], [0.5], [Stage("rtn")], [4, 3]), "Unknown option 'sparsity'"),
    ],
)
def test_a_grid_that_is_none(arguments, says):
    with pytest.raises(OrderError, match=says):
        grid(*arguments)


def test_every_stage_is_also_run_alone():
    found = [
        str(order)
        for order in with_parts(
            [Order.parse("wanda:0.5 > rtn:4"), Order.parse("rtn:4 > wanda:0.5")]
        )
    ]
    assert found == ["wanda:0.5", "rtn:4", "wanda:0.5 > rtn:4", "rtn:4 > wanda:0.5"]


# What is stored


def test_every_trial_is_there(finished):
    folder, summary = finished
    names = {
        *ORDERS,
        "wanda:0.5",
        "magnitude:0.5",
        "magnitude:0.7",
        *(f"rtn:{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    }
    calibrated = {name for name in names if "wanda" in name}
    expected = {(ORIGINAL, 0), *((name, 0) for name in names), *((name, 1) for name in calibrated)}
    assert set(rows(folder)) == expected
    assert set(Trials.open(folder).planned()) == expected - {(ORIGINAL, 0)}
    assert summary["trials"] == {
        "done": len(expected) - 1,
        "planned": len(expected) - 1,
        "missing": [],
        "failed": [],
    }
    assert summary["draws"] == [0, 1]
    left = {file.name for file in folder.iterdir()}
    assert left == {TRIALS, "trials.csv", "summary.json", "plots", "report.html"}, (
        "what orders shared is removed"
    )


def test_a_trial_says_what_a_run_of_its_own_would(finished, compressor, text_file):
    found = rows(finished[0])["wanda:0.5 > rtn:4", 0]
    alone = compressor.compress("wanda:0.5 > rtn:4", progress=False)
    samples = compressor._evaluation(str(text_file), 4)
    metric = compressor._metric(alone.model, "auto")
    measured = metric.measure(alone.model, samples, batch_size=128, progress=False)
    assert found["performances"] == pytest.approx(measured.performances.tolist(), rel=1e-6)
    assert found["performance"] == pytest.approx(measured.performance, rel=1e-6)
    assert found["value"] == pytest.approx(measured.value, rel=1e-6)
    assert found["sparsity"] == alone.sparsity == 0.5 and found["bits"] == 4
    assert found["stages"] == ["wanda:0.5", "rtn:4"]
    assert set(found["layer_errors"]) == set(alone.layers)


def test_bytes_are_of_real_files(finished, compressor, tmp_path):
    alone = compressor.compress("wanda:0.5 > rtn:4", progress=False)
    found = rows(finished[0])["wanda:0.5 > rtn:4", 0]["bytes"]
    assert "sparse" in found
    for name, size in found.items():
        alone.save_pretrained(tmp_path / name, format=name)
        saved = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        assert 0 <= saved - size < 2000, name  # but for what our header says
    assert rows(finished[0])[ORIGINAL, 0]["bytes"]["dense"] > 1.5 * found["sparse"]


def test_a_draw_changes_what_calibrates_and_only_that(finished):
    found = rows(finished[0])
    assert found["wanda:0.5", 0]["performances"] != found["wanda:0.5", 1]["performances"]
    assert ("magnitude:0.5 > rtn:4", 1) not in found
    assert "bytes" not in found["wanda:0.5", 1]


def test_the_parts_of_a_pair_sum_to_the_whole(finished):
    found = rows(finished[0], "pairs")
    assert set(found) == {(f"{ORDERS[0]} | {ORDERS[1]}", draw) for draw in (0, 1)}
    trials = rows(finished[0])
    for (_, draw), layers in found.items():
        for name, (whole, owner, interference) in layers.items():
            assert owner + interference == pytest.approx(whole, rel=1e-6, abs=1e-12)
            # positive where the first order of the pair has less error
            first, second = (trials[order, draw]["layer_errors"][name] for order in ORDERS[:2])
            assert whole == pytest.approx(second - first, rel=1e-3, abs=1e-6)


def test_correlations_are_of_errors_that_each_unit_makes_alone(finished):
    found = rows(finished[0])["rtn:2", 0]["correlation"]
    matrix = torch.tensor(found)
    assert matrix.shape == (2, 2) and torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1]) and abs(matrix[0, 1]) < 1


def test_samples_to_measure_on_come_from_all_over_the_text(make_compressor, text_file):
    compressor = make_compressor()
    every = compressor._evaluation(str(text_file))
    some = compressor._evaluation(str(text_file), 4)
    assert some.ids.tolist() == every.ids[[i * len(every) // 4 for i in range(4)]].tolist()
    assert compressor._evaluation(str(text_file), 10**6).digest == every.digest


# Stopped and started again

CHILD = """
import json, sys
from optimum_order import JointCompressor
from optimum_order.engine import run as pipeline
model, text, folder, log, orders = sys.argv[1:]
run = pipeline.run
def counted(model, units, order, *rest, **options):
    found = run(model, units, order, *rest, **options)
    with open(log, "a") as file:
        file.write(f"{order}\\n")
    return found
pipeline.run = counted
compressor = JointCompressor.from_pretrained(
    model, calibration=text, calibration_samples=2, sequence_length=32, device="cpu"
)
compressor.study(json.loads(orders), folder, evaluation=text, evaluation_samples=4, draws=2, progress=False)
"""


def start(model, text, folder, log) -> subprocess.Popen:
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        model,
        text,
        folder,
        log,
        json.dumps(ORDERS),
    ]
    return subprocess.Popen([str(each) for each in arguments], stderr=subprocess.PIPE, text=True)


def stored(folder: Path) -> int:
    """How many trials are in the file of a study that is being written."""
    if not (folder / TRIALS).is_file():
        return 0
    with sqlite3.connect(f"{(folder / TRIALS).as_uri()}?mode=ro", uri=True, timeout=60) as db:
        try:
            return db.execute("SELECT count(*) FROM trials").fetchone()[0]
        except sqlite3.OperationalError:  # it is not there yet
            return 0


def test_a_killed_study_goes_on_where_it_was(
    finished, compressor, tiny_llama_folder, text_file, tmp_path, monkeypatch
):
    folder, log, expected = tmp_path / "study", tmp_path / "log", rows(finished[0])
    generator = random.Random(os.getpid())
    child = start(tiny_llama_folder, text_file, folder, log)
    wanted = generator.randint(1, len(expected) - 3)
    while stored(folder) < wanted and child.poll() is None:
        time.sleep(0.005)
    time.sleep(generator.random() * 0.1)  # some moment in a trial
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr.read()
    child.stderr.close()
    done = rows(folder)
    assert done.items() <= expected.items(), "what is stored is whole"
    assert wanted <= len(done) < len(expected)

    before = log.read_text().splitlines()
    runs, run = [], pipeline.run

    def counted(model, units, order, *rest, **options):
        runs.append(str(order))
        return run(model, units, order, *rest, **options)

    monkeypatch.setattr(pipeline, "run", counted)
    compressor.study(ORDERS, folder, evaluation=str(text_file), **SMALL)
    assert rows(folder) == expected
    assert rows(folder, "pairs") == rows(finished[0], "pairs")
    assert not (folder / "prefixes").exists()
    # Every stage of the trie once for each draw that matters to it, rtn:4 also in draw 1, where wanda goes on from it;
    # and the one trial that was killed, of at most three stages, a second time.
    orders = [Order.parse(order) for order, _ in expected if order != ORIGINAL]
    trie = {order.stages[:n] for order in orders for n in range(1, len(order) + 1)}
    once = len(trie) + sum(study.draws_matter(Order(stages)) for stages in trie) + 1
    assert once <= len(before) + len(runs) <= once + 3, (before, runs)


def test_a_study_that_is_done_runs_nothing(finished, compressor, text_file, monkeypatch, tmp_path):
    before = rows(finished[0])
    monkeypatch.setattr(
        "optimum_order.engine.run.run", lambda *a, **k: pytest.fail("a stage was run")
    )
    monkeypatch.setattr(
        "optimum_order.study.study.Study._trial", lambda *a: pytest.fail("a trial was run")
    )
    compressor.study(ORDERS[:2], finished[0], evaluation=str(text_file), **SMALL)
    assert rows(finished[0]) == before


def test_orders_may_be_added_later(compressor, text_file, tmp_path):
    one = {"evaluation": str(text_file), "evaluation_samples": 4, "draws": 1, "progress": False}
    compressor.study(ORDERS[:1], tmp_path, **one)
    assert rows(tmp_path, "pairs") == {}
    summary = compressor.study(ORDERS[1:2], tmp_path, **one)
    assert len(rows(tmp_path, "pairs")) == 1, (
        "the reverse was run in an earlier session and is run again for the split"
    )
    assert [pair["orders"] for pair in summary["pairs"]] == [ORDERS[:2]]


def test_the_split_is_there_also_where_no_beginning_is_kept(
    finished, compressor, text_file, tmp_path
):
    one = SMALL | {"draws": 1, "prefix_limit": 0}
    compressor.study(ORDERS[:2], tmp_path, evaluation=str(text_file), **one)
    assert rows(tmp_path, "pairs") == {
        key: row for key, row in rows(finished[0], "pairs").items() if key[1] == 0
    }


def test_draws_may_be_shared_out(finished, compressor, text_file, tmp_path):
    for draw in (1, 0):
        compressor.study(ORDERS, tmp_path, evaluation=str(text_file), **SMALL | {"draws": [draw]})
    assert rows(tmp_path) == rows(finished[0])


def test_two_processes_do_not_run_one_draw(compressor, text_file, tmp_path):
    with (
        study._prefixes(tmp_path, 1),
        pytest.raises(OutputError, match="Another process is running draw 1 of the study"),
    ):
        compressor.study(ORDERS, tmp_path, evaluation=str(text_file), **SMALL)
    assert rows(tmp_path) == {}
    compressor.study(ORDERS[:1], tmp_path, evaluation=str(text_file), **SMALL)


def test_an_order_that_breaks_the_model_is_a_trial_like_any_other(
    compressor, text_file, tmp_path, monkeypatch
):
    measured = study.Study._measured

    def fragile(self):
        if (
            sum((t.read() == 0).sum().item() for unit in self.runner.units for t in unit.targets)
            > 30_000
        ):
            raise ModelError("The perplexity of window 1 of 4 is not finite.")
        return measured(self)

    monkeypatch.setattr(study.Study, "_measured", fragile)
    one = SMALL | {"draws": 1}
    summary = compressor.study(
        ["magnitude:0.5 > rtn:8", "magnitude:0.1 > rtn:8"],
        tmp_path,
        evaluation=str(text_file),
        **one,
    )
    failed = {each["order"] for each in summary["trials"]["failed"]}
    assert {
        "magnitude:0.5",
        "magnitude:0.5 > rtn:8",
    } <= failed and "magnitude:0.1 > rtn:8" not in failed
    assert rows(tmp_path)["magnitude:0.5", 0]["performance"] is None
    assert "broke the model" in (tmp_path / "report.html").read_text()


# Refused, with nothing lost


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 3}, "calibration.digest"),
        ({"calibration_samples": 3}, "calibration.samples"),
        ({"sequence_length": 16}, "evaluation.digest"),
        ({"ignore": ["*.o_proj"]}, "layers"),
        ({"dtype": "bfloat16"}, "weights"),
    ],
)
def test_trials_of_other_settings_are_refused(finished, make_compressor, text_file, changes, field):
    before = rows(finished[0])
    with pytest.raises(OutputError, match="holds the trials of another study") as error:
        make_compressor(**{"calibration_samples": 2} | changes).study(
            ORDERS, finished[0], evaluation=str(text_file), **SMALL
        )
    assert f"'{field}'" in str(error.value) or field in str(error.value)
    assert len(str(error.value)) < 700
    assert rows(finished[0]) == before


def test_another_number_of_samples_is_named(finished, compressor, text_file):
    with pytest.raises(OutputError, match=r"'evaluation\.samples' is 4 there and 3 now"):
        compressor.study(
            ORDERS, finished[0], evaluation=str(text_file), **SMALL | {"evaluation_samples": 3}
        )


def test_settings_without_a_trial_are_forgotten(tmp_path):
    Trials(tmp_path, {"model": "a"})
    trials = Trials(tmp_path, {"model": "b"})
    trials.plan([("rtn:4", 0)])
    with pytest.raises(OutputError, match="'model' is 'b' there and 'c' now"):
        Trials(tmp_path, {"model": "c"})
    with pytest.raises(OutputError, match="'calibration' is None there and 3 now"):
        Trials(tmp_path, {"model": "b", "calibration": 3})


def test_rows_are_stored_all_or_none(tmp_path):
    trials = Trials(tmp_path, {})
    with pytest.raises(OutputError):
        trials.add({("trials", "a", 0): {"x": 1}, ("trials", "b", 0): {"x": float("nan")}})
    assert Trials.open(tmp_path).rows("trials") == {}


@pytest.mark.parametrize("content", [b"", b"hello, this is no database at all", None])
def test_a_folder_without_trials_is_not_opened(tmp_path, content):
    if content is not None:
        (tmp_path / TRIALS).write_bytes(content)
    with pytest.raises(OutputError, match=r"no study was run there|cannot hold a study"):
        Trials.open(tmp_path)


def test_trials_of_an_earlier_version_can_be_read(tmp_path):
    with sqlite3.connect(tmp_path / TRIALS) as db:
        db.execute("CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT)")
        for table in ("trials", "pairs"):
            db.execute(
                f"CREATE TABLE {table} (orders TEXT, draw INTEGER, data TEXT, PRIMARY KEY (orders, draw))"
            )
        db.execute("INSERT INTO settings VALUES ('model', '\"m\"')")
        db.execute("INSERT INTO trials VALUES ('rtn:4', 0, '{}')")
    trials = Trials.open(tmp_path)
    assert (
        trials.settings == {"model": "m"}
        and trials.planned() == []
        and trials.done() == {("rtn:4", 0)}
    )


def test_a_folder_that_cannot_be_written(compressor, text_file, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Not a directory.*can be written"):
        compressor.study(ORDERS, tmp_path / "file" / "study", evaluation=str(text_file), **SMALL)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"draws": 0}, DataError, "a draw or more"),
        ({"draws": [-1]}, DataError, "numbered from 0"),
        ({"draws": 1000}, DataError, "1000 are needed"),
        ({"evaluation_samples": 1}, DataError, "two samples or more"),
        ({"prefix_limit": -1}, DataError, "0 GB or more"),
        ({"metric": "accuracy"}, ModelError, "Accuracy is for image classifiers"),
        ({"metric": "acuracy"}, ModelError, "Did you mean 'accuracy'"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(
    compressor, text_file, tmp_path, changes, error, says
):
    with pytest.raises(error, match=says):
        compressor.study(ORDERS, tmp_path, evaluation=str(text_file), **SMALL | changes)
    assert not (tmp_path / TRIALS).exists() or rows(tmp_path) == {}


def test_what_needs_calibration_says_so(make_compressor, text_file, tmp_path):
    with pytest.raises(DataError, match="needs calibration data"):
        make_compressor(calibration=None).study(
            ORDERS, tmp_path, evaluation=str(text_file), **SMALL
        )
    make_compressor(calibration_samples=2).study(
        ORDERS[:1], tmp_path, evaluation=str(text_file), **SMALL
    )


def test_without_calibration_there_is_a_study_of_what_needs_none(
    make_compressor, text_file, tmp_path
):
    orders = ["magnitude:0.5 > rtn:4", "rtn:4 > magnitude:0.5"]
    summary = make_compressor(calibration=None).study(
        orders, tmp_path, evaluation=str(text_file), **SMALL
    )
    (pair,) = summary["pairs"]
    assert pair["advantage"]["over"] == "samples" and not pair["advantage"]["calibrated"]
    assert pair["split"] is None and summary["correlation"] is None


def test_one_bar_is_shown_and_no_other(make_compressor, text_file, tmp_path, capsys):
    capsys.readouterr()
    transformers.utils.logging.enable_progress_bar()
    make_compressor(calibration_samples=2).study(
        ["rtn:4 > magnitude:0.5"],
        tmp_path,
        evaluation=str(text_file),
        **SMALL | {"draws": 1, "progress": True},
    )
    shown = capsys.readouterr().err
    assert "trial" in shown and "100%" in shown
    assert not any(word in shown for word in ("Loading weights", "Writing", "block", "perplexity"))
    assert transformers.utils.logging.is_progress_bar_enabled()
