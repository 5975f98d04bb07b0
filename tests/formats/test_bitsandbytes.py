"""The stock layout, written from the codes: what the library itself reads from it is what we had."""

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

from optimum_order import backends
from optimum_order.errors import ArtifactError
from optimum_order.formats.bitsandbytes import BitsAndBytes
from optimum_order.layers.grids.bitsandbytes import fit_blocks
from optimum_order.layers.state import LayerState
from optimum_order.order import Order

FORMAT = BitsAndBytes()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def states(draw):
    """Layers of every data type and shape, pruned before or after, with whole blocks and rows gone."""
    method = draw(st.sampled_from(["nf4", "fp4", "int8"]))
    blocksize = 1 if method == "int8" else draw(st.sampled_from([32, 64, 128]))
    rows, inputs = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 4)) * blocksize,
    )  # the kernels want whole blocks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, inputs, generator=generator) * draw(
        st.sampled_from([1e-6, 0.02, 1.0, 300.0])
    )
    weight *= torch.rand(rows, 1, generator=generator) ** draw(
        st.sampled_from([0, 8])
    )  # rows of unlike size
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    pruned = torch.rand(weight.shape, generator=generator) < draw(
        st.sampled_from([0.0, 0.5, 0.95, 1.0])
    )
    if draw(st.booleans()):
        weight = weight.masked_fill(pruned, 0.0)
    stage = {"dtype": method}
    if method != "int8":
        stage |= {"blocksize": blocksize, "double_quant": draw(st.booleans())}
    backend = backends.method(backends.Stage("bitsandbytes", **stage))
    state = backend.apply(LayerState(weight))
    return LayerState(state.weight.masked_fill(pruned, 0.0), pruned=pruned, grid=state.grid)


def library_decodes(tensors, shape, dtype):
    if "SCB" in tensors:
        return int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]).to(dtype)
    stats = {
        key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"
    }
    return dequantize_4bit(tensors["weight"], QuantState.from_dict(stats, device="cpu")).view(shape)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=200, deadline=None)
@given(states())
def test_decoding_gives_back_what_was_encoded(state):
    state.check("drawn")
    tensors = FORMAT.encode(state)
    decoded = FORMAT.decode(tensors, FORMAT.scheme(state))
    assert (
        torch.equal(bits(decoded.weight), bits(state.weight))
        and decoded.weight.dtype == state.weight.dtype
    )
    assert type(decoded.grid) is type(state.grid) and torch.equal(
        decoded.grid.absmax, state.grid.absmax
    )
    assert (decoded.grid.unit, decoded.grid.inputs) == (state.grid.unit, state.grid.inputs)
    again = FORMAT.encode(decoded)
    assert tensors.keys() == again.keys() and all(
        torch.equal(tensors[key], again[key]) for key in tensors
    )


