"""The library rounds, we keep what it chose: its own results, and every promise of a layer, on awkward layers too."""

import pytest
import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order import backends
from optimum_order.errors import OrderError
from optimum_order.layers.grids.bitsandbytes import NestedScales, fit_blocks
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order, Stage

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STAGES = [
    "bitsandbytes",
    "bitsandbytes(dtype=nf4, blocksize=32, double_quant=true)",
    "bitsandbytes:fp4",
    "bitsandbytes(dtype=fp4, blocksize=128, double_quant=true)",
    "bitsandbytes:int8",
]


def run(order, weight, pruned=None, statistics=None):
    state = LayerState(weight, pruned=pruned)
    for stage in Order.parse(order):
        state = backends.method(stage).apply(state, statistics)
    return state


def negative_zeros(weight):
    return int((torch.signbit(weight) & (weight == 0)).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_four_bits_are_the_librarys_own(data_type, nested, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 192).mul(0.05).to(dtype)
    expected = dequantize_4bit(
        *quantize_4bit(weight, quant_type=data_type, compress_statistics=nested, blocksize=64)
    )
    stage = Stage("bitsandbytes", dtype=data_type, double_quant=nested)
    found = backends.method(stage).apply(LayerState(weight))
    assert torch.equal(found.weight, expected)
    assert (found.grid.bits, found.grid.unit, found.bits) == (4, 64, 4)
    if not nested:  # with nested scales the library rounds before it knows the scales
        assert torch.equal(found.grid.nearest(weight), expected)


def test_int8_is_the_librarys_own():
    torch.manual_seed(0)
    weight = torch.randn(64, 192).half()
    codes, absmax, _ = int8_vectorwise_quant(weight.clone())
    found = run("bitsandbytes:int8", weight)
    assert torch.equal(found.weight, int8_vectorwise_dequant(codes, absmax).half())
    assert torch.equal(found.grid.quantize(weight), codes.short())
    assert (found.grid.bits, found.grid.unit) == (8, 192)
    assert codes.min() == -127 and codes.max() == 127


@st.composite
def layers(draw):
    """(weight, pruned): rows from huge to nothing, whole blocks and rows pruned."""
    rows, inputs = draw(st.integers(1, 3)) * 32, 128
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, inputs, generator=generator) * draw(
        st.sampled_from([1e-7, 0.02, 300.0])
    )
    weight *= torch.rand(rows, 1, generator=generator) ** draw(st.sampled_from([0, 8, 40]))
    pruned = torch.rand(rows, inputs, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.97]))
    pruned[draw(st.integers(0, rows - 1))] = True
    pruned[0, :64] = True
    return weight.to(draw(st.sampled_from(DTYPES))).masked_fill(pruned, 0.0), pruned


@settings(max_examples=100, deadline=None)
@given(layers(), st.sampled_from(STAGES))
def test_every_promise_is_kept_on_awkward_layers(layer, stage):
    weight, pruned = layer
    state = run(stage, weight, pruned)  # apply checks the promises
    assert negative_zeros(state.weight) == 0
    assert (state.grid.absmax > 0).all() and torch.isfinite(state.grid.absmax).all()
    later = backends.method(Stage("magnitude", 0.6)).apply(state)
    assert later.grid is state.grid and negative_zeros(later.weight) == 0


