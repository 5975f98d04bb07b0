"""Packing there and back, bit for bit, and against the library that will unpack it."""

import itertools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats.compressed_tensors import CompressedTensors
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
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


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        for bits, (size, groups), dtype in itertools.product(
            range(2, 9), [(-1, 33), (16, 64)], DTYPES
        ):
            weight = torch.randn(5, groups).to(dtype)
            yield quantized(weight, weight > 0.5, bits=bits, group_size=size)

    def refused(self):
        weight = torch.randn(8, 32)
        yield quantized(weight, bits=4, symmetric=False)
        grid, codes = fit_rows(weight)
        yield LayerState(grid.dequantize(codes), grid=grid)


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
    packed, scale, _ = (CODEC.encode(state)[name] for name in CODEC.tensors)
    for change, reason in [
        ({"weight_scale": None}, "has the tensors"),
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


def group(**changes):
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group"}
    return {"targets": ["Linear"], "weights": weights | changes}


def config(**groups):
    return {"quantization_config": {"config_groups": groups}}


def test_a_config_says_which_scheme_a_layer_has():
    experts = group(num_bits=2) | {"targets": [r"re:.*\.experts\.\d+\..*"]}
    named = group(num_bits=8) | {"targets": ["model.q", "model.k"]}
    several = config(a=experts, b=group(), c=named)
    for names, bits in [(["model.k"], 8), (["model.o"], 4), (["x", "a.experts.3.w1"], 2)]:
        assert CODEC.scheme_in(several, names) == {"num_bits": bits, "group_size": 32}
    rows = config(a=group(strategy="channel", group_size=None))
    assert CODEC.scheme_in(rows, ["x"]) == {"num_bits": 4, "group_size": -1}


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
    ]:
        with pytest.raises(ArtifactError):
            CODEC.scheme_in({"quantization_config": entry}, ["a" * 40])
