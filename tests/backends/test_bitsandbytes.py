"""The library rounds, and we hold its choice: its own results, and every promise of a layer."""

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

from optimum_order.backends import bitsandbytes as bitsandbytes_method
from optimum_order.backends.bitsandbytes import BitsAndBytes
from optimum_order.engine.recipe import canonical, method
from optimum_order.errors import OrderError
from optimum_order.layers.error import squared_error
from optimum_order.layers.grids.bitsandbytes import computes_right
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order, Stage
from optimum_order.testing import DTYPES, BackendContract

STAGES = (
    "bitsandbytes",
    "bitsandbytes(dtype=nf4, blocksize=32, double_quant=true)",
    "bitsandbytes:fp4",
    "bitsandbytes(dtype=fp4, blocksize=128, double_quant=true)",
    "bitsandbytes:int8",
)


class TestContract(BackendContract):
    backend = BitsAndBytes
    stages = STAGES


def run(order, weight, pruned=None, statistics=None):
    state = LayerState(weight, pruned=pruned)
    for stage in Order.parse(order):
        state = method(stage).apply(state, statistics)
    return state


def negative_zeros(weight):
    return int((torch.signbit(weight) & (weight == 0)).sum())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_four_bits_are_the_librarys_own(data_type, nested, gaussian):
    for dtype in DTYPES:
        weight = gaussian(64, 192).mul(0.05).to(dtype)
        packed, scales = quantize_4bit(
            weight, quant_type=data_type, compress_statistics=nested, blocksize=64
        )
        expected = dequantize_4bit(packed, scales)
        stage = Stage("bitsandbytes", dtype=data_type, double_quant=nested)
        state = method(stage).apply(LayerState(weight))
        assert torch.equal(state.weight, expected)
        assert (state.grid.bits, state.grid.unit, state.bits) == (4, 64, 4)
        if not nested:  # with nested scales the library rounds before it knows the scales
            assert torch.equal(state.grid.nearest(weight), expected)


def test_int8_is_the_librarys_own(gaussian):
    weight = gaussian(64, 192).half()
    codes, absmax, _ = int8_vectorwise_quant(weight.clone())
    state = run("bitsandbytes:int8", weight)
    assert torch.equal(state.weight, int8_vectorwise_dequant(codes, absmax).half())
    assert torch.equal(state.grid.quantize(weight), codes.short())
    assert (state.grid.bits, state.grid.unit) == (8, 192)
    assert codes.min() == -127 and codes.max() == 127


@st.composite
def layers(draw):
    """(weight, pruned): rows from huge to nothing, whole blocks and rows pruned."""
    rows = draw(st.integers(1, 3)) * 32
    inputs = 128
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([1e-7, 0.02, 300.0]))
    weight = torch.randn(rows, inputs, generator=generator) * size
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
    later = method(Stage("magnitude", 0.6)).apply(state)
    assert later.grid is state.grid and negative_zeros(later.weight) == 0


@settings(max_examples=50, deadline=None)
@given(layers(), st.sampled_from(STAGES), st.data())
def test_columns_are_rounded_as_in_the_whole_weight(layer, stage, data):
    weight, _ = layer
    grid = run(stage, weight).grid
    columns = torch.tensor(data.draw(st.lists(st.integers(0, 127), min_size=1, max_size=9)))
    codes = grid.quantize(weight)
    assert torch.equal(grid.quantize(weight[:, columns], columns), codes[:, columns])
    values = grid.dequantize(codes)
    assert torch.equal(grid.dequantize(codes[:, columns], columns), values[:, columns])
    nearest = grid.nearest(weight)
    assert torch.equal(grid.nearest(weight[:, 32:64], slice(32, 64)), nearest[:, 32:64])


def test_sparsegpt_afterwards_stays_on_the_grid(gaussian):
    statistics = Statistics.of(gaussian(256, 128, 1), [Gram])
    for stage in STAGES:
        before = run(stage, gaussian(32, 128))
        after = method(Stage("sparsegpt", 0.5)).apply(before, statistics)
        assert after.grid is before.grid and after.grid.holds(after.weight), stage
        plain = method(Stage("magnitude", 0.5)).apply(before)
        error = squared_error(after.weight - before.weight, statistics)
        assert error < squared_error(plain.weight - before.weight, statistics), stage


