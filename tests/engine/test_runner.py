"""Sharing beginnings changes how long orders take and nothing else."""

import pytest
import torch

from optimum_order.engine import run as pipeline
from optimum_order.engine.runner import Node, Prefixes, Runner
from optimum_order.errors import DataError, OutputError
from optimum_order.order import Order

ORDERS = [
    "wanda:0.5",
    "wanda:0.5 > gptq:4",
    "wanda:0.5 > gptq:4 > magnitude:0.7",
    "gptq:4 > wanda:0.5",
    "wanda:0.5 > rtn:3",
    "gptq:4 > sparsegpt:0.3",
]
PLENTY = 10**9


@pytest.fixture(scope="module")
def compressor(make_compressor):
    return make_compressor()


@pytest.fixture(scope="module")
def alone(compressor):
    """The layers' weights after each order, run by itself."""
    found = {order: compressor.compress(order, progress=False).layers for order in ORDERS}
    return {
        order: {name: state.weight for name, state in layers.items()}
        for order, layers in found.items()
    }


@pytest.fixture
def make_runner(compressor, tmp_path):
    """`make_runner(limit)`: one that keeps beginnings in a folder, or with None keeps nothing."""

    def make(limit=PLENTY) -> Runner:
        runner = compressor._runner(progress=False)
        runner.prefixes = None if limit is None else Prefixes(tmp_path / "prefixes", limit)
        return runner

    return make


@pytest.fixture
def stage_runs(monkeypatch):
    """Every stage that is really run, as text, in a list that grows."""
    runs, run = [], pipeline.run

    def counted(model, units, order, *rest, **options):
        runs.append(str(order))
        return run(model, units, order, *rest, **options)

    monkeypatch.setattr(pipeline, "run", counted)
    return runs


def weights(node):
    return {name: state.weight for name, state in node.result.states.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("limit", [None, 0, 400_000, PLENTY])
def test_orders_come_out_as_if_each_were_run_alone(make_runner, alone, limit):
    runner = make_runner(limit)
    for text in ORDERS:
        order = runner.check(Order.parse(text))
        node = runner.run(order)
        assert same(weights(node), alone[text]), text
        in_model = {t.name: t.read() for unit in runner.units for t in unit.targets}
        assert same(in_model, weights(node)), "the model is left with the order's weights"
        assert node.result.stages == order.stages
        assert [r.stage for r in node.result.records[next(iter(in_model))]] == [
            str(stage) for stage in order
        ]
        assert len(node.seconds) == len(node.cpu_seconds) == len(order)


def test_a_shared_beginning_is_run_once(make_runner, stage_runs):
    runner = make_runner()
    for text in ORDERS:
        runner.run(runner.check(Order.parse(text)))
    tries = {"wanda:0.5", "gptq:4", "magnitude:0.7", "rtn:3", "sparsegpt:0.3"}
    assert set(stage_runs) == tries
    assert len(stage_runs) == 7  # as many as the trie has nodes
    stage_runs.clear()
    again = make_runner()  # what an earlier process left is used
    again.run(again.check(Order.parse(ORDERS[2])))
    assert stage_runs == []


def test_a_draw_shares_nothing_with_another(make_runner, stage_runs):
    runner = make_runner()
    order = runner.check(Order.parse("wanda:0.5"))
    first, second = runner.run(order, 0), runner.run(order, 1)
    assert len(stage_runs) == 2 and not same(weights(first), weights(second))
    assert same(weights(runner.run(order, 0)), weights(first)) and len(stage_runs) == 2


def test_what_does_not_fit_is_run_again(make_runner, stage_runs, tmp_path):
    runner = make_runner()
    runner.run(runner.check(Order.parse("wanda:0.5 > gptq:4")))
    size = max(file.stat().st_size for file in (tmp_path / "prefixes").iterdir())
    runner.prefixes.limit = int(1.5 * size)  # room for one
    before = weights(runner.run(runner.check(Order.parse("wanda:0.5 > gptq:4"))))
    runner.run(runner.check(Order.parse("rtn:4")))
    assert (
        sum(file.stat().st_size for file in (tmp_path / "prefixes").iterdir())
        <= runner.prefixes.limit
    )
    stage_runs.clear()
    assert same(weights(runner.run(runner.check(Order.parse("wanda:0.5 > gptq:4")))), before)
    assert stage_runs == ["wanda:0.5", "gptq:4"]


def test_the_least_recently_used_goes_first(tmp_path, make_runner):
    runner = make_runner(None)
    nodes = {
        text: runner.run(runner.check(Order.parse(text))) for text in ("rtn:2", "rtn:3", "rtn:4")
    }
    prefixes = Prefixes(tmp_path / "lru", PLENTY)
    for text in ("rtn:2", "rtn:3"):
        prefixes.put(0, Order.parse(text), nodes[text])
    prefixes.limit = 2 * max(file.stat().st_size for file in (tmp_path / "lru").iterdir()) + 1000
    assert prefixes.get(0, Order.parse("rtn:2")) is not None
    prefixes.put(0, Order.parse("rtn:4"), nodes["rtn:4"])
    assert prefixes.get(0, Order.parse("rtn:3")) is None
    assert same(weights(prefixes.get(0, Order.parse("rtn:2"))), weights(nodes["rtn:2"]))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file_is_made_again(make_runner, stage_runs, tmp_path, damage):
    runner = make_runner()
    order = runner.check(Order.parse("wanda:0.5 > gptq:4"))
    before = weights(runner.run(order))
    stage_runs.clear()
    for file in (tmp_path / "prefixes").iterdir():
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: 5000 if damage == "cut" else 0])
    assert same(weights(runner.run(order)), before) and len(stage_runs) == 2
    assert same(weights(runner.run(order)), before) and len(stage_runs) == 2


