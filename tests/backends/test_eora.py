"""EoRA: no adapter of its rank leaves less error of outputs, and it is measured as it is stored."""

import dataclasses

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.backends.eora import Eora
from optimum_order.engine.recipe import Recipe, method
from optimum_order.errors import InvariantError, ModelError, OrderError, OutputError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage
from optimum_order.testing import BackendContract, gaussian


class TestContract(BackendContract):
    backend = Eora
    stages = ("eora:8", "eora:1", "eora:32")


def compressed(rows, columns, seed=0, dtype=torch.float32):
    """A layer of 2 bits and a half pruned, with its original."""
    original = gaussian(rows, columns, seed).to(dtype)
    pruned = gaussian(rows, columns, seed + 1) < 0
    grid = UniformGrid.fit(original, bits=3, group_size=columns)
    weight = grid.nearest(original).masked_fill(pruned, 0.0)
    return LayerState(weight, pruned, grid, original=original)


def error(state, adapter, statistics):
    left = state.original.double() - state.weight.double() - adapter.double()
    return float(((left @ statistics[Gram].double()) * left).sum())


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 4, 15])
def test_no_svd_of_the_weights_leaves_less_error(shape, rank, inputs, input_kinds):
    for kind in input_kinds:
        statistics = inputs(kind, tokens=64, width=shape[1])
        state = compressed(*shape)
        after = method(Stage.parse(f"eora:{rank}")).apply(state, statistics)
        mine = error(state, after.adapter.product(), statistics)
        plain = error(state, truncated(state.original - state.weight, rank), statistics)
        size = error(
            dataclasses.replace(state, weight=torch.zeros_like(state.weight)),
            torch.zeros(shape),
            statistics,
        )
        assert mine <= plain + 1e-6 * size, kind
        if kind == "correlated":
            assert mine < 0.9 * plain, kind


def test_it_is_the_optimum(inputs):
    """The Eckart-Young bound on the outputs, and no step of a search goes below it."""
    statistics = inputs("correlated", tokens=64, width=12)
    state = compressed(8, 12)
    after = method(Stage.parse("eora:2")).apply(state, statistics)
    mine = error(state, after.adapter.product(), statistics)
    difference = state.original.double() - state.weight.double()
    values, vectors = torch.linalg.eigh(statistics[Gram].double())
    root = vectors * values.clamp(min=0).sqrt()
    bound = float(torch.linalg.svdvals(difference @ root)[2:].square().sum())
    assert bound <= mine * (1 + 1e-9) and mine <= bound * (1 + 1e-4)
    best = float("inf")
    gram = statistics[Gram].double()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        for _ in range(300):  # A and B in turn, each by least squares
            a = torch.linalg.lstsq(b, difference).solution
            half = a @ gram
            b = torch.linalg.solve(half @ a.T, half @ difference.T).T
        best = min(best, error(state, b @ a, statistics))
    assert best == pytest.approx(bound, rel=1e-6)
    assert mine <= best * (1 + 1e-4)


def test_the_notes_say_the_error_of_what_is_stored(inputs):
    statistics = inputs("correlated", tokens=64, width=32)
    state = compressed(16, 32, dtype=torch.bfloat16)
    after = method(Stage.parse("eora:3")).apply(state, statistics)
    size = error(
        dataclasses.replace(state, weight=torch.zeros_like(state.weight)),
        torch.zeros(16, 32),
        statistics,
    )
    figures = [
        error(state, part, statistics) / size
        for part in (torch.zeros(16, 32), after.adapter.product())
    ]
    assert after.notes == (f"eora:3: error of outputs {figures[0]:.3g} to {figures[1]:.3g}",)
    assert after.adapter.a.dtype == torch.bfloat16
    assert after.original is None, "no copy of the weights stays"


def test_a_layer_that_nothing_was_done_to_gets_no_adapter(inputs):
    weight = gaussian(16, 32)
    state = LayerState(weight, original=weight.clone())
    after = method(Stage.parse("eora:3")).apply(state, inputs("correlated", width=32))
    assert after.adapter is None and after.notes == ()


def test_it_needs_the_original(inputs):
    with pytest.raises(InvariantError, match="not given the original"):
        method(Stage.parse("eora:3")).apply(LayerState(gaussian(16, 32)), inputs(width=32))


def test_the_rank_is_less_than_both_sides(make_model):
    with pytest.raises(OrderError, match="a positive integer, got 0"):
        method(Stage.parse("eora:0"))
    units = find_units(make_model("llama"))
    with pytest.raises(OrderError, match="is not less than 32, the smaller side"):
        Recipe.of(Order.parse("rtn:4 > eora:32")).check(units, calibrated=True)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("eora:4", "none pruned or quantized any"),
        ("rotate > eora:4", "none pruned or quantized any"),
        ("rtn:4 > eora:4 > wanda:0.5", "'wanda:0.5' cannot follow 'eora:4'"),
        ("rtn:4 > eora:4 > distill:10", "'distill:10' cannot follow 'eora:4'"),
        ("rtn:4 > eora:4 > eora:2", "has an adapter already"),
        ("rtn:4 > lora:10 > eora:2", "has an adapter already"),
        ("rtn:4 > lora:10 > gptq:4", "'gptq:4' cannot follow 'lora:10'"),
        ("magnitude:0.5 > width:0.5 > eora:4", "Put 'width:0.5' first"),
        ("rtn:8 > activations:8 > eora:4", "cannot follow 'activations:8'"),
        ("rtn:8 > eora:4 > activations:8", "cannot follow 'eora:4'"),
    ],
)
def test_what_an_adapter_would_not_fit_is_refused(order, words, make_model):
    with pytest.raises(OrderError, match=words):
        Recipe.of(Order.parse(order)).check(find_units(make_model("llama")), calibrated=True)


