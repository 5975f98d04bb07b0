import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.backends.obs import BLOCK, inverse_factor, keep_better_rows, sweep
from optimum_order.engine.recipe import method
from optimum_order.errors import InvariantError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Stage


def damped(gram, damping):
    """H + damping * mean(diag H) * I, in float64."""
    gram = gram.double()
    return gram + damping * (gram.diagonal().mean().item() or 1.0) * torch.eye(
        len(gram), dtype=torch.float64
    )


def textbook(weight, H, order, fix):
    """Optimal brain surgery as the papers derive it, with the inverse of what is left taken anew at every step.

    Args:
        weight: (out, in) float64.
        H: (in, in) float64, damped.
        order: The columns in the order in which they are fixed.
        fix: Given the current weight (out, in), the columns not yet fixed and their inverse Hessian, the values
            (out,) to which the first of them is fixed.
    """
    weight, free = weight.clone(), list(order)
    while free:
        inverse = torch.linalg.inv(H[free][:, free])
        j = free[0]
        q = fix(weight, free, inverse)
        error = (weight[:, j] - q) / inverse[0, 0]
        weight[:, free] -= torch.outer(error, inverse[0])
        weight[:, j] = q
        free = free[1:]
    return weight


class TestInverseFactor:
    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    @pytest.mark.parametrize("damping", [0.01, 1.0])
    def test_is_the_upper_factor_of_the_damped_inverse(self, inputs, kind, scale, damping):
        gram = inputs(kind).gram * scale
        U, used = inverse_factor(gram, damping)
        assert used == damping
        assert torch.equal(U, U.triu())
        assert (U.diagonal() > 0).all()
        inverse = torch.linalg.inv(damped(gram, damping))
        assert torch.allclose(
            U.double().T @ U.double(), inverse, rtol=1e-3, atol=1e-4 * inverse.abs().max().item()
        )

    def test_leaves_the_gram_matrix_as_it_was(self, inputs):
        gram = inputs().gram
        before = gram.clone()
        inverse_factor(gram, 0.01)
        assert torch.equal(gram, before)

    def test_raises_the_damping_step_by_step_until_it_is_enough(self):
        gram = torch.diag(
            torch.tensor([1.0, 1.0, 1.0, -0.05])
        )  # positive definite once 0.07 of the mean is added
        U, used = inverse_factor(gram, 1e-4)
        assert used == pytest.approx(0.1)
        assert torch.isfinite(U).all()
        assert torch.allclose(
            U.double().T @ U.double(), torch.linalg.inv(damped(gram, used)), rtol=1e-4
        )

    def test_gives_up_on_what_is_no_gram_matrix(self):
        with pytest.raises(InvariantError, match="size 3 has no Cholesky factor"):
            inverse_factor(torch.full((3, 3), torch.nan), 0.01)


class TestSweep:
    @pytest.mark.parametrize("width", [24, BLOCK + 12])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_rounding_is_the_textbooks(self, inputs, gaussian, width, backwards):
        weight, gram = gaussian(8, width), inputs("correlated", 3 * width, width).gram
        order = (
            torch.randperm(width, generator=torch.Generator().manual_seed(3))
            if backwards
            else torch.arange(width)
        )
        grid = UniformGrid.fit(weight, bits=3, group_size=4)
        U, _ = inverse_factor(gram[order][:, order], 0.01)
        keep = lambda w, d, start: torch.zeros_like(w, dtype=torch.bool)  # noqa: E731
        swept, removed = sweep(weight, U, grid=grid, choose=keep, order=order)

        def nearest(w, free, inverse):
            return grid.nearest(w[:, free[:1]].float(), torch.tensor(free[:1]))[:, 0].double()

        expected = textbook(weight.double(), damped(gram, 0.01), order.tolist(), nearest)
        assert not removed.any()
        assert torch.allclose(swept.double(), expected, atol=1e-5)
        assert not torch.allclose(swept, grid.nearest(weight), atol=1e-2)

    @pytest.mark.parametrize("width", [24, BLOCK + 12])
    def test_pruning_by_a_given_mask_is_the_textbooks(self, inputs, gaussian, width):
        weight, gram = gaussian(8, width), inputs("correlated", 3 * width, width).gram
        mask = torch.rand(8, width, generator=torch.Generator().manual_seed(4)) < 0.5
        U, _ = inverse_factor(gram, 0.01)
        swept, removed = sweep(
            weight,
            U,
            grid=None,
            choose=lambda w, d, i: mask[:, i : i + w.shape[1]],
            order=torch.arange(width),
        )

        def prune(w, free, inverse):
            return w[:, free[0]].masked_fill(mask[:, free[0]], 0.0)

        expected = textbook(weight.double(), damped(gram, 0.01), range(width), prune)
        assert torch.equal(removed, mask)
        assert torch.allclose(swept.double(), expected, rtol=1e-3, atol=1e-4)
        assert not swept[mask].any()
        assert not torch.signbit(swept[mask]).any()

    @pytest.mark.parametrize("span", [1, 3, 4, 99, BLOCK])
    def test_asks_about_every_column_once_with_its_place_and_its_factor(
        self, inputs, gaussian, span
    ):
        width = 198  # a multiple of 3 and of 99
        order = torch.arange(width).flip(0)
        U, _ = inverse_factor(inputs("independent", 400, width).gram, 0.01)
        asked = []

        def choose(w, d, start):
            assert w.shape == (2, len(d))
            assert torch.equal(d, U.diagonal()[start : start + len(d)])
            asked.extend(range(start, start + len(d)))
            return torch.zeros_like(w, dtype=torch.bool)

        weight = gaussian(2, width)
        swept, _ = sweep(weight, U, grid=None, choose=choose, order=order, span=span)
        assert asked == list(range(width))
        assert torch.equal(
            swept, weight
        )  # nothing was fixed to another value, so nothing is corrected


