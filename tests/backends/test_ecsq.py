import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.backends.ecsq import ECSQ, Fit, Share, _Budget, shrunk
from optimum_order.backends.rate import entropy
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.error import squared_error
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Stage
from optimum_order.testing import BackendContract


class TestContract(BackendContract):
    backend = ECSQ
    stages = (
        "ecsq:3",
        "ecsq(rate=2.2, dead_zone=0.5, damping=0.1)",
        "ecsq(rate=4, columns=false, max_code=7, sensitivity=none)",
    )


@pytest.fixture(scope="module")
def layer():
    """A layer and inputs, some of which are large and correlated: (128, 96)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    X = torch.randn(2000, 96, generator=generator) @ mixing
    weight = torch.randn(128, 96, generator=generator) * 0.02
    return LayerState(weight), Statistics.of(X, {Gram})


def compressed(text, layer):
    state, statistics = layer
    return method(Stage.parse(text)).apply(state, statistics)


def pooled(state):
    """Return the entropy of the codes of a layer with one table for all."""
    codes = state.grid.quantize(state.weight).flatten().long()
    return entropy(torch.bincount(codes - codes.min())[None]) / len(codes)


def error(state, layer):
    before, statistics = layer
    return squared_error(state.weight - before.weight, statistics)


@pytest.mark.parametrize("rate", [2.0, 3.0, 4.5])
def test_codes_of_one_size_have_the_rate(rate):
    """Rows and columns of one size gain nothing from tables of their own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator)
    white = Statistics(1, {Gram: torch.eye(512)})
    state = method(Stage("ecsq", rate=rate, dead_zone=0.5)).apply(LayerState(weight), white)
    side = 20 * (256 + 512) / weight.numel()
    assert pooled(state) + side == pytest.approx(rate, abs=0.03)


def test_fewer_bits_than_gptq_at_the_same_error(layer):
    """GPTQ's three bits are three bits and a scale for each group; these are fewer."""
    theirs = compressed("gptq(bits=3, group_size=32)", layer)
    mine = compressed("ecsq:2.6", layer)
    assert pooled(mine) < 3
    assert error(mine, layer) < error(theirs, layer)


def test_steps_of_columns_pay(layer):
    plain = compressed("ecsq(rate=3, columns=false)", layer)
    steps = compressed("ecsq:3", layer)
    assert not plain.grid.exponent.any()
    assert len(steps.grid.exponent.unique()) > 3
    bits = 0.5 * math.log2(error(plain, layer) / error(steps, layer))
    assert bits > 0.3


def test_a_dead_zone_makes_zeros_that_cost_little(layer):
    without = compressed("ecsq(rate=2, dead_zone=0.5)", layer)
    with_zone = compressed("ecsq(rate=2, dead_zone=0.6)", layer)
    zeros = [(state.weight == 0).float().mean() for state in (without, with_zone)]
    assert zeros[1] > zeros[0] + 0.02
    assert error(with_zone, layer) < error(without, layer) * 1.05


def test_rows_of_shorter_steps_have_smaller_errors(layer):
    before, statistics = layer
    backend = ECSQ(Stage("ecsq", 3))
    rows = torch.zeros(128)
    rows[:64] = -1.0
    backend.share = Share(-6.0, rows, torch.full((96,), -128, dtype=torch.int8))
    after = backend.apply(before, statistics)
    delta = after.weight - before.weight
    errors = torch.linalg.vecdot(delta @ statistics[Gram], delta)
    ratio = errors[64:].sum() / errors[:64].sum()
    assert 2.5 < ratio < 6  # half the step is a quarter of the error


def test_pruned_weights_stay_pruned_and_no_others_are_claimed(layer):
    before = method(Stage("wanda", 0.5)).apply(*layer)
    after = method(Stage("ecsq", 2)).apply(before, layer[1])
    assert torch.equal(after.pruned, before.pruned)
    assert (after.weight == 0).sum() > after.pruned.sum()


@pytest.mark.parametrize("largest", [1, 7, 31])
def test_codes_end_at_the_largest(layer, largest):
    after = compressed(f"ecsq(rate=3, max_code={largest})", layer)
    codes = after.grid.quantize(after.weight)
    assert int(codes.max()) <= largest and int(codes.min()) >= -largest - 1
    assert after.grid.bits <= largest.bit_length() + 1


def test_a_column_with_huge_inputs_is_not_cut_off(layer):
    """Its step would have codes in the thousands; a longer step serves it better than clipping."""
    state, statistics = layer
    gram = statistics[Gram].clone()
    gram[5, 5] += gram.diagonal().mean() * 1e8
    loud = Statistics(statistics.tokens, {Gram: gram})
    after = method(Stage("ecsq", 3)).apply(state, loud)
    column = (after.weight - state.weight)[:, 5].norm() / state.weight[:, 5].norm()
    assert column < 0.01
    assert after.grid.bits >= 7


