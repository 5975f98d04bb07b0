"""Packing there and back, bit for bit, and against the library that will unpack it."""

import dataclasses
import itertools

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats.compressed_tensors import CompressedTensors
from optimum_order.formats.compressed_tensors_scheme import Scheme
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.float8 import Float8Grid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.testing import CodecContract, same_bits

CODEC = CompressedTensors()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(weight, pruned=None, **grid):
    fitted = UniformGrid.fit(weight, **grid)
    nearest = fitted.nearest(weight)
    if pruned is not None:
        nearest = nearest.masked_fill(pruned, 0.0)
    return LayerState(nearest, pruned=pruned, grid=fitted)


def rounded(state, inputs):
    return dataclasses.replace(state, inputs=inputs)


def on_float8(weight, inputs=None):
    grid = Float8Grid.fit(weight)
    return LayerState(grid.nearest(weight), grid=grid, inputs=inputs)


TOKEN = {data_type: InputGrid(data_type) for data_type in ("int8", "fp8")}


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        for bits, (size, groups), dtype in itertools.product(
            range(2, 9), [(-1, 33), (16, 64)], DTYPES
        ):
            weight = torch.randn(5, groups).to(dtype)
            yield quantized(weight, weight > 0.5, bits=bits, group_size=size)
            if bits in (4, 8):
                scale = torch.full((1,), 0.01, dtype=dtype)
                for inputs in (TOKEN["int8"], InputGrid("int8", scale)):
                    yield rounded(quantized(weight, bits=bits, group_size=size), inputs)
                for inputs in (None, TOKEN["fp8"], InputGrid("fp8", scale)):
                    yield on_float8(weight, inputs)

    def refused(self):
        weight = torch.randn(8, 32)
        yield quantized(weight, bits=4, symmetric=False)
        grid, codes = fit_rows(weight)
        yield LayerState(grid.dequantize(codes), grid=grid)
        yield LayerState(weight, inputs=TOKEN["int8"])
        yield on_float8(weight, TOKEN["int8"])
        yield rounded(quantized(weight, bits=4), TOKEN["fp8"])


@st.composite
def states(draw):
    """Layers of any width, grouping, dtype and mask, with whole groups and rows pruned."""
    rows = draw(st.integers(1, 9))
    size = draw(st.integers(1, 40))
    groups = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    weight = torch.randn(rows, size * groups, generator=generator) * spread
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    share = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    pruned = torch.rand(weight.shape, generator=generator) < share
    if draw(st.booleans()):
        weight = weight.masked_fill(pruned, 0.0)
    return quantized(
        weight,
        pruned,
        bits=draw(st.integers(2, 8)),
        group_size=draw(st.sampled_from([-1, size])),
        clip=draw(st.sampled_from(["none", "mse"])),
    )


