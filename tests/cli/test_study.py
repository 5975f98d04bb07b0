"""`optimum-order study` runs a grid or a file of orders, reports, and refuses bad input early."""

import inspect
import json
import sqlite3

import pytest

from optimum_order import JointCompressor
from optimum_order.cli.study import GRID, StudyCommand, read_orders
from optimum_order.errors import OrderError
from optimum_order.study.trials import TRIALS, Trials


@pytest.fixture
def arguments(tiny_llama_folder, text_file, tmp_path):
    """A study of a few seconds in `out`; later arguments win over earlier ones."""
    small = ["--calibration-samples", 2, "--sequence-length", 32]
    small += ["--evaluation-samples", 4, "--draws", 2]
    data = ["--calibration", text_file, "--evaluate", text_file, "--device", "cpu"]
    return ["study", tiny_llama_folder, *small, *data, "-o", tmp_path / "out"]


@pytest.fixture(scope="module")
def studied(tiny_llama_folder, text_file, tmp_path_factory):
    """The folder of a finished study. Do not write into it."""
    folder = tmp_path_factory.mktemp("studied")
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder,
        calibration=str(text_file),
        calibration_samples=2,
        sequence_length=32,
        device="cpu",
    )
    orders = ["wanda:0.5 > rtn:4", "rtn:4 > wanda:0.5", "wanda:0.5 > rtn:3", "rtn:3 > wanda:0.5"]
    compressor.study(
        orders, folder, draws=2, evaluation=str(text_file), evaluation_samples=4, progress=False
    )
    return folder


GRID_OPTIONS = ["--pruners", "wanda", "--sparsities", "0.5", "--quantizers", "rtn", "--bits", "4,3"]


