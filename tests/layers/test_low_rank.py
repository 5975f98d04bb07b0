"""Adapters of layers: what is stored, and what a layer computes with it."""

import pytest
import torch

from optimum_order.errors import InvariantError
from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState
from optimum_order.testing import gaussian


def test_two_bytes_stay_and_all_else_becomes_float16():
    a, b = gaussian(4, 32), gaussian(16, 4)
    for dtype, stored in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
    ):
        adapter = LowRank.rounded(a, b, dtype)
        assert adapter.a.dtype == adapter.b.dtype == stored
        assert torch.equal(adapter.a, a.to(stored)) and torch.equal(adapter.b, b.to(stored))
        assert adapter.rank == 4 and adapter.nbytes == 2 * 4 * (32 + 16)


def test_balancing_saves_what_float16_would_lose():
    a, b = 1e-9 * gaussian(4, 32), gaussian(16, 4)
    b[:, 3] = 0.0
    wanted = b @ a
    plain = LowRank.rounded(a, b, torch.float32).product()
    balanced = LowRank.balanced(a, b, torch.float32).product()
    assert not plain.any(), "what balancing is for"
    assert torch.allclose(balanced, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_taken_in_float32_and_the_output_keeps_its_dtype(dtype):
    adapter = LowRank.rounded(gaussian(4, 32), gaussian(16, 4), dtype)
    x, y = gaussian(5, 32, 1).to(dtype), gaussian(5, 16, 2).to(dtype)
    inner = torch.nn.functional.linear(x.float(), adapter.a.float())
    more = torch.nn.functional.linear(inner, adapter.b.float())
    assert torch.equal(adapter.added(x, y), (y + more).to(dtype))
    assert adapter.added(x, y).dtype == dtype


def test_a_state_checks_that_its_adapter_fits():
    weight = gaussian(16, 32)
    whole = LowRank.rounded(gaussian(4, 32), gaussian(16, 4), torch.float16)
    LayerState(weight, adapter=whole).check("layer")
    assert "adapter of rank 4" in repr(LayerState(weight, adapter=whole))
    broken = {
        "shape": LowRank(whole.a[:, :31], whole.b),
        "shape of": LowRank(whole.a[:3], whole.b),
        "16 bits": LowRank(whole.a.float(), whole.b.float()),
        "NaN": LowRank(whole.a * float("nan"), whole.b),
    }
    for words, adapter in broken.items():
        with pytest.raises(InvariantError, match=words):
            LayerState(weight, adapter=adapter).check("layer")


def test_a_small_state_keeps_the_adapter():
    adapter = LowRank.rounded(gaussian(4, 32), gaussian(16, 4), torch.float16)
    state = LayerState(gaussian(16, 32), adapter=adapter)
    assert Packed.of(state).state().adapter is adapter
    assert Packed.of(state).reduced(only_masked=True).state(state.weight).adapter is adapter


def test_a_layer_of_another_shape_gets_an_adapter_of_the_same_rank():
    adapter = LowRank.rounded(gaussian(4, 32), gaussian(16, 4), torch.bfloat16).like(64, 128)
    assert adapter.a.shape == (4, 128) and adapter.b.shape == (64, 4)
    assert adapter.a.is_meta and adapter.b.dtype == torch.bfloat16