@settings(max_examples=50, deadline=None)
@given(layers(), st.sampled_from(STAGES), st.data())
def test_columns_are_the_columns_of_the_whole(layer, stage, data):
    weight, _ = layer
    grid = run(stage, weight).grid
    columns = torch.tensor(data.draw(st.lists(st.integers(0, 127), min_size=1, max_size=9)))
    codes = grid.quantize(weight)
    assert torch.equal(grid.quantize(weight[:, columns], columns), codes[:, columns])
    assert torch.equal(
        grid.dequantize(codes[:, columns], columns), grid.dequantize(codes)[:, columns]
    )
    assert torch.equal(
        grid.nearest(weight[:, 32:64], slice(32, 64)), grid.nearest(weight)[:, 32:64]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_nearest_is_nearest(stage):
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    grid = run(stage, weight).grid
    codes = range(16) if grid.bits == 4 else range(-127, 128)
    every = torch.stack(
        [grid.dequantize(torch.full(weight.shape, code, dtype=torch.short)) for code in codes]
    )
    least = (every - weight).abs().amin(0)
    torch.testing.assert_close((grid.nearest(weight) - weight).abs(), least, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_pruned_to_nothing_stays_nothing(stage):
    state = run(stage, torch.zeros(32, 128), torch.ones(32, 128, dtype=torch.bool))
    assert not state.weight.any() and negative_zeros(state.weight) == 0


def test_zero_has_its_own_code():
    weight = torch.zeros(32, 128)
    weight[:, 0] = 1.0
    for data_type, zero in (("nf4", 7), ("fp4", 0), ("int8", 0)):
        grid = run(f"bitsandbytes:{data_type}", weight).grid
        assert (grid.quantize(weight)[:, 1:] == zero).all()
        for nothing in (1e-9, -1e-9):  # fp4 has a zero for each sign
            assert (grid.quantize(torch.full_like(weight, nothing)) == zero).all()


@pytest.mark.parametrize("stage", STAGES)
def test_what_underflows_is_plus_zero(stage):
    """SparseGPT rounds float32 values to a grid in half precision, in which they can come out as -0.0."""
    grid = run(stage, torch.full((32, 128), 2.4e-7).half()).grid
    values = -torch.linspace(0, 1e-7, 128).expand(32, 128)
    assert negative_zeros(grid.nearest(values)) == 0
    assert (grid.nearest(values) == 0).any() and (grid.nearest(values) < 0).any()


def test_nested_scales_never_reach_zero():
    """Rounding a small scale beside a huge one can give a negative one, which would turn zeros into -0.0."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 1e-4
    weight[:4, 0] = 1.0
    absmax = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)[1]
    scales = NestedScales(absmax.absmax, absmax.state2.absmax, absmax.offset)
    assert (
        scales.dequantize() < 0
    ).any()  # the library's own, which would also turn the signs of weights
    grid, codes = fit_blocks(weight, "nf4", 64, True)
    assert (grid.absmax > 0).all() and torch.equal(grid.absmax, grid.nested.dequantize())
    assert negative_zeros(grid.dequantize(codes)) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_sparsegpt_afterwards_stays_on_the_grid(stage):
    torch.manual_seed(0)
    X = torch.randn(256, 128)
    statistics = Statistics(256, {Gram: X.T @ X})
    before = run(stage, torch.randn(32, 128))
    after = backends.method(Stage("sparsegpt", 0.5)).apply(before, statistics)
    assert after.grid is before.grid and after.grid.holds(after.weight)
    plain = backends.method(Stage("magnitude", 0.5)).apply(before)
    assert statistics.squared_error(after.weight - before.weight) < statistics.squared_error(
        plain.weight - before.weight
    )


def test_the_stage_prints_in_one_form():
    for text, canonical in [
        ("bitsandbytes", "bitsandbytes:nf4"),
        ("bitsandbytes(dtype=int8)", "bitsandbytes:int8"),
        (
            "bitsandbytes(dtype=fp4, blocksize=64, double_quant=true)",
            "bitsandbytes(double_quant=true, dtype=fp4)",
        ),
    ]:
        assert str(backends.canonical(Order.parse(text))) == canonical
    assert backends.method(Stage("bitsandbytes", "int8")).resolved == {"dtype": "int8"}
    resolved = {"dtype": "nf4", "blocksize": 64, "double_quant": False}
    assert backends.method(Stage("bitsandbytes")).resolved == resolved


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bitsandbytes:4", "must be nf4, fp4 or int8, got 4"),
        ("bitsandbytes(blocksize=48)", "must be one of 32, 64, .*4096, got 48"),
        ("bitsandbytes(dtype=int8, blocksize=32)", "int8 has one scale for each row"),
        ("bitsandbytes(dtype=int8, double_quant=true)", "int8 has one scale for each row"),
        ("bitsandbytes(bits=4)", "Unknown option 'bits'"),
    ],
)
def test_bad_options_are_refused(text, reason):
    with pytest.raises(OrderError, match=reason):
        backends.method(Stage.parse(text))


@pytest.mark.parametrize(
    ("stage", "shape", "reason"),
    [
        ("bitsandbytes:nf4", (64, 96), "blocksize 64 does not divide its 96 inputs; 32 does"),
        ("bitsandbytes:nf4", (64, 50), "does not divide its 50 inputs; none does, int8 needs none"),
        ("bitsandbytes:fp4", (61, 64), "needs a multiple of 32 outputs, it has 61; int8 does not"),
        ("bitsandbytes:fp4", (64, 64), None),
        ("bitsandbytes:int8", (61, 50), None),
    ],
)
def test_shapes_that_the_library_cannot_run_are_refused(stage, shape, reason):
    assert backends.method(Stage.parse(stage)).check_shape(
        shape
    ) == reason or reason in backends.method(Stage.parse(stage)).check_shape(shape)
