"""Whatever is kept small comes back bit for bit, and is small only where that is so."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.engine.recipe import method
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.packed import Packed, States, bits, is_masked, mask
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order


def layer(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 40, generator=generator).to(dtype)
    W[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 1e-30])
    return LayerState(W)


def after(order, state):
    X = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    known = Statistics(len(X), {Gram: X.T @ X})
    for stage in Order.parse(order):
        state = method(stage).apply(state, known)
    return state


def same(one, other):
    """Whether two states are the same bit for bit."""
    return (
        one.weight.dtype == other.weight.dtype
        and one.weight.view(torch.uint8).equal(other.weight.view(torch.uint8))
        and (one.pruned is None) == (other.pruned is None)
        and torch.equal(one.mask, other.mask)
        and one.grid is other.grid
        and one.notes == other.notes
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_mask_of_any_shape_comes_back(shape, random):
    before = (
        torch.rand(shape, generator=torch.Generator().manual_seed(random.randrange(2**32)))
        < random.random()
    )
    packed = bits(before)
    assert packed.numel() == -(-before.numel() // 8) and packed.dtype == torch.uint8
    found = mask(packed, before.shape)
    assert found.dtype == torch.bool and torch.equal(found, before)
    strided = before.movedim(0, -1)
    assert torch.equal(mask(bits(strided), strided.shape), strided)


def test_no_mask_is_not_a_mask_of_nothing():
    assert bits(None) is None and mask(None, (2, 3)) is None
    assert Packed.of(layer()).state().pruned is None


MASKED = ["magnitude:0.5", "wanda:0.3 > magnitude:0.6", "wanda(pattern=2:4)", "magnitude:0"]
MOVED = [
    "sparsegpt:0.5",
    "rtn:4",
    "gptq:4 > wanda:0.5",
    "rtn:4 > wanda(sparsity=0.5, off_grid=true)",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", MASKED)
def test_what_was_only_masked_needs_no_weight(order, dtype):
    before = layer(dtype)
    found = after(order, before)
    assert is_masked(before, found)
    packed = Packed.of(found).reduced(only_masked=True)
    assert packed.weight is None
    assert same(packed.state(before.weight), found)
    assert same(packed.state(found.weight), found), (
        "what has been pruned already may be pruned once more"
    )
    assert torch.equal(before.weight, layer(dtype).weight)


@pytest.mark.parametrize("order", MOVED)
def test_whatever_else_was_done_is_seen(order):
    before = layer()
    assert not is_masked(before, after(order, before))


def test_the_sign_of_a_zero_is_seen():
    before = layer()
    found = after("magnitude:0.001", before)
    assert not found.pruned[0, 2], "or it says nothing"
    assert is_masked(before, found)
    weight = found.weight.clone()
    weight[0, 2] = 0.0
    assert torch.equal(weight, found.weight) and not is_masked(
        before, dataclasses.replace(found, weight=weight)
    )
    assert not is_masked(before, LayerState(weight))


GRIDS = [
    ("rtn:4", torch.int8),
    ("rtn:8", torch.int8),
    ("gptq(bits=3, group_size=8, symmetric=false)", torch.int8),
    ("rtn(bits=8, symmetric=false)", torch.uint8),
    ("gptq:2 > wanda:0.5", torch.int8),
    ("sparsegpt:0.5 > rtn(bits=4, group_size=8)", torch.int8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("order", "codes"), GRIDS)
def test_what_lies_on_a_grid_is_a_byte_each(order, codes, dtype):
    found = after(order, layer(dtype))
    packed = Packed.of(found).reduced(only_masked=False)
    assert packed.weight.dtype == codes and packed.weight.shape == found.weight.shape
    assert same(packed.state(), found)


@pytest.mark.parametrize("change", [lambda W: -W.masked_fill(W != 0, 0), lambda W: W * 1.01])
def test_what_codes_do_not_give_back_keeps_its_values(change):
    found = after("rtn:4", layer())
    weight = torch.where(torch.arange(40) < 4, change(found.weight), found.weight)
    odd = dataclasses.replace(found, weight=weight)  # a -0.0 lies on the grid all the same
    packed = Packed.of(odd).reduced(only_masked=False)
    assert packed.weight.dtype == torch.float32
    assert same(packed.state(), odd)


def test_codes_that_need_more_than_a_byte_are_not_cut():
    class Wide(UniformGrid):
        def quantize(self, weight, columns=slice(None)):
            return super().quantize(weight, columns) + 256

        def dequantize(self, codes, columns=slice(None)):
            return super().dequantize(codes - 256, columns)

    found = after("rtn:4", layer())
    grid = Wide(
        **{field.name: getattr(found.grid, field.name) for field in dataclasses.fields(UniformGrid)}
    )
    wide = dataclasses.replace(found, grid=grid)
    packed = Packed.of(wide).reduced(only_masked=False)
    assert packed.weight is wide.weight and same(packed.state(), wide)


@pytest.mark.parametrize("order", ["sparsegpt:0.5", "bitsandbytes:int8", "wanda:0.5"])
def test_others_keep_their_values(order):
    found = after(order, layer())
    packed = Packed.of(found).reduced(only_masked=False)
    assert packed.weight is found.weight
    assert same(packed.state(), found)


def test_states_are_a_mapping_of_states():
    before = {"a": layer(), "b": after("wanda:0.5", layer())}
    states = States(before)
    assert list(states) == ["a", "b"] and len(states) == 2
    assert all(same(states[name], state) for name, state in before.items())
    states["a"] = rounded = after("rtn:4", layer())
    assert same(states["a"], rounded) and list(states) == ["a", "b"]
    assert states["b"].weight is before["b"].weight, "there is one copy of the weights"
    with pytest.raises(TypeError, match="every layer has a state"):
        del states["a"]
    with pytest.raises(KeyError):
        states["c"]
