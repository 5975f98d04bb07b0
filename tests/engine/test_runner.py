"""Sharing beginnings changes how long orders take and nothing else."""

import pytest
import torch

from optimum_order.engine import runner as runner_module
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
    ends = {}
    for order in ORDERS:
        layers = compressor.compress(order, pause="block", progress=False).layers
        ends[order] = {name: state.weight for name, state in layers.items()}
    return ends


@pytest.fixture
def make_runner(compressor, tmp_path):
    """`make_runner(limit)`: one that stores beginnings in a folder, or with None stores nothing."""

    def make(limit=PLENTY) -> Runner:
        runner = compressor.runner(progress=False)
        runner.prefixes = None if limit is None else Prefixes(tmp_path / "prefixes", limit)
        return runner

    return make


@pytest.fixture
def stage_runs(monkeypatch):
    """Every stage that is really run, as text, in a list that grows."""
    runs = []
    run = runner_module.run

    def counted(subject, recipe, *rest, **options):
        runs.append(str(recipe.order))
        return run(subject, recipe, *rest, **options)

    monkeypatch.setattr(runner_module, "run", counted)
    return runs


def run(runner, text, *rest, **options):
    return runner.run(runner.check(Order.parse(text)), *rest, **options)


def weights(node):
    return {name: state.weight for name, state in node.result.states.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("limit", [None, 0, 400_000, PLENTY])
def test_orders_come_out_as_if_each_were_run_alone(make_runner, alone, limit):
    runner = make_runner(limit)
    for text in ORDERS:
        node = run(runner, text)
        assert same(weights(node), alone[text]), text
        in_model = {t.name: t.read() for unit in runner.units for t in unit.targets}
        assert same(in_model, weights(node)), "the model is left with the order's weights"
        assert str(node.result.order) == text
        records = node.result.records[next(iter(in_model))]
        assert [record.stage for record in records] == text.split(" > ")
        assert len(node.seconds) == len(node.cpu_seconds) == len(records)


def test_a_shared_beginning_is_run_once(make_runner, stage_runs):
    runner = make_runner()
    for text in ORDERS:
        run(runner, text)
    stages = {"wanda:0.5", "gptq:4", "magnitude:0.7", "rtn:3", "sparsegpt:0.3"}
    assert set(stage_runs) == stages
    assert len(stage_runs) == 7  # as many as the trie has nodes
    stage_runs.clear()
    run(make_runner(), ORDERS[2])
    assert stage_runs == [], "nodes of an earlier process are used"


def test_a_draw_shares_nothing_with_another(make_runner, stage_runs):
    runner = make_runner()
    first = run(runner, "wanda:0.5", 0)
    second = run(runner, "wanda:0.5", 1)
    assert len(stage_runs) == 2
    assert not same(weights(first), weights(second))
    assert same(weights(run(runner, "wanda:0.5", 0)), weights(first))
    assert len(stage_runs) == 2


def test_a_node_that_does_not_fit_is_run_again(make_runner, stage_runs, tmp_path):
    runner = make_runner()
    run(runner, "wanda:0.5 > gptq:4")
    files = tmp_path / "prefixes"
    size = max(file.stat().st_size for file in files.iterdir())
    runner.prefixes.limit = int(1.5 * size)  # room for one
    before = weights(run(runner, "wanda:0.5 > gptq:4"))
    run(runner, "rtn:4")
    assert sum(file.stat().st_size for file in files.iterdir()) <= runner.prefixes.limit
    stage_runs.clear()
    assert same(weights(run(runner, "wanda:0.5 > gptq:4")), before)
    assert stage_runs == ["wanda:0.5", "gptq:4"]


def test_the_least_recently_used_goes_first(tmp_path, make_runner):
    runner = make_runner(None)
    nodes = {text: run(runner, text) for text in ("rtn:2", "rtn:3", "rtn:4")}
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
    before = weights(run(runner, "wanda:0.5 > gptq:4"))
    stage_runs.clear()
    for file in (tmp_path / "prefixes").iterdir():
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: 5000 if damage == "cut" else 0])
    for _ in range(2):
        assert same(weights(run(runner, "wanda:0.5 > gptq:4")), before)
        assert len(stage_runs) == 2