def test_the_stage_prints_in_one_form():
    for text, printed in [
        ("bitsandbytes", "bitsandbytes:nf4"),
        ("bitsandbytes(dtype=int8)", "bitsandbytes:int8"),
        (
            "bitsandbytes(dtype=fp4, blocksize=64, double_quant=true)",
            "bitsandbytes(double_quant=true, dtype=fp4)",
        ),
    ]:
        assert str(canonical(Order.parse(text))) == printed


def test_resolved_leaves_out_what_int8_has_not():
    assert method(Stage("bitsandbytes", "int8")).resolved == {"dtype": "int8"}
    targeted = Stage("bitsandbytes", dtype="int8", targets="a.b")
    assert method(targeted).resolved == {"dtype": "int8", "targets": "a.b"}
    resolved = {"dtype": "nf4", "blocksize": 64, "double_quant": False}
    assert method(Stage("bitsandbytes")).resolved == resolved


def test_bad_options_are_refused():
    for text, reason in [
        ("bitsandbytes:4", "must be nf4, fp4 or int8, got 4"),
        ("bitsandbytes(blocksize=48)", "must be one of 32, 64, .*4096, got 48"),
        ("bitsandbytes(dtype=int8, blocksize=32)", "int8 has one scale for each row"),
        ("bitsandbytes(dtype=int8, double_quant=true)", "int8 has one scale for each row"),
        ("bitsandbytes(bits=4)", "Unknown option 'bits'"),
    ]:
        with pytest.raises(OrderError, match=reason):
            method(Stage.parse(text))


SHAPES = [("nf4", (64, 352), 64), ("nf4", (61, 96), 64), ("fp4", (33, 65), 128)]


@pytest.mark.parametrize(("data_type", "shape", "blocksize"), SHAPES)
def test_any_shape_that_the_library_computes_right_is_what_the_library_makes_of_it(
    data_type, shape, blocksize
):
    """Blocks run over the ends of rows, as in the library."""
    stage = Stage("bitsandbytes", dtype=data_type, blocksize=blocksize)
    if reason := method(stage).check_shape(shape):
        assert "its kernels for this CPU do not compute" in reason
        return
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state = method(stage).apply(LayerState(weight))
    packed, theirs = quantize_4bit(weight, blocksize=blocksize, quant_type=data_type)
    assert torch.equal(state.weight, dequantize_4bit(packed, theirs))
    pruned = method(Stage("magnitude", 0.5)).apply(state)
    assert pruned.grid is state.grid and pruned.grid.holds(pruned.weight)


def test_shapes_that_this_processor_cannot_run_are_refused_as_such(monkeypatch):
    monkeypatch.setattr(bitsandbytes_method, "computes_right", lambda *shape: False)
    cpu = "the library takes it on a GPU, but its kernels for this CPU do not compute"
    for text, shape, advice in [
        (
            "bitsandbytes:nf4",
            (64, 96),
            "blocks of 64; blocksize 32 works, and int8 takes any shape",
        ),
        ("bitsandbytes:nf4", (64, 50), "64 x 50 in blocks of 64; int8 takes any shape"),
        ("bitsandbytes:fp4", (61, 64), "61 x 64 in blocks of 64; int8 takes any shape"),
    ]:
        reason = method(Stage.parse(text)).check_shape(shape)
        assert reason.startswith(cpu) and reason.endswith(advice)
    assert method(Stage.parse("bitsandbytes:fp4")).check_shape((64, 64)) is None
    assert method(Stage.parse("bitsandbytes:int8")).check_shape((61, 50)) is None


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    computes_right.cache_clear()
    assert computes_right(32, 64, "nf4", 64)
    for broken in (lambda *a, **k: torch.zeros(32, 64), fails):
        computes_right.cache_clear()
        monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", broken)
        assert not computes_right(32, 64, "nf4", 64)
    computes_right.cache_clear()


def fails(*args, **kwargs):
    raise AssertionError("N must be divisible by block_n")