@pytest.mark.parametrize(
    "order",
    [
        "rtn:4 > eora:4 > lora:10",
        "rotate > rtn:4 > eora:4",
        "rtn:4 > distill:10 > eora:4",
        "wanda:0.5 > rtn:4 > eora(rank=4, targets=*.mlp.*) > eora(rank=2, targets=*.self_attn.*)",
    ],
)
def test_what_fits_is_not_refused(order, make_model):
    Recipe.of(Order.parse(order)).check(find_units(make_model("llama")), calibrated=True)


IDS = torch.arange(2, 26).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_hand(compressed, model):
    """The logits of a model whose layers add the adapters of a compressed one."""
    for unit in find_units(model):
        for target in unit.targets:
            target.put(compressed.layers[target.name])
    return logits(model)


ORDER = "rtn(bits=2, group_size=16) > eora:8"


def test_the_model_computes_with_the_adapter_and_its_weights_stay(make_compressor, make_model):
    compressor = make_compressor()
    before = compressor.compress("rtn(bits=2, group_size=16)", progress=False)
    after = compressor.compress(ORDER, progress=False)
    original = logits(compressor.source.load())
    assert (logits(after.model) - original).norm() < 0.8 * (logits(before.model) - original).norm()
    for name, state in after.layers.items():
        assert torch.equal(state.weight, before.layers[name].weight), name
        assert state.adapter.rank == 8 and state.original is None
    assert torch.equal(by_hand(after, before.model), logits(after.model))


def test_later_blocks_read_what_earlier_ones_compute_with_their_adapters(make_compressor):
    """Wherever a run pauses: a layer that is called already would not see its own adapter."""
    compressor = make_compressor()
    by_block, by_group = (
        compressor.compress(ORDER, pause=pause, progress=False) for pause in ("block", "group")
    )
    for name, state in by_block.layers.items():
        assert torch.equal(state.adapter.a, by_group.layers[name].adapter.a), name
        assert torch.equal(state.adapter.b, by_group.layers[name].adapter.b), name


def test_it_is_compared_with_the_weights_after_a_rotation(make_compressor):
    """The weights of the checkpoint would be those of another basis."""
    compressor = make_compressor()
    plain = compressor.compress("rotate > rtn(bits=3, group_size=16)", progress=False)
    after = compressor.compress("rotate > rtn(bits=3, group_size=16) > eora:8", progress=False)
    original = logits(compressor.source.load())
    assert (logits(after.model) - original).norm() < (logits(plain.model) - original).norm()


@pytest.mark.parametrize("schedule", ["stage", "block"])
def test_a_resumed_run_ends_at_the_same_bits(make_compressor, tmp_path, schedule, monkeypatch):
    from optimum_order.engine import workdir

    compressor = make_compressor()
    whole = compressor.compress(ORDER, schedule, pause="block", progress=False)
    saved = workdir.Passage.save
    count = 0

    def cut_off(self, *arguments, **options):
        nonlocal count
        saved(self, *arguments, **options)
        self.work.wait()
        count += 1
        if count == stop:
            raise KeyboardInterrupt

    passes = 1 if schedule == "block" else 2
    for stop in range(1, 2 * passes):
        count = 0
        work = tmp_path / str(stop)
        monkeypatch.setattr(workdir.Passage, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(ORDER, schedule, pause="block", work_dir=work, progress=False)
        monkeypatch.setattr(workdir.Passage, "save", saved)
        resumed = compressor.compress(
            ORDER, schedule, pause="block", work_dir=work, resume=True, progress=False
        )
        for name, state in whole.layers.items():
            again = resumed.layers[name]
            assert torch.equal(again.weight, state.weight), name
            assert torch.equal(again.adapter.a, state.adapter.a), name
            assert torch.equal(again.adapter.b, state.adapter.b), name
        assert torch.equal(logits(resumed.model), logits(whole.model))


def test_what_cannot_be_is_refused_before_the_work(make_compressor, tmp_path):
    compressor = make_compressor()
    with pytest.raises(ModelError, match="masks and grids are lost in memory"):
        JointCompressor(compressor.compress(ORDER, progress=False).model)
    with pytest.raises((OutputError, ModelError), match="low_memory"):
        compressor.compress(ORDER, work_dir=tmp_path / "work", low_memory=True, progress=False)


def test_statistics_of_no_tokens_give_the_svd_of_the_weights():
    state = compressed(16, 32)
    idle = Statistics.of(torch.zeros(0, 32), {Gram})
    after = method(Stage.parse("eora:4")).apply(state, idle)
    expected = truncated(state.original - state.weight, 4).float()
    assert torch.allclose(after.adapter.product(), expected, atol=1e-2)


def test_an_adapter_is_no_part_of_another(make_compressor):
    """Orders that follow each other on one model begin without the adapter of the last."""
    compressor = make_compressor()
    first = compressor.compress("rtn(bits=2, group_size=16)", progress=False)
    compressor.compress(ORDER, progress=False)
    again = compressor.compress("rtn(bits=2, group_size=16)", progress=False)
    assert torch.equal(logits(first.model), logits(again.model))
    assert all(state.adapter is None for state in again.layers.values())