class TestKeepBetterRows:
    def test_chooses_row_by_row(self):
        original = torch.zeros(3, 2)
        swept = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0]])
        plain = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
        kept, lost = keep_better_rows(swept, plain, original, torch.eye(2))
        assert torch.equal(kept, torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
        assert lost == 1

    @pytest.mark.parametrize("bad", [torch.inf, torch.nan])
    def test_a_correction_that_overflowed_is_not_kept(self, bad):
        original, plain = torch.ones(2, 2), torch.zeros(2, 2)
        swept = torch.tensor([[bad, 1.0], [1.0, 1.0]])
        kept, lost = keep_better_rows(swept, plain, original, torch.eye(2))
        assert torch.equal(kept, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        assert lost == 1


@given(
    kind=st.sampled_from(
        ["independent", "correlated", "low rank", "dead columns", "outliers", "one token", "silent"]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=st.integers(2, 8),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    damping=st.sampled_from([1e-4, 0.01, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_no_row_is_ever_worse_than_without_correction(
    inputs,
    gaussian,
    row_errors,
    not_worse,
    kind,
    dtype,
    bits,
    sparsity,
    symmetric,
    act_order,
    damping,
    seed,
):
    weight, statistics = gaussian(12, 32, seed, dtype), inputs(kind, 48, 32, seed)
    start = method(Stage("magnitude", sparsity)).apply(LayerState(weight))
    grid_options = {"bits": bits, "symmetric": symmetric}
    rtn = method(Stage("rtn", **grid_options)).apply(start)
    gptq = method(Stage("gptq", **grid_options, act_order=act_order, damping=damping)).apply(
        start, statistics
    )
    for before, plain, swept in [
        (start, rtn, gptq),
        (
            rtn,
            None,
            method(Stage("sparsegpt", sparsity=0.6, damping=damping)).apply(rtn, statistics),
        ),
        (
            start,
            None,
            method(Stage("sparsegpt", pattern="1:4", damping=damping)).apply(start, statistics),
        ),
    ]:
        uncorrected = (
            before.weight.masked_fill(swept.pruned, 0.0) if plain is None else plain.weight
        )
        deltas = [swept.weight - before.weight, uncorrected - before.weight]
        mine = row_errors(swept.weight, before.weight, statistics)
        assert not_worse(
            mine, row_errors(uncorrected, before.weight, statistics), deltas, statistics
        )


@pytest.mark.parametrize(
    "stage", [Stage("gptq", bits=4, damping=1e-12), Stage("sparsegpt", sparsity=0.5, damping=1e-12)]
)
def test_a_raised_damping_is_noted(gaussian, stage):
    X = torch.ones(1, 64)
    state = method(stage).apply(LayerState(gaussian(4, 64)), Statistics(1, {Gram: X.T @ X}))
    assert torch.isfinite(state.weight).all()
    assert any(f"{stage}: damping raised from 1e-12 to " in note for note in state.notes)


@pytest.mark.parametrize("stage", [Stage("gptq", 4), Stage("sparsegpt", 0.5)])
def test_the_damping_that_was_asked_for_needs_no_note(inputs, gaussian, kind, stage):
    state = method(stage).apply(LayerState(gaussian()), inputs(kind))
    assert not any("damping" in note for note in state.notes)


def test_rows_left_uncorrected_are_counted(inputs, gaussian):
    statistics, weight = inputs("independent"), gaussian(256)
    state = method(Stage("gptq", 2)).apply(LayerState(weight), statistics)
    rtn = method(Stage("rtn", 2)).apply(LayerState(weight))
    same = (state.weight == rtn.weight).all(1).sum().item()  # a few come out the same by themselves
    (note,) = state.notes
    lost = int(
        re.fullmatch(r"gptq:2: (\d+) of 256 rows left uncorrected, which was better", note)[1]
    )
    assert same / 2 < lost <= same < 64