def test_only_what_is_wanted_is_kept(make_runner, tmp_path):
    runner = make_runner()
    wanted = Order.parse("wanda:0.5")
    runner.run(
        runner.check(Order.parse("wanda:0.5 > gptq:4")), keep=lambda prefix: prefix == wanted
    )
    assert len(list((tmp_path / "prefixes").iterdir())) == 1
    assert runner.prefixes.get(0, wanted) is not None
    runner.prefixes.drop(keep=[(0, Order.parse("rtn:4"))])
    assert list((tmp_path / "prefixes").iterdir()) == []


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".abc.safetensors.1.partial").write_bytes(b"half")
    Prefixes(tmp_path / "kept", PLENTY)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_full_disk_is_said(make_runner, tmp_path, monkeypatch):
    runner = make_runner()

    def full(value, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optimum_order.engine.snapshot.save", full)
    with pytest.raises(OutputError, match=r"No space left on device.*lower the limit"):
        runner.prefixes.put(0, Order.parse("rtn:4"), Node(runner.original))


def test_reset_gives_the_original_back(make_runner, compressor):
    runner = make_runner(None)
    runner.run(runner.check(Order.parse("rtn:2 > magnitude:0.9")))
    runner.reset()
    before = compressor.source.load().state_dict()
    assert same(dict(runner.model.state_dict()), dict(before))


def test_draws_are_disjoint_and_read_once(make_compressor, monkeypatch):
    from optimum_order import compressor as module

    reads, read = [], module.load_samples
    monkeypatch.setattr(
        module, "load_samples", lambda *a, **k: reads.append(k["samples"]) or read(*a, **k)
    )
    found = make_compressor()
    runner = found._runner(progress=False)
    found._draws.take(2)
    rows = [
        {tuple(row) for batch in runner.batches(draw) for row in batch["input_ids"].tolist()}
        for draw in (0, 1, 2)
    ]
    assert [len(each) for each in rows] == [4, 4, 4] and len(set.union(*rows)) == 12
    few = [tuple(row) for batch in runner.batches(1, 2) for row in batch["input_ids"].tolist()]
    whole = [tuple(row) for batch in runner.batches(1) for row in batch["input_ids"].tolist()]
    assert few == whole[:2]
    assert reads == [12], "the source is read once for all draws"
    for draw in (0, 1, 2):  # the same as those that are drawn one by one
        single = found._calibration(samples=4 * (draw + 1))
        assert {tuple(row) for row in single.ids[-4:].tolist()} == rows[draw]


def test_too_few_windows_for_the_draws(make_compressor):
    found = make_compressor(calibration_samples=300)
    with pytest.raises(DataError, match=r"enough for \d disjoint draws of 300, and 9 are needed"):
        found._draws.take(8)


def test_without_calibration_only_methods_that_need_none_are_run(make_compressor):
    runner = make_compressor(calibration=None)._runner(progress=False)
    assert runner.batches(0) == [] and runner.batches(0, 2) == []
    runner.run(runner.check(Order.parse("magnitude:0.5 > rtn:4")))
    with pytest.raises(DataError, match="needs calibration data"):
        runner.check(Order.parse("wanda:0.5"))