@settings(max_examples=100, deadline=None)
@given(states())
def test_any_layer_comes_back_as_it_was_and_the_library_unpacks_the_same_values(state):
    state.check("drawn")
    encoded = CODEC.encode(state)
    decoded = CODEC.decode(encoded, CODEC.scheme(state))
    assert same_bits(decoded.weight, state.weight)
    assert same_bits(decoded.grid.scale, state.grid.scale)
    assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
    assert decoded.grid.zero_point is None and decoded.pruned is None

    size = state.grid.group_size
    weights = QuantizationArgs(
        num_bits=state.grid.bits,
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    unpacked = PackedQuantizationCompressor.decompress(encoded, scheme)["weight"]
    assert torch.equal(unpacked, state.weight) and unpacked.dtype == state.weight.dtype


def test_codes_take_their_bits_and_no_more():
    weight = torch.randn(16, 96)
    for bits in range(2, 9):
        encoded = CODEC.encode(quantized(weight, bits=bits, group_size=32))
        assert encoded["weight_packed"].nbytes * 8 == weight.numel() * bits
        assert encoded["weight_scale"].shape == (16, 3)


def test_a_layer_that_cannot_be_held_says_why(target_of):
    state = quantized(torch.randn(8, 32), bits=4)
    assert CODEC.why_not(target_of("linear"), state) is None
    assert CODEC.why_not(target_of("expert"), state) is None
    assert "Conv1D" in CODEC.why_not(target_of("conv1d"), state)
    assert "a convolution" in CODEC.why_not(target_of("conv2d"), state)
    affine = quantized(torch.randn(8, 32), bits=4, symmetric=False)
    assert "zero points" in CODEC.why_not(target_of("linear"), affine)
    rows = LayerState(state.weight, grid=fit_rows(state.weight)[0])
    assert "equal steps" in CODEC.why_not(target_of("linear"), rows)


def test_tensors_that_do_not_fit_are_refused():
    state = quantized(torch.randn(8, 64), bits=3, group_size=16)
    scheme = CODEC.scheme(state)
    packed, scale = (CODEC.encode(state)[name] for name in ("weight_packed", "weight_scale"))
    for change, reason in [
        ({"weight_scale": None}, "'pack-quantized' has the tensors"),
        ({"input_scale": scale[0]}, "has the tensors"),
        ({"weight_packed": packed.float()}, "int32 matrix"),
        ({"weight_packed": packed[:, 1:]}, "are not a layer of"),
        ({"weight_shape": torch.tensor([8, 65])}, "are not a layer of|do not fit"),
        ({"weight_shape": torch.tensor([9, 64])}, "are not a layer of"),
        ({"weight_shape": torch.tensor([[8, 64]])}, "two int64"),
        ({"weight_shape": torch.tensor([8, -64])}, "are not a layer of"),
        ({"weight_scale": scale[:, :3]}, "do not fit"),
        ({"weight_scale": scale * 0}, "finite and positive"),
        ({"weight_scale": scale * float("nan")}, "finite and positive"),
        ({"weight_scale": scale.int()}, "finite and positive"),
    ]:
        tensors = CODEC.encode(state) | change
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(ArtifactError, match=reason):
            CODEC.decode(present, scheme)


def test_bytes_that_do_not_fit_are_refused():
    state = rounded(quantized(torch.randn(8, 64), bits=4, group_size=16), TOKEN["int8"])
    floats = on_float8(torch.randn(8, 64), InputGrid("fp8", torch.tensor([0.1])))
    nan = torch.full((8, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for one, change, reason in [
        (state, {"weight": torch.full((8, 64), 8, dtype=torch.int8)}, "does not fit into 4 bits"),
        (state, {"weight": torch.zeros(8, 64)}, "must be a matrix of torch.int8"),
        (state, {"input_scale": torch.tensor([0.1])}, "has the tensors"),
        (floats, {"weight": nan}, "is NaN"),
        (floats, {"weight": torch.zeros(8, 64, dtype=torch.int8)}, "must be a matrix of"),
        (floats, {"weight_scale": torch.ones(8, 2)}, "do not fit"),
        (floats, {"input_scale": torch.tensor([0.1, 0.1])}, "must be one number"),
        (floats, {"input_scale": torch.tensor([0.0])}, "finite and positive"),
        (floats, {"input_scale": torch.tensor([1])}, "finite and positive"),
    ]:
        with pytest.raises(ArtifactError, match=reason):
            CODEC.decode(CODEC.encode(one) | change, CODEC.scheme(one))


def test_a_refusal_of_inputs_says_what_to_type(target_of):
    weight = torch.randn(8, 32)
    four = quantized(weight, bits=4)
    for state, kind, words in [
        (LayerState(weight, inputs=TOKEN["int8"]), "linear", "add a stage such as rtn(bits=8, "),
        (rounded(four, TOKEN["fp8"]), "linear", "use activations:8"),
        (on_float8(weight, TOKEN["int8"]), "linear", "use activations:fp8"),
        (rounded(four, TOKEN["int8"]), "expert", "rounds no inputs of a layer of the kind"),
    ]:
        assert words in CODEC.why_not(target_of(kind), state)


PRESETS = {
    "W8A8": quantized(torch.ones(4, 128), bits=8),
    "W4A8": quantized(torch.ones(4, 256), bits=4, group_size=128),
    "FP8_DYNAMIC": on_float8(torch.ones(4, 128)),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_schemes_are_those_that_llm_compressor_writes(preset):
    theirs = preset_name_to_scheme(preset, ["Linear"])
    inputs = TOKEN["fp8" if preset.startswith("FP8") else "int8"]
    scheme = Scheme.of(rounded(PRESETS[preset], inputs))
    ours = scheme.weights(), scheme.input_activations()
    for mine, other in zip(ours, (theirs.weights, theirs.input_activations), strict=True):
        for field in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
            assert getattr(mine, field) == getattr(other, field), (preset, field)
    for inputs_ in (None, inputs):
        alone = Scheme.of(rounded(PRESETS[preset], inputs_))
        library = QuantizationScheme(
            targets=["Linear"],
            weights=alone.weights(),
            input_activations=alone.input_activations(),
        )
        assert infer_module_format(torch.nn.Linear, library).value == alone.format
        assert Scheme.read(library) == alone


def group(**changes):
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group"}
    return {"targets": ["Linear"], "weights": weights | changes}


EIGHT = {"num_bits": 8, "strategy": "token", "dynamic": True}


def config(**groups):
    return {"quantization_config": {"config_groups": groups}}


def test_a_config_says_which_scheme_a_layer_has():
    experts = group(num_bits=2) | {"targets": [r"re:.*\.experts\.\d+\..*"]}
    named = group(num_bits=8) | {"targets": ["model.q", "model.k"]}
    several = config(a=experts, b=group(), c=named)
    for names, bits in [(["model.k"], 8), (["model.o"], 4), (["x", "a.experts.3.w1"], 2)]:
        assert Scheme(**CODEC.scheme_in(several, names)) == Scheme(bits, 32)
    rows = config(a=group(strategy="channel", group_size=None))
    assert Scheme(**CODEC.scheme_in(rows, ["x"])) == Scheme(4, -1)
    rounding = config(a=group() | {"input_activations": EIGHT})
    assert Scheme(**CODEC.scheme_in(rounding, ["x"])).inputs == "int8 per token"


def test_a_config_that_is_not_ours_is_refused():
    for entry in [
        {},
        {"config_groups": 3},
        {"config_groups": {}},
        {"config_groups": {"a": ["Linear"]}},
        {"config_groups": {"a": {"targets": ["Linear"]}}},
        {"config_groups": {"a": group() | {"targets": ["re:(a+)+$"]}}},
        {"config_groups": {"a": group(num_bits=16)}},
        {"config_groups": {"a": group(symmetric=False)}},
        {"config_groups": {"a": group(type="float", num_bits=8)}},
        {"config_groups": {"a": group(strategy="tensor", group_size=None)}},
        {"config_groups": {"a": group(actorder="group")}},
        {"config_groups": {"a": group() | {"input_activations": {"num_bits": 4}}}},
        {"config_groups": {"a": group() | {"input_activations": {**EIGHT, "symmetric": False}}}},
        {"config_groups": {"a": group() | {"output_activations": EIGHT}}},
    ]:
        with pytest.raises(ArtifactError):
            CODEC.scheme_in({"quantization_config": entry}, ["a" * 40])