@settings(max_examples=100, deadline=None)
@given(states())
def test_the_library_decodes_the_same_values(state):
    found = library_decodes(FORMAT.encode(state), state.weight.shape, state.weight.dtype)
    assert torch.equal(bits(found), bits(state.weight))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_the_tensors_are_those_that_the_library_writes(data_type, nested):
    """Same names, dtypes and shapes as a layer quantised by the library, and for a fresh one the same contents."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128).bfloat16()
    packed, stats = quantize_4bit(
        weight, quant_type=data_type, compress_statistics=nested, blocksize=64
    )
    if data_type == "fp4":  # it has a second zero, 8, of which we make 0
        high, low = packed >> 4, packed & 15
        packed = (high.masked_fill(high == 8, 0) << 4) | low.masked_fill(low == 8, 0)
    stock = {"weight": packed} | {
        f"weight.{key}": value for key, value in stats.as_dict(packed=True).items()
    }
    grid, codes = fit_blocks(weight, data_type, 64, nested)
    ours = FORMAT.encode(LayerState(grid.dequantize(codes), grid=grid))
    assert ours.keys() == stock.keys()
    assert all(
        torch.equal(ours[key], stock[key]) and ours[key].dtype == stock[key].dtype for key in stock
    )


def test_pruning_after_quantising_changes_codes_and_nothing_else():
    torch.manual_seed(0)
    state = LayerState(torch.randn(64, 128))
    for order in ("bitsandbytes:nf4", "bitsandbytes:int8"):
        before, after = state, None
        for stage in Order.parse(f"{order} > magnitude:0.5"):
            before, after = after or before, backends.method(stage).apply(after or before)
        one, other = FORMAT.encode(before), FORMAT.encode(after)
        assert not torch.equal(one["weight"], other["weight"])
        assert all(torch.equal(one[key], other[key]) for key in one if key != "weight")


def encoded(stage, rows=64, inputs=128):
    torch.manual_seed(0)
    state = backends.method(Order.parse(stage)[0]).apply(LayerState(torch.randn(rows, inputs)))
    return FORMAT.encode(state), FORMAT.scheme(state)


NF4, NESTED, INT8 = (
    "bitsandbytes:nf4",
    "bitsandbytes(dtype=nf4, double_quant=true)",
    "bitsandbytes:int8",
)
STATE = "weight.quant_state.bitsandbytes__nf4"


def restate(**changes):
    def change(tensors):
        facts = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        (NF4, lambda t: t.pop("weight.absmax"), "has the tensors"),
        (
            NF4,
            lambda t: t.update({STATE: torch.tensor([255, 0], dtype=torch.uint8)}),
            "cannot be read",
        ),
        (
            NF4,
            lambda t: t.update({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}),
            "no JSON object",
        ),
        (NF4, lambda t: t.update({STATE: torch.tensor(2**40)}), "one dimension of uint8"),
        (NF4, restate(dtype="load"), "does not fit config.json"),
        (NF4, restate(quant_type="fp4"), "does not fit config.json"),
        (NF4, restate(blocksize=63), "does not fit config.json"),
        (NF4, restate(shape=[64]), "does not fit config.json"),
        (NF4, restate(shape=[64, 2**40]), "not a 4-bit layer"),
        (NF4, lambda t: t["weight.quant_map"].mul_(2), "quant map"),
        (NF4, lambda t: t["weight.absmax"].neg_(), "finite and positive"),
        (NF4, lambda t: t.update({"weight.absmax": t["weight.absmax"][1:]}), "float32 scales"),
        (NF4, lambda t: t.update({"weight": t["weight"].int()}), "not a 4-bit layer"),
        (NESTED, restate(nested_offset=None), "nested scales"),
        (NESTED, restate(nested_offset=-1e9), "finite and positive"),
        (NESTED, lambda t: t["weight.nested_quant_map"].neg_(), "nested scales"),
        (NESTED, lambda t: t.update({"weight.nested_absmax": torch.ones(7)}), "nested scales"),
        (INT8, lambda t: t.pop("SCB"), "int8 matrix"),
        (INT8, lambda t: t["SCB"].fill_(float("inf")), "finite and positive"),
        (INT8, lambda t: t["weight"].fill_(-128), "-127 ... 127"),
        (INT8, lambda t: t.update(SCB=t["SCB"][1:]), "float32 scales"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(stage, change, reason):
    tensors, scheme = encoded(stage)
    change(tensors)
    with pytest.raises(ArtifactError, match=reason):
        FORMAT.decode(tensors, scheme)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {"load_in_8bit": True}, "dtype": "float64"},
        {"quantization_config": {}, "dtype": "float32"},
        {
            "quantization_config": {
                "bnb_4bit_quant_type": "int4",
                "bnb_4bit_use_double_quant": True,
            },
            "dtype": "float32",
        },
    ],
)
def test_a_config_that_says_too_little_is_refused(config):
    with pytest.raises(ArtifactError):
        FORMAT.scheme_in(config, ["x"])
