import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.backends.selection import PruningOptions, lowest, remove, smallest
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.order import Order, Stage

PRUNERS = ("magnitude", "wanda", "sparsegpt")

scores = (
    st.integers(0, 3)
    .flatmap(
        lambda digits: st.lists(
            st.lists(st.integers(0, 10**digits), min_size=12, max_size=12), min_size=1, max_size=5
        )
    )
    .map(lambda rows: torch.tensor(rows, dtype=torch.float32))
)


@given(scores, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_smallest_takes_exactly_as_many_as_asked_and_ties_fall_to_the_earlier(score, count):
    mask = smallest(score, count)
    for row, taken in zip(score.tolist(), mask.tolist(), strict=True):
        first = sorted(range(12), key=lambda i: (row[i], i))[:count]
        assert [i for i in range(12) if taken[i]] == sorted(first)


@given(scores, st.floats(0, 0.999), st.sampled_from(["layer", "row"]))
@settings(max_examples=100, deadline=None)
def test_lowest_removes_the_floor_of_the_fraction(score, sparsity, per):
    mask = lowest(score, PruningOptions(sparsity=sparsity), None, per=per)
    shape = (1, -1) if per == "layer" else score.shape
    for among, removed in zip(score.view(shape), mask.view(shape), strict=True):
        assert removed.sum() == math.floor(sparsity * len(among) + 1e-9)
        assert not removed.any() or among[removed].max() <= among[~removed].min()


def test_a_decimal_fraction_means_what_it_says():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    for sparsity, count in [(0.29, 29), (0.57, 57), (0.58, 58), (0.3, 30), (0.0, 0), (0.999, 99)]:
        mask = lowest(torch.rand(1, 100), PruningOptions(sparsity=sparsity), None, per="row")
        assert mask.sum() == count


@given(scores, st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:6", "5:12"]))
@settings(max_examples=100, deadline=None)
def test_a_pattern_keeps_n_of_every_m_consecutive_inputs(score, pattern):
    n, m = map(int, pattern.split(":"))
    mask = lowest(score, PruningOptions(pattern=pattern), None, per="layer")
    for group, removed in zip(score.view(-1, m), mask.view(-1, m), strict=True):
        assert removed.sum() == m - n
        assert group[removed].max() <= group[~removed].min()


@given(scores, st.data(), st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_what_was_removed_stays_removed_and_counts(score, data, sparsity):
    seed = data.draw(st.integers(0, 1000))
    before = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask = lowest(score, PruningOptions(sparsity=sparsity), before, per="row")
    assert not (before & ~mask).any()
    wanted = math.floor(sparsity * 12 + 1e-9)
    assert mask.sum(1).tolist() == [max(wanted, n) for n in before.sum(1).tolist()]
    pattern = lowest(score, PruningOptions(pattern="2:4"), before, per="row")
    assert not (before & ~pattern).any()
    counts = before.view(-1, 4).sum(1).tolist()
    assert pattern.view(-1, 4).sum(1).tolist() == [max(2, count) for count in counts]


def test_remove_leaves_positive_zeros_and_all_others_as_they_were(gaussian):
    weight = gaussian(dtype=torch.bfloat16)
    pruned = weight < 0
    state = remove(LayerState(weight), pruned, off_grid=False)
    assert not torch.signbit(state.weight).any()
    assert torch.equal(state.weight[~pruned], weight[~pruned])
    assert torch.equal(state.pruned, pruned)
    assert (weight < 0).any(), "changed in place"


def test_remove_keeps_the_grid_unless_told_to_leave_it(gaussian):
    grid = UniformGrid.fit(gaussian(), bits=4)
    state = LayerState(grid.nearest(gaussian()), grid=grid)
    pruned = torch.zeros_like(state.weight, dtype=torch.bool)
    assert remove(state, pruned, off_grid=False).grid is grid
    assert remove(state, pruned, off_grid=True).grid is None


@pytest.mark.parametrize("pruner", PRUNERS)
class TestEveryPruner:
    def test_removes_the_fraction_that_was_asked_for(self, pruner, inputs, gaussian):
        for sparsity in (0.0, 0.25, 0.5, 0.9):
            backend = method(Stage(pruner, sparsity))
            state = backend.apply(LayerState(gaussian(16, 40)), inputs(width=40))
            assert state.pruned.sum() == math.floor(sparsity * 640)
            assert state.sparsity == pytest.approx(sparsity)

    def test_holds_n_of_m(self, pruner, inputs, gaussian):
        for n, m in [(2, 4), (1, 4), (4, 8), (1, 2)]:
            backend = method(Stage(pruner, pattern=f"{n}:{m}"))
            state = backend.apply(LayerState(gaussian(6, 32)), inputs())
            assert (state.pruned.view(-1, m).sum(1) == m - n).all()

    def test_twice_is_the_larger_of_the_two(self, pruner, inputs, gaussian):
        once = method(Stage(pruner, 0.3)).apply(LayerState(gaussian()), inputs())
        more = method(Stage(pruner, 0.6)).apply(once, inputs())
        less = method(Stage(pruner, 0.2)).apply(once, inputs())
        assert not (once.pruned & ~more.pruned).any()
        assert more.sparsity == pytest.approx(0.6, abs=0.03)
        assert torch.equal(less.pruned, once.pruned)
        assert torch.equal(less.weight, once.weight)

    def test_refuses_a_value_that_is_no_fraction(self, pruner):
        for value in (1, 1.0, 1.5, -0.1, "'half'", True):
            message = rf"'sparsity' .* must be a number in \[0, 1\), got {value}"
            with pytest.raises(OrderError, match=message):
                method(Stage(pruner, value.strip("'") if isinstance(value, str) else value))

    def test_needs_a_sparsity_or_a_pattern(self, pruner):
        message = rf"must give 'sparsity' in \[0, 1\), such as '{pruner}:0.5', or 'pattern'"
        with pytest.raises(OrderError, match=message):
            method(Stage(pruner))

    def test_refuses_text_that_is_no_pattern(self, pruner):
        message = r"'pattern' .* must be 'none' or N:M with N < M < 100, such as 2:4"
        for pattern in ("4:4", "4:2", "0:4", "2:100", "2-4", 24, "n:m"):
            with pytest.raises(OrderError, match=message):
                method(Stage(pruner, pattern=pattern))

    def test_sparsity_and_pattern_must_agree(self, pruner):
        agreed = method(Stage(pruner, sparsity=0.5, pattern="2:4"))
        assert str(agreed.stage) == f"{pruner}(pattern=2:4)"
        assert agreed.resolved["sparsity"] == 0.5
        message = "'sparsity' must be 0.75 or left out, since pattern 1:4 keeps 1 of 4; got 0.5"
        with pytest.raises(OrderError, match=message):
            method(Stage(pruner, sparsity=0.5, pattern="1:4"))

    def test_a_pattern_must_divide_the_inputs(self, pruner):
        backend = method(Stage(pruner, pattern="2:4"))
        assert backend.check_shape((8, 32)) is None
        assert backend.check_shape((8, 30)) == "pattern 2:4 needs a multiple of 4 inputs, it has 30"
        assert method(Stage(pruner, 0.5)).check_shape((8, 30)) is None

    def test_after_a_quantizer_the_grid_stays_unless_it_is_left(self, pruner, inputs, gaussian):
        for text in ("rtn:4 > {}:0.5", "gptq(bits=3, group_size=8) > {}(pattern=2:4)"):
            first, second = Order.parse(text.format(pruner))
            start = LayerState(gaussian(dtype=torch.bfloat16))
            quantized = method(first).apply(start, inputs())
            pruned = method(second).apply(quantized, inputs())
            assert pruned.grid is quantized.grid
            assert pruned.bits == quantized.bits
            options = dataclasses.asdict(method(second).options) | {"off_grid": True}
            written = {name: value for name, value in options.items() if value is not None}
            off = method(Stage(pruner, **written)).apply(quantized, inputs())
            assert off.grid is None
            assert off.bits == 16
            (note,) = [note for note in off.notes if "off_grid" in note]
            assert note.startswith(f"left its {quantized.bits}-bit grid (off_grid)")
            off.check("off grid")
