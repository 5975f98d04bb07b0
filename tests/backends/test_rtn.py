import itertools

import pytest
import torch

from optimum_order.backends.rtn import RTN
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage
from optimum_order.testing import DTYPES, BackendContract


class TestContract(BackendContract):
    backend = RTN
    stages = ("rtn:4", "rtn(bits=8, group_size=16, symmetric=false)", "rtn(bits=2, clip=none)")


def apply(weight, bits, pruned=None, **options):
    return RTN(Stage("rtn", bits=bits, **options)).apply(LayerState(weight, pruned))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_is_the_textbooks(gaussian, bits):
    """scale = 2 max|w| / (2^b - 1), levels -2^(b-1) ... 2^(b-1) - 1."""
    weight = gaussian(8, 32)
    state = apply(weight, bits, group_size=16, clip="none")
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
    """scale = (max - min) / (2^b - 1) over a range that holds zero, levels 0 ... 2^b - 1 around an
    integer zero."""
    weight = gaussian(8, 32) + 0.7
    state = apply(weight, bits, symmetric=False, clip="none")
    low = weight.amin(1, keepdim=True).clamp(max=0)
    scale = (weight.amax(1, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
    zero = (-low / scale).round()
    expected = ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    assert torch.allclose(state.weight, expected, rtol=1e-6, atol=1e-7)


def test_twice_is_once(gaussian):
    for dtype in DTYPES:
        once = apply(gaussian(dtype=dtype), 4)
        assert torch.equal(once.weight, once.grid.nearest(once.weight))


def test_the_searched_range_is_the_default_and_rounds_with_less_error(gaussian):
    default = apply(gaussian(), 3)
    assert torch.equal(default.weight, apply(gaussian(), 3, clip="mse").weight)
    whole = apply(gaussian(), 3, clip="none")
    error, plain = ((s.weight - gaussian()).square().sum() for s in (default, whole))
    assert error < 0.9 * plain


def test_more_bits_round_better_and_smaller_groups_too(gaussian):
    def error(bits, **options):
        state = apply(gaussian(), bits, **options)
        return (state.weight - gaussian()).square().mean().item()

    by_bits = [error(bits) for bits in range(2, 9)]
    assert all(after < before / 2 for before, after in itertools.pairwise(by_bits))
    assert error(4, group_size=8) < error(4, group_size=-1)


def test_zeros_that_nobody_removed_are_no_mask(gaussian):
    state = apply(gaussian(), 2)
    assert (state.weight == 0).float().mean() > 0.3
    assert state.pruned is None
    assert state.sparsity == 0


def test_wholly_removed_groups_have_a_sound_scale(gaussian):
    pruned = gaussian() < 0.5
    assert pruned.view(16, -1, 4).all(-1).any(), "or the test says nothing"
    state = apply(gaussian().masked_fill(pruned, 0.0), 3, pruned, group_size=4)
    assert torch.isfinite(state.grid.scale).all()
    assert torch.equal(state.pruned, pruned)
    assert not state.weight[pruned].any()


def test_needs_no_data():
    assert not RTN.needs
