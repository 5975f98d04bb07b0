import pytest
import torch

from optimum_order.layers.grids.rounding import rounded


@pytest.mark.parametrize("zone", [0.5, 0.6, 0.8])
def test_rounding_has_a_dead_zone_and_is_odd(zone):
    x = torch.linspace(-6, 6, 10001)
    codes = rounded(x, zone)
    assert torch.equal(codes, codes.round())
    assert torch.equal(codes, -rounded(-x, zone))
    assert not codes[x.abs() < zone - 1e-3].any()
    assert codes[x.abs() > zone + 1e-3].all()
    assert (codes - x).abs().max() <= zone + 1e-5
    assert not torch.signbit(codes[codes == 0]).any()
    if zone == 0.5:
        assert (codes - x).abs().max() <= 0.5 + 1e-5
