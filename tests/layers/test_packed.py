"""A packed layer comes back bit for bit, and is small only where it does."""

import dataclasses
import itertools

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
from optimum_order.testing import DTYPES, gaussian, same


def layer(dtype=torch.float32):
    W = gaussian(24, 40).to(dtype)
    W[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 1e-30])
    return LayerState(W)


def after(order, state):
    statistics = Statistics.of(gaussian(64, 40, 1), [Gram])
    for stage in Order.parse(order):
        state = method(stage).apply(state, statistics)
    return state


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_mask_of_any_shape_comes_back(shape, random):
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    before = torch.rand(shape, generator=generator) < random.random()
    packed = bits(before)
    assert packed.numel() == -(-before.numel() // 8) and packed.dtype == torch.uint8
    unpacked = mask(packed, before.shape)
    assert unpacked.dtype == torch.bool and torch.equal(unpacked, before)
    strided = before.movedim(0, -1)
    assert torch.equal(mask(bits(strided), strided.shape), strided)


def test_no_mask_is_not_a_mask_of_nothing():
    assert bits(None) is None and mask(None, (2, 3)) is None
    assert Packed.of(layer()).state().pruned is None


def test_a_layer_that_was_only_masked_needs_no_weight():
    orders = ["magnitude:0.5", "wanda:0.3 > magnitude:0.6", "wanda(pattern=2:4)", "magnitude:0"]
    for dtype, order in itertools.product(DTYPES, orders):
        case = f"{order}, {dtype}"
        before = layer(dtype)
        state = after(order, before)
        assert is_masked(before, state), case
        packed = Packed.of(state).reduced(only_masked=True)
        assert packed.weight is None, case
        assert same(packed.state(before.weight), state), case
        assert same(packed.state(state.weight), state), f"{case}: of the pruned weight"
        assert torch.equal(before.weight, layer(dtype).weight), f"{case}: changed in place"


def test_any_other_change_is_seen():
    for order in (
        "sparsegpt:0.5",
        "rtn:4",
        "gptq:4 > wanda:0.5",
        "rtn:4 > wanda(sparsity=0.5, off_grid=true)",
    ):
        before = layer()
        assert not is_masked(before, after(order, before)), order


def test_the_sign_of_a_zero_is_seen():
    before = layer()
    state = after("magnitude:0.001", before)
    assert not state.pruned[0, 2], "or the test says nothing"
    assert is_masked(before, state)
    weight = state.weight.clone()
    weight[0, 2] = 0.0
    assert torch.equal(weight, state.weight)
    assert not is_masked(before, dataclasses.replace(state, weight=weight))
    assert not is_masked(before, LayerState(weight))


def test_a_layer_on_a_uniform_grid_is_a_byte_each():
    orders = {
        "rtn:4": torch.int8,
        "rtn:8": torch.int8,
        "gptq(bits=3, group_size=8, symmetric=false)": torch.int8,
        "rtn(bits=8, symmetric=false)": torch.uint8,
        "gptq:2 > wanda:0.5": torch.int8,
        "sparsegpt:0.5 > rtn(bits=4, group_size=8)": torch.int8,
    }
    for dtype, (order, codes) in itertools.product(DTYPES, orders.items()):
        state = after(order, layer(dtype))
        packed = Packed.of(state).reduced(only_masked=False)
        assert packed.weight.dtype == codes and packed.weight.shape == state.weight.shape, order
        assert same(packed.state(), state), f"{order}, {dtype}"


@pytest.mark.parametrize("change", [lambda W: -W.masked_fill(W != 0, 0), lambda W: W * 1.01])
def test_values_that_codes_do_not_give_back_stay_values(change):
    state = after("rtn:4", layer())
    weight = torch.where(torch.arange(40) < 4, change(state.weight), state.weight)
    odd = dataclasses.replace(state, weight=weight)  # a -0.0 lies on the grid all the same
    packed = Packed.of(odd).reduced(only_masked=False)
    assert packed.weight.dtype == torch.float32
    assert same(packed.state(), odd)


@dataclasses.dataclass(frozen=True)
class Wide(UniformGrid):
    """Codes that need more than a byte."""

    def quantize(self, weight, columns=slice(None)):
        return super().quantize(weight, columns) + 256

    def dequantize(self, codes, columns=slice(None)):
        return super().dequantize(codes - 256, columns)


def test_codes_that_need_more_than_a_byte_are_not_cut():
    state = after("rtn:4", layer())
    grid = state.grid
    wide = Wide(grid.bits, grid.scale, grid.zero_point, grid.inputs)
    state = dataclasses.replace(state, grid=wide)
    packed = Packed.of(state).reduced(only_masked=False)
    assert packed.weight is state.weight and same(packed.state(), state)


def test_others_stay_values():
    for order in ("sparsegpt:0.5", "bitsandbytes:int8", "wanda:0.5"):
        state = after(order, layer())
        packed = Packed.of(state).reduced(only_masked=False)
        assert packed.weight is state.weight, order
        assert same(packed.state(), state), order


def test_states_are_a_mapping_of_states():
    before = {"a": layer(), "b": after("wanda:0.5", layer())}
    states = States(before)
    assert list(states) == ["a", "b"] and len(states) == 2
    assert all(same(states[name], state) for name, state in before.items())
    states["a"] = rounded = after("rtn:4", layer())
    assert same(states["a"], rounded) and list(states) == ["a", "b"]
    assert states["b"].weight is before["b"].weight, "the weights are copied"
    with pytest.raises(TypeError, match="every layer has a state"):
        del states["a"]
    with pytest.raises(KeyError):
        states["c"]