def test_only_wanted_nodes_are_stored(make_runner, tmp_path):
    runner = make_runner()
    wanted = Order.parse("wanda:0.5")
    run(runner, "wanda:0.5 > gptq:4", keep=lambda prefix: prefix == wanted)
    assert len(list((tmp_path / "prefixes").iterdir())) == 1
    assert runner.prefixes.get(0, wanted) is not None
    runner.prefixes.drop(keep=[(0, wanted)])
    assert runner.prefixes.get(0, wanted) is not None
    runner.prefixes.drop(keep=[(0, Order.parse("rtn:4"))])
    assert list((tmp_path / "prefixes").iterdir()) == []


def test_a_file_that_a_killed_process_left_unfinished_is_removed(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / ".abc.safetensors.1.partial").write_bytes(b"half")
    Prefixes(tmp_path / "some", PLENTY)
    assert list((tmp_path / "some").iterdir()) == []


def test_a_full_disk_is_said(make_runner, monkeypatch):
    runner = make_runner()

    def full(value, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optimum_order.engine.snapshot.save", full)
    with pytest.raises(OutputError, match=r"No space left on device.*lower the limit"):
        runner.prefixes.put(0, Order.parse("rtn:4"), Node(runner.original))


def test_reset_gives_the_original_back(make_runner, compressor):
    runner = make_runner(None)
    run(runner, "rtn:2 > magnitude:0.9")
    runner.reset()
    before = compressor.source.load().state_dict()
    assert same(dict(runner.model.state_dict()), dict(before))


def test_the_inputs_of_the_last_draw_are_remembered(compressor):
    runner = compressor.runner(progress=False)
    first = runner.batches(1)
    assert runner.batches(1) is first
    rows = torch.cat([batch["input_ids"] for batch in first])
    few = torch.cat([batch["input_ids"] for batch in runner.batches(1, 2)])
    assert torch.equal(few, rows[:2])
    assert runner.batches(1) is first
    assert runner.batches(0) is not first


def test_without_calibration_only_methods_that_need_none_are_run(make_compressor):
    runner = make_compressor(calibration=None).runner(progress=False)
    assert runner.batches(0) == []
    assert runner.batches(0, 2) == []
    run(runner, "magnitude:0.5 > rtn:4")
    with pytest.raises(DataError, match="needs calibration data"):
        runner.check(Order.parse("wanda:0.5"))


@pytest.mark.parametrize("limit", [None, PLENTY])
@pytest.mark.parametrize("order", ["rtn:2 > eora:4", "equalize:2 > rtn:2 > eora:4"])
def test_adapters_come_out_as_if_the_order_were_run_alone(make_runner, compressor, limit, order):
    """What they are compared with is what the layers were before the first stage compressed them."""
    alone = compressor.compress(order, pause="block", progress=False)
    ids = torch.arange(2, 26).view(2, 12)
    runner = make_runner(limit)
    for text in (order, "rtn:3", order, order):
        node = run(runner, text)
        adapters = {name: state.adapter for name, state in node.result.states.items()}
        if text != order:
            assert not any(adapters.values())
            continue
        for name, adapter in adapters.items():
            assert torch.equal(adapter.a, alone.layers[name].adapter.a), name
            assert torch.equal(adapter.b, alone.layers[name].adapter.b), name
        with torch.no_grad():
            assert torch.equal(runner.model(ids).logits, alone.model(ids).logits)
    runner.reset()
    with torch.no_grad():
        assert torch.equal(runner.model(ids).logits, compressor.source.load()(ids).logits)
