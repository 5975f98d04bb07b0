"""The stock layout, written from codes: the library itself reads back the values we had."""

import itertools
import json

import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_dequant,
    quantize_4bit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.engine.recipe import method
from optimum_order.errors import ArtifactError
from optimum_order.formats.base import outline
from optimum_order.formats.bitsandbytes import BitsAndBytes
from optimum_order.layers.grids.bitsandbytes import fit_blocks, fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage
from optimum_order.testing import CodecContract, same_bits

CODEC = BitsAndBytes()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE = "weight.quant_state.bitsandbytes__nf4"


def quantized(weight, data_type="nf4", blocksize=64, nested=False):
    if data_type == "int8":
        grid, codes = fit_rows(weight)
    else:
        grid, codes = fit_blocks(weight, data_type, blocksize, nested)
    return LayerState(grid.dequantize(codes), grid=grid)


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        for dtype in DTYPES:
            yield quantized(torch.randn(6, 128).to(dtype), "int8")
            for data_type, blocksize, nested in itertools.product(
                ["nf4", "fp4"], [32, 64], [False, True]
            ):
                # 5 x 128 weights fill no whole number of bytes of nested scales
                state = quantized(torch.randn(5, 128).to(dtype), data_type, blocksize, nested)
                pruned = state.weight > 1
                weight = state.weight.masked_fill(pruned, 0.0)
                yield LayerState(weight, pruned=pruned, grid=state.grid)

    def refused(self):
        weight = torch.randn(8, 32)
        grid = UniformGrid.fit(weight, bits=4)
        yield LayerState(grid.nearest(weight), grid=grid)


def test_the_size_is_exact_where_the_offset_of_nested_scales_is_known():
    state = quantized(torch.randn(5, 128), nested=True)
    assert CODEC.size(state).exact and not CODEC.size(outline(state)).exact
    assert 0 <= CODEC.size(outline(state)).bytes - CODEC.size(state).bytes < 24
    assert CODEC.size(outline(quantized(torch.randn(5, 128)))).exact


@st.composite
def states(draw):
    """Layers of every data type and shape, pruned before or after, with blocks and rows gone."""
    data_type = draw(st.sampled_from(["nf4", "fp4", "int8"]))
    blocksize = 1 if data_type == "int8" else draw(st.sampled_from([32, 64, 128]))
    rows = draw(st.integers(1, 9))
    inputs = draw(st.integers(1, 4)) * blocksize  # the kernels want whole blocks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    weight = torch.randn(rows, inputs, generator=generator) * spread
    unlike = draw(st.sampled_from([0, 8]))  # rows of unlike size
    weight *= torch.rand(rows, 1, generator=generator) ** unlike
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    share = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    pruned = torch.rand(weight.shape, generator=generator) < share
    if draw(st.booleans()):
        weight = weight.masked_fill(pruned, 0.0)
    options = {"dtype": data_type}
    if data_type != "int8":
        options |= {"blocksize": blocksize, "double_quant": draw(st.booleans())}
    state = method(Stage("bitsandbytes", **options)).apply(LayerState(weight))
    return LayerState(state.weight.masked_fill(pruned, 0.0), pruned=pruned, grid=state.grid)


def library_decodes(tensors, shape, dtype):
    if "SCB" in tensors:
        return int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]).to(dtype)
    stats = {
        key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"
    }
    return dequantize_4bit(tensors["weight"], QuantState.from_dict(stats, device="cpu")).view(shape)


@settings(max_examples=100, deadline=None)
@given(states())
def test_any_layer_comes_back_as_it_was_and_the_library_decodes_the_same_values(state):
    state.check("drawn")
    tensors = CODEC.encode(state)
    decoded = CODEC.decode(tensors, CODEC.scheme(state))
    assert same_bits(decoded.weight, state.weight)
    assert type(decoded.grid) is type(state.grid)
    assert torch.equal(decoded.grid.absmax, state.grid.absmax)
    assert (decoded.grid.unit, decoded.grid.inputs) == (state.grid.unit, state.grid.inputs)
    again = CODEC.encode(decoded)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    read = library_decodes(tensors, state.weight.shape, state.weight.dtype)
    assert same_bits(read, state.weight)