def test_a_grid_is_run_and_reported(program, arguments, studied, tmp_path):
    done = program(*arguments, *GRID_OPTIONS, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert list(result) == ["output", "report", "summary"]
    assert result["report"] == str(tmp_path / "out" / "report.html")
    assert result["summary"] == json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = json.loads((studied / "summary.json").read_text())
    # the summary is that of the Python interface, but for the seconds
    for summary in (result["summary"], expected):
        for entry in summary["orders"]:
            del entry["seconds"], entry["cpu_seconds"]
        summary["pairs"] = {tuple(pair["orders"]): pair for pair in summary["pairs"]}
    assert result["summary"]["pairs"] == expected["pairs"]
    assert result["summary"]["settings"] == expected["settings"]
    assert {"versions", "dtype", "device", "threads"} <= set(expected["settings"])
    assert len(result["summary"]["commands"]) == 1 and not expected["commands"]
    assert done.err.count("100%") >= 1
    assert "Loading weights" not in done.err and "Writing" not in done.err


def test_a_report_alone_runs_nothing_and_is_shown(program, studied, tiny_llama_folder):
    (studied / "report.html").unlink()
    with pytest.MonkeyPatch.context() as patch:
        for target in ("engine.run.run", "models.source.Checkpoint.load"):
            patch.setattr(f"optimum_order.{target}", lambda *a, **k: pytest.fail("it ran"))
        done = program("study", tiny_llama_folder, "--report-only", "-o", studied)
    assert done.code == 0 and done.err == ""
    assert (studied / "report.html").is_file()
    assert "wanda × rtn" in done.out and "Does the order matter?" in done.out
    assert done.out.rstrip().endswith(f"Report: {studied / 'report.html'}")
    assert max(map(len, done.out.split("Does the order")[0].splitlines())) <= 80
    for words in ([studied, "--report-only"], ["--report-only", studied]):
        done = program("study", *words)  # as the other commands name what they write
        assert done.code == 0 and done.out.rstrip().endswith("report.html")
    done = program("study", "tiny-llama")
    assert done.code == 2 and "study MODEL OUTPUT" in done.err
    done = program("study", "other-model", "--report-only", "-o", studied)
    assert done.code == 2 and f"study of '{tiny_llama_folder.name}'" in done.err


def test_orders_of_a_file_are_run_in_place_of_the_grid(program, arguments, tmp_path):
    (tmp_path / "orders.txt").write_text(
        "# three\nwanda:0.5 > rtn:4 > magnitude:0.6\n\nrtn:4 > wanda:0.5 > magnitude:0.6\n"
    )
    done = program(*arguments, "--orders", tmp_path / "orders.txt", "--draws", "1")
    assert done.code == 0, done.err
    orders = {order for order, _ in Trials.open(tmp_path / "out").done()}
    assert "rtn:4 > wanda:0.5 > magnitude:0.6" in orders and "magnitude:0.6" in orders
    assert not any("gptq" in order for order in orders)
    assert "did best of 2 orders" in done.out


def planned(program, monkeypatch, *arguments) -> list[str]:
    """The orders that a command would run."""
    record = []
    monkeypatch.setattr(StudyCommand, "run", lambda self: record.append(self._orders()))
    assert program("study", "model", "-o", "out", *arguments).code == 0
    return [str(order) for order in record[0]]


def test_without_options_the_grid_has_54_pairs(program, monkeypatch):
    orders = planned(program, monkeypatch)
    assert len(orders) == 2 * 54 + 15 and "wanda:0.65 > gptq:2" in orders
    words = [part for name, value in GRID.items() for part in (f"--{name}", value)]
    assert planned(program, monkeypatch, *words) == orders


def test_one_option_of_the_grid_leaves_the_defaults_of_the_others(program, monkeypatch):
    orders = planned(program, monkeypatch, "--quantizers", "gptq(group_size=16), rtn")
    assert "wanda:0.5 > gptq(bits=2, group_size=16)" in orders and "sparsegpt:0.3 > rtn:4" in orders


def test_a_file_and_a_grid_together(program, monkeypatch, tmp_path):
    (tmp_path / "orders.txt").write_text("wanda:0.5 > rtn:4 > wanda:0.7\n")
    options = [*GRID_OPTIONS, "--orders", tmp_path / "orders.txt"]
    both = planned(program, monkeypatch, *options)
    assert both[-1] == "wanda:0.5 > rtn:4 > wanda:0.7" and len(both) == 3 + 4 + 1
    simulated = planned(program, monkeypatch, *options, "--simulate")
    assert all(("wanda" in order) == ("off_grid=true" in order) for order in simulated)
    assert simulated[-1].count("off_grid=true") == 2


ONE_PAIR = ["--pruners", "wanda", "--sparsities", "0.5", "--quantizers", "rtn", "--bits", "4"]
WHOLE = "--bits takes whole numbers with commas between them, such as 2,3,4"
BAD = [
    (ONE_PAIR, "1 pairs"),
    (["--bits", "2,three"], WHOLE),
    (["--bits", "2.5,3"], "got '2.5,3'"),
    (["--bits", "4,9"], "in 2..8, got 9"),
    (["--sparsities", "0.3;0.5"], "--sparsities takes numbers"),
    (["--sparsities", "0.3,1"], "in [0, 1), got 1"),
    (["--sparsities", ""], "--sparsities takes numbers"),
    (["--sparsities", "nan,0.5"], "finite"),
    (["--pruners", "wandaa"], "Did you mean 'wanda'?"),
    (["--pruners", "wanda:0.5"], "without its sparsity"),
    (["--pruners", "wanda > gptq"], "Unknown option 'sparsity'"),
    (["--orders", "missing.txt"], "'missing.txt' cannot be read: No such file"),
    (["--metric", "accuracy"], "Accuracy is for image classifiers"),
    (["--metric", "perplexty"], "Did you mean 'perplexity'?"),
    (["--draws", "5000"], "and 5000 are needed"),
    (["--draws", "0"], "a draw or more"),
    (["--evaluation-samples", "1"], "two samples or more"),
    (["--calibration", "missing.txt"], "missing.txt"),
    (["--evaluate", "missing.txt"], "missing.txt"),
    (["--prefix-limit", "-1"], "0 GB or more"),
    (["--quantizers", "rtn(group_size=48)"], "8, 16, 32, 64"),
]


def test_bad_input_is_one_line_and_stores_nothing(program, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_order.study.run.Study.run", lambda *a: pytest.fail("it ran"))
    for options, message in BAD:
        done = program(*arguments, *options)
        assert done.code == 2 and done.out == "", options
        *steps, line = done.err.splitlines()
        assert line.startswith("optimum-order: error: ") and message in line
        assert not any("Traceback" in step or "error" in step for step in steps)
        assert not (tmp_path / "out" / TRIALS).exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_model_is_read(program, tmp_path):
    (tmp_path / "file").touch()
    done = program("study", tmp_path / "no-such-model", "-o", tmp_path / "file" / "out")
    assert done.code == 2 and "cannot hold a study" in done.err


def test_a_model_must_be_named(program, tmp_path):
    done = program("study", "-o", tmp_path / "out")
    assert done.code == 2 and "Say which MODEL" in done.err
    done = program("study", "--report-only", "-o", tmp_path / "out")
    assert done.code == 2 and "no study was run there" in done.err


def test_other_settings_are_refused_and_named(program, arguments, studied):
    with sqlite3.connect(studied / TRIALS) as db:
        before = db.execute("SELECT * FROM trials").fetchall()
    arguments[arguments.index("-o") + 1] = studied
    done = program(*arguments, *GRID_OPTIONS, "--seed", 5)
    difference = "'calibration.seed' is 0 there and 5 now (calibration.digest differ"
    assert done.code == 2 and difference in done.err
    with sqlite3.connect(studied / TRIALS) as db:
        assert db.execute("SELECT * FROM trials").fetchall() == before


def test_a_bad_line_is_named(tmp_path):
    for text, message in [
        ("wanda:0.5 > rtn:4\n# fine\nwanda:0.5 >\n", "Line 3 of"),
        ("wandaa:0.5", "Line 1 of .*Did you mean 'wanda'"),
        ("# nothing\n\n", "has no order"),
        ("", "has no order"),
    ]:
        (tmp_path / "orders.txt").write_text(text)
        with pytest.raises(OrderError, match=message):
            read_orders(tmp_path / "orders.txt")


def test_a_file_that_is_no_text_or_endless(tmp_path):
    (tmp_path / "orders.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OrderError, match="no UTF-8 text"):
        read_orders(tmp_path / "orders.txt")
    (tmp_path / "orders.txt").write_bytes(b"#" * 1_000_001)
    with pytest.raises(OrderError, match="too long"):
        read_orders(tmp_path / "orders.txt")


def test_orders_are_canonical_and_a_byte_order_mark_is_no_order(tmp_path):
    (tmp_path / "orders.txt").write_text(
        "wanda(sparsity=0.50) > gptq(bits=4)  # a comment\r\n", encoding="utf-8-sig"
    )
    assert [str(order) for order in read_orders(tmp_path / "orders.txt")] == ["wanda:0.5 > gptq:4"]


def test_the_defaults_are_those_of_the_api(program, monkeypatch):
    parsed = []
    monkeypatch.setattr(StudyCommand, "run", lambda self: parsed.append(vars(self.args)))
    program("study", "model", "-o", "out")
    (options,) = parsed
    for function in (JointCompressor.from_pretrained, JointCompressor.study):
        parameters = inspect.signature(function).parameters
        for name in set(parameters) & set(options) - {"model", "orders"}:
            assert options[name] == parameters[name].default, name
    study = inspect.signature(JointCompressor.study).parameters
    assert options["evaluate"] == study["evaluation"].default


def test_a_dry_run_needs_no_weights_and_writes_nothing(
    program, arguments, tmp_path, tiny_llama_folder
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_llama_folder.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    arguments[1] = bare
    done = program(*arguments, *GRID_OPTIONS, "--dry-run", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)["forecast"]
    # 2 pairs both ways and wanda, with two draws each; rtn at 6 widths with one
    assert result["trials"] == 2 * 4 + 2 + 6
    assert result["summary"].startswith("16 trials, about ")
    assert result["seconds"] > 0 and result["memory"] > 10**6
    assert not (tmp_path / "out").exists()
    plan = ["plan", bare, "--stages", "wanda:0.5, rtn:4", *arguments[2:-2], "--dry-run"]
    done = program(*plan)
    assert done.code == 0 and "Every order in full: 4 trials, about " in done.out
    done = program("compress", bare, tmp_path / "o", "--order", "rtn:4", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert 0 < json.loads(done.out)["total"]["bytes"] < json.loads(done.out)["before"]
    assert not (tmp_path / "o").exists()


def test_a_large_study_says_first_how_long_it_takes(program, arguments, monkeypatch):
    monkeypatch.setattr("optimum_order.cli.study._MANY", 1)
    monkeypatch.setattr(
        JointCompressor, "study", lambda *_, **__: (_ for _ in ()).throw(OrderError("enough"))
    )
    done = program(*arguments, *GRID_OPTIONS)
    assert done.code == 2 and "enough" in done.err
    assert "The study has 16 trials, about " in done.err