class TestFit:
    """Steps are as long as the largest code asks, and no longer."""

    def test_a_weight_far_beyond_all_others_is_fitted_by_its_row_and_its_column(self):
        excess = torch.tensor([10.0, 2.5, -1.0])
        row = torch.tensor([3, 5, 7])
        column = torch.tensor([4, 4, 6])
        fit = Fit.around(excess, row, column, (100, 200))
        assert fit.rows[3] + fit.columns[4] >= 10
        assert fit.rows[3] + fit.columns[4] < 11
        assert fit.columns[4] >= 3  # so that the second fits as well
        assert abs(float(fit.rows[3] - fit.columns[4])) <= 1
        assert fit.rows.count_nonzero() == fit.columns.count_nonzero() == 1

    def test_rows_do_alone_where_columns_have_no_steps(self):
        excess = torch.tensor([4.5])
        fit = Fit.around(excess, torch.tensor([3]), torch.tensor([4]), (9, 9), columns=False)
        assert fit.rows[3] == 5 and not fit.columns.any()

    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_nothing_exceeds_what_codes_hold(self, data):
        count = data.draw(st.integers(0, 40))
        size = st.floats(-20, 12, width=32)
        excess = torch.tensor(data.draw(st.lists(size, min_size=count, max_size=count)))
        place = st.lists(st.integers(0, 7), min_size=count, max_size=count)
        row = torch.tensor(data.draw(place), dtype=torch.int64)
        column = torch.tensor(data.draw(place), dtype=torch.int64)
        fit = Fit.around(excess, row, column, (8, 8))
        assert (excess - fit.rows[row] - fit.columns[column] <= 0).all()
        assert (fit.rows >= 0).all() and (fit.columns >= 0).all()

    def test_no_weight_is_cut_off_at_a_high_rate(self, caplog):
        """Codes up to 127 do not have 8 bits of entropy; all steps are longer then."""
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        white = Statistics(1, {Gram: torch.eye(256)})
        for columns in (True, False):
            backend = method(Stage("ecsq", rate=8, sensitivity="none", columns=columns))
            after = backend.apply(LayerState(weight), white)
            steps = after.grid.scale * torch.exp2(after.grid.exponent.float())
            assert ((after.weight - weight).abs() <= steps).all()
            line = r"codes of at most 127 do not hold 8 bits .*; they hold 6\.\d+\."
            assert re.search(line, caplog.text)
            caplog.clear()

    def test_a_loud_column_with_one_huge_weight_costs_the_layer_little(self, layer):
        """The column alone would have a step of 2^7 times its own, and 170 times the error."""
        before, statistics = layer
        gram = statistics[Gram].clone()
        gram[5, 5] += gram.diagonal().mean() * 1e3
        loud = Statistics(statistics.tokens, {Gram: gram})
        weight = before.weight.clone()
        ordinary = method(Stage("ecsq", 3)).apply(LayerState(weight), loud)
        weight[7, 5] = 40 * before.weight.abs().max()
        huge = method(Stage("ecsq", 3)).apply(LayerState(weight), loud)
        errors = [
            squared_error(huge.weight - weight, loud),
            squared_error(ordinary.weight - before.weight, loud),
        ]
        assert errors[0] < 5 * errors[1]


def test_rows_of_short_steps_are_not_cut_off_in_a_column_with_huge_inputs(layer):
    """The column's step has room for the row in which its codes are largest."""
    before, statistics = layer
    weight = before.weight.clone()
    weight[7, 5] = weight[:, 5].abs().max()
    state = LayerState(weight)
    gram = statistics[Gram].clone()
    gram[5, 5] += gram.diagonal().mean() * 1e8
    loud = Statistics(statistics.tokens, {Gram: gram})
    backend = ECSQ(Stage("ecsq", rate=3, sensitivity="within"))
    sensitivity = torch.ones(4, 128)
    sensitivity[:, 7] = 64.0  # a step of an eighth, but for the limit
    profile = backend.profile(state, loud, sensitivity=sensitivity)
    backend.share = _Budget({"": profile}, backend.options).shares("within")[""]
    after = backend.apply(state, loud)
    assert (after.weight - state.weight)[7, 5].abs() < 0.02 * state.weight[7, 5].abs()


def test_a_grid_is_one_of_powers_of_two(layer):
    after = compressed("ecsq:3", layer)
    assert isinstance(after.grid, DualScaleGrid)
    after.grid.check()
    folded = after.grid.folded()
    assert folded.holds(torch.ldexp(after.weight, -after.grid.exponent.int()))


@pytest.mark.parametrize("rate", [0, -1, 8.5])
def test_rates_that_no_code_has_are_refused(rate):
    with pytest.raises(OrderError, match="above 0 and at most 8"):
        method(Stage("ecsq", rate))


def test_noisy_sensitivities_are_moved_to_their_mean():
    """What one sample says of a row is believed as far as other samples agree."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200, generator=generator)
    quiet, loud = (
        torch.exp2(truth + noise * torch.randn(8, 200, generator=generator)) for noise in (0.1, 3.0)
    )
    for samples in (quiet, loud):
        raw = samples.mean(0).log2()
        assert (shrunk(samples) - truth).var() <= (raw - truth).var() * 1.01
    assert shrunk(quiet).std() > 0.9 * truth.std()
    assert shrunk(loud).std() < loud.mean(0).log2().std()
    assert torch.isfinite(shrunk(torch.zeros(4, 10))).all()