def test_the_tensors_are_those_that_the_library_writes():
    """Same names, dtypes and shapes as a layer that the library quantized, and same contents."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128).bfloat16()
    for data_type, nested in itertools.product(["nf4", "fp4"], [False, True]):
        packed, stats = quantize_4bit(
            weight, quant_type=data_type, compress_statistics=nested, blocksize=64
        )
        if data_type == "fp4":  # it has a second zero, 8, of which we make 0
            high = packed >> 4
            low = packed & 15
            packed = (high.masked_fill(high == 8, 0) << 4) | low.masked_fill(low == 8, 0)
        theirs = {f"weight.{key}": value for key, value in stats.as_dict(packed=True).items()}
        theirs["weight"] = packed
        ours = CODEC.encode(quantized(weight, data_type, 64, nested))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert same_bits(ours[key], theirs[key]), key


def test_pruning_after_quantizing_changes_codes_and_nothing_else(applied):
    state = LayerState(torch.randn(64, 128))
    for order in ("bitsandbytes:nf4", "bitsandbytes:int8"):
        before = applied(order, state)
        after = applied("magnitude:0.5", before)
        one = CODEC.encode(before)
        other = CODEC.encode(after)
        assert not torch.equal(one["weight"], other["weight"])
        assert all(torch.equal(one[key], other[key]) for key in one if key != "weight")


def test_a_layer_that_cannot_be_held_says_why(target_of):
    state = quantized(torch.randn(8, 64))
    for kind in ("linear", "conv1d"):
        assert CODEC.why_not(target_of(kind), state) is None
    assert "a fused expert" in CODEC.why_not(target_of("expert"), state)
    assert "a convolution" in CODEC.why_not(target_of("conv2d"), state)


def restate(**changes):
    """Change the JSON in the quant state of a layer."""

    def change(tensors):
        facts = json.loads(bytes(tensors[STATE].tolist())) | changes
        return {STATE: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}

    return change


def put(**tensors):
    named = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return lambda _: named


def text(data):
    return lambda _: {STATE: torch.tensor(list(data), dtype=torch.uint8)}


NF4 = quantized(torch.randn(64, 128))
NESTED = quantized(torch.randn(64, 128), nested=True)
INT8 = quantized(torch.randn(64, 128), "int8")


FLOAT8 = torch.ones(256, dtype=torch.float8_e4m3fn)


def test_tensors_that_do_not_fit_are_refused():
    for state, change, reason in [
        (NF4, put(weight__absmax=None), "has the tensors"),
        (NF4, text(b"\xff\0"), "cannot be read"),
        (NF4, text(b"[1]"), "no JSON object"),
        (NF4, lambda _: {STATE: torch.tensor(2**40)}, "one dimension of uint8"),
        (NF4, restate(dtype="load"), "does not fit config.json"),
        (NF4, restate(quant_type="fp4"), "does not fit config.json"),
        (NF4, restate(blocksize=63), "does not fit config.json"),
        (NF4, restate(shape=[64]), "does not fit config.json"),
        (NF4, restate(shape=[64, 2**40]), "not a 4-bit layer"),
        (NF4, lambda t: {"weight.quant_map": t["weight.quant_map"] * 2}, "quant map"),
        (NF4, lambda t: {"weight.absmax": -t["weight.absmax"]}, "finite and positive"),
        (NF4, lambda t: {"weight.absmax": t["weight.absmax"][1:]}, "float32 scales"),
        (NF4, lambda t: {"weight": t["weight"].int()}, "not a 4-bit layer"),
        (NESTED, restate(nested_offset=None), "nested scales"),
        (NESTED, restate(nested_offset=-1e9), "finite and positive"),
        (NESTED, put(weight__nested_quant_map=torch.ones(256)), "nested scales"),
        (NF4, put(weight__quant_map=FLOAT8), "quant map"),  # comparing would be a RuntimeError
        (NESTED, put(weight__nested_quant_map=FLOAT8), "nested scales"),
        (NESTED, put(weight__nested_absmax=torch.ones(7)), "nested scales"),
        (INT8, put(SCB=None), "int8 matrix"),
        (INT8, put(SCB=torch.full((64,), float("inf"))), "finite and positive"),
        (INT8, put(weight=torch.full((64, 128), -128, dtype=torch.int8)), "-127 ... 127"),
        (INT8, put(SCB=torch.ones(63)), "float32 scales"),
    ]:
        tensors = CODEC.encode(state)
        tensors |= change(tensors)
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(ArtifactError, match=reason):
            CODEC.decode(present, CODEC.scheme(state))


def test_a_config_that_says_too_little_is_refused():
    unknown = {"bnb_4bit_quant_type": "int4", "bnb_4bit_use_double_quant": True}
    for config in [
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {"load_in_8bit": True}, "dtype": "float64"},
        {"quantization_config": {}, "dtype": "float32"},
        {"quantization_config": unknown, "dtype": "float32"},
    ]:
        with pytest.raises(ArtifactError):
            CODEC.scheme_in(config, ["x"])
