import itertools

import pytest
import torch

from optimum_order.engine.recipe import method
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_is_the_textbooks(gaussian, bits):
    """scale = 2 max|w| / (2^b - 1), levels -2^(b-1) ... 2^(b-1) - 1."""
    weight = gaussian(8, 32)
    state = method(Stage("rtn", bits=bits, group_size=16, clip="none")).apply(LayerState(weight))
    groups = weight.view(8, 2, 16)
    scale = 2 * groups.abs().amax(-1, keepdim=True) / (2**bits - 1)
    expected = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    # The largest of each group lies half way between two levels, where float32 noise decides.
    half_way = ((groups / scale).frac().abs() - 0.5).abs() < 1e-4
    assert half_way.sum() >= 16
    assert torch.allclose(state.weight.view(8, 2, 16)[~half_way], expected[~half_way], rtol=1e-6)
    assert ((state.weight.view(8, 2, 16) - groups).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_is_the_textbooks(gaussian, bits):
    """scale = (max - min) / (2^b - 1) over a range that holds zero, levels 0 ... 2^b - 1 about an integer zero."""
    weight = gaussian(8, 32) + 0.7
    state = method(Stage("rtn", bits=bits, symmetric=False, clip="none")).apply(LayerState(weight))
    low = weight.amin(1, keepdim=True).clamp(max=0)
    scale = (weight.amax(1, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
    zero = (-low / scale).round()
    expected = ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    assert torch.allclose(state.weight, expected, rtol=1e-6, atol=1e-7)


def test_twice_is_once(gaussian):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        once = method(Stage("rtn", 4)).apply(LayerState(gaussian(dtype=dtype)))
        regridded = once.grid.nearest(once.weight)
        assert torch.equal(once.weight, regridded)


def test_the_searched_range_is_the_default_and_rounds_with_less_error(gaussian):
    default, whole = (
        method(Stage("rtn", bits=3, clip=clip)).apply(LayerState(gaussian()))
        for clip in ("mse", "none")
    )
    assert torch.equal(default.weight, method(Stage("rtn", 3)).apply(LayerState(gaussian())).weight)
    assert (default.weight - gaussian()).square().sum() < 0.9 * (
        whole.weight - gaussian()
    ).square().sum()


def test_more_bits_round_better_and_smaller_groups_too(gaussian):
    def error(**options):
        state = method(Stage("rtn", **options)).apply(LayerState(gaussian()))
        return (state.weight - gaussian()).square().mean().item()

    by_bits = [error(bits=bits) for bits in range(2, 9)]
    assert all(b < a / 2 for a, b in itertools.pairwise(by_bits))
    assert error(bits=4, group_size=8) < error(bits=4, group_size=-1)


def test_zeros_that_nobody_removed_are_no_mask(gaussian):
    state = method(Stage("rtn", 2)).apply(LayerState(gaussian()))
    assert (state.weight == 0).float().mean() > 0.3
    assert state.pruned is None
    assert state.sparsity == 0


def test_what_is_pruned_stays_so_and_its_scale_is_sound(gaussian):
    start = LayerState(gaussian().masked_fill(gaussian() < 0.5, 0.0), gaussian() < 0.5)
    state = method(Stage("rtn", bits=3, group_size=4)).apply(start)
    assert (start.pruned.view(16, -1, 4).all(-1)).any()  # some groups are wholly removed
    assert torch.isfinite(state.grid.scale).all()
    assert torch.equal(state.pruned, start.pruned)
    assert not state.weight[state.pruned].any()


def test_needs_no_data():
    assert not method(Stage("rtn", 4)).needs
