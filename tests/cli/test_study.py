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
    small = [
        "--calibration-samples",
        2,
        "--sequence-length",
        32,
        "--evaluation-samples",
        4,
        "--draws",
        2,
    ]
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
    for summary in (
        result["summary"],
        expected,
    ):  # as the Python interface does it, but for how long it took
        for entry in summary["orders"]:
            del entry["seconds"], entry["cpu_seconds"]
    pairs = lambda summary: {tuple(pair["orders"]): pair for pair in summary["pairs"]}  # noqa: E731
    assert pairs(result["summary"]) == pairs(expected)
    assert result["summary"]["settings"] == expected["settings"]
    assert (
        done.err.count("100%") >= 1
        and "Loading weights" not in done.err
        and "Writing" not in done.err
    )


def test_people_see_a_table_and_where_the_report_is(program, studied, tmp_path):
    done = program("study", "--report-only", "-o", studied)
    assert done.code == 0 and done.err == ""
    assert "wanda × rtn" in done.out and "Does the order matter?" in done.out
    assert done.out.rstrip().endswith(f"Report: {studied / 'report.html'}")
    assert max(map(len, done.out.split("Does the order")[0].splitlines())) <= 80


def test_a_report_alone_runs_nothing(program, studied, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(
        "optimum_order.engine.run.run", lambda *a, **k: pytest.fail("a stage was run")
    )
    monkeypatch.setattr(
        "optimum_order.models.source.Checkpoint.load", lambda *a: pytest.fail("a model was loaded")
    )
    (studied / "report.html").unlink()
    assert program("study", tiny_llama_folder, "--report-only", "-o", studied).code == 0
    assert (studied / "report.html").is_file()
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


def chosen(program, monkeypatch, *arguments) -> list[str]:
    """The orders that a command would run."""
    seen = []
    monkeypatch.setattr(StudyCommand, "run", lambda self: seen.append(self._orders()))
    assert program("study", "model", "-o", "out", *arguments).code == 0
    return [str(order) for order in seen[0]]


def test_without_options_the_grid_has_54_pairs(program, monkeypatch):
    orders = chosen(program, monkeypatch)
    assert len(orders) == 2 * 54 + 15 and "wanda:0.65 > gptq:2" in orders
    given = [part for name, value in GRID.items() for part in (f"--{name}", value)]
    assert chosen(program, monkeypatch, *given) == orders


def test_one_option_of_the_grid_leaves_the_others_as_they_are(program, monkeypatch):
    orders = chosen(program, monkeypatch, "--quantizers", "gptq(group_size=16), rtn")
    assert "wanda:0.5 > gptq(bits=2, group_size=16)" in orders and "sparsegpt:0.3 > rtn:4" in orders


def test_a_file_and_a_grid_together(program, monkeypatch, tmp_path):
    (tmp_path / "orders.txt").write_text("wanda:0.5 > rtn:4 > wanda:0.7\n")
    both = chosen(program, monkeypatch, *GRID_OPTIONS, "--orders", tmp_path / "orders.txt")
    assert both[-1] == "wanda:0.5 > rtn:4 > wanda:0.7" and len(both) == 3 + 4 + 1
    simulated = chosen(
        program, monkeypatch, *GRID_OPTIONS, "--orders", tmp_path / "orders.txt", "--simulate"
    )
    assert all(("wanda" in order) == ("off_grid=true" in order) for order in simulated)
    assert simulated[-1].count("off_grid=true") == 2


BAD = {
    "one pair": (
        ["--pruners", "wanda", "--sparsities", "0.5", "--quantizers", "rtn", "--bits", "4"],
        "1 pairs",
    ),
    "bits that are none": (
        ["--bits", "2,three"],
        "--bits takes whole numbers with commas between them, such as 2,3,4",
    ),
    "half bits": (["--bits", "2.5,3"], "got '2.5,3'"),
    "too many bits": (["--bits", "4,9"], "in 2..8, got 9"),
    "sparsities that are none": (["--sparsities", "0.3;0.5"], "--sparsities takes numbers"),
    "a sparsity of 1": (["--sparsities", "0.3,1"], "in [0, 1), got 1"),
    "no sparsity": (["--sparsities", ""], "--sparsities takes numbers"),
    "a sparsity that is no number": (["--sparsities", "nan,0.5"], "finite"),
    "an unknown pruner": (["--pruners", "wandaa"], "Did you mean 'wanda'?"),
    "a pruner with its sparsity": (["--pruners", "wanda:0.5"], "without its sparsity"),
    "an order for a pruner": (["--pruners", "wanda > gptq"], "',' and another stage"),
    "an orders file that is missing": (
        ["--orders", "missing.txt"],
        "'missing.txt' cannot be read: No such file",
    ),
    "another metric's model": (["--metric", "accuracy"], "Accuracy is for image classifiers"),
    "an unknown metric": (["--metric", "perplexty"], "Did you mean 'perplexity'?"),
    "more draws than there is text": (["--draws", "5000"], "and 5000 are needed"),
    "no draw": (["--draws", "0"], "a draw or more"),
    "one sample": (["--evaluation-samples", "1"], "two samples or more"),
    "no calibration data": (["--calibration", "missing.txt"], "missing.txt"),
    "no evaluation data": (["--evaluate", "missing.txt"], "missing.txt"),
    "a limit below 0": (["--prefix-limit", "-1"], "0 GB or more"),
    "a group size that does not divide": (["--quantizers", "rtn(group_size=48)"], "8, 16, 32, 64"),
}


@pytest.mark.parametrize(("extra", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_stores_nothing(
    program, arguments, tmp_path, monkeypatch, extra, says
):
    monkeypatch.setattr("optimum_order.study.run.Study.run", lambda *a: pytest.fail("it was run"))
    done = program(*arguments, *extra)
    assert done.code == 2 and done.out == ""
    assert (
        done.err.startswith("optimum-order: error: ")
        and says in done.err
        and done.err.count("\n") == 1
    )
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
    assert (
        done.code == 2
        and "'calibration.seed' is 0 there and 5 now (calibration.digest differ" in done.err
    )
    with sqlite3.connect(studied / TRIALS) as db:
        assert db.execute("SELECT * FROM trials").fetchall() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wanda:0.5 > rtn:4\n# fine\nwanda:0.5 >\n", "Line 3 of"),
        ("wandaa:0.5", "Line 1 of .*Did you mean 'wanda'"),
        ("# nothing\n\n", "has no order"),
        ("", "has no order"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, says):
    (tmp_path / "orders.txt").write_text(text)
    with pytest.raises(OrderError, match=says):
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
    seen = []
    monkeypatch.setattr(StudyCommand, "run", lambda self: seen.append(vars(self.args)))
    program("study", "model", "-o", "out")
    (given,) = seen
    for function in (JointCompressor.from_pretrained, JointCompressor.study):
        parameters = inspect.signature(function).parameters
        for name in set(parameters) & set(given) - {"model", "orders"}:
            assert given[name] == parameters[name].default, name
    assert (
        given["evaluate"]
        == inspect.signature(JointCompressor.study).parameters["evaluation"].default
    )
