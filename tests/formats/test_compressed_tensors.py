"""Packing there and back, bit for bit, and against the library that will unpack it."""

import dataclasses

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimum_order.errors import ArtifactError
from optimum_order.formats.compressed_tensors import CompressedTensors
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target

FORMAT = CompressedTensors()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def states(draw):
    """Layers of any width, grouping, dtype and mask, with whole groups and rows pruned."""
    rows, size, groups = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, size * groups, generator=generator) * draw(
        st.sampled_from([1e-6, 0.02, 1.0, 300.0])
    )
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    pruned = torch.rand(weight.shape, generator=generator) < draw(
        st.sampled_from([0.0, 0.5, 0.95, 1.0])
    )
    before, clip = draw(st.booleans()), draw(st.sampled_from(["none", "mse"]))
    if before:
        weight = weight.masked_fill(pruned, 0.0)
    group_size = draw(st.sampled_from([-1, size]))
    grid = UniformGrid.fit(weight, bits=draw(st.integers(2, 8)), group_size=group_size, clip=clip)
    return LayerState(grid.nearest(weight).masked_fill(pruned, 0.0), pruned=pruned, grid=grid)


@settings(max_examples=200, deadline=None)
@given(states())
def test_decoding_gives_back_what_was_encoded(state):
    state.check("drawn")
    decoded = FORMAT.decode(FORMAT.encode(state), FORMAT.scheme(state))
    assert decoded.weight.dtype == state.weight.dtype
    assert torch.equal(
        decoded.weight.view(torch.uint8), state.weight.view(torch.uint8)
    )  # bits: -0.0 is not 0.0
    assert (
        torch.equal(decoded.grid.scale, state.grid.scale)
        and decoded.grid.scale.dtype == state.grid.scale.dtype
    )
    assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
    assert decoded.grid.zero_point is None and decoded.pruned is None


@settings(max_examples=50, deadline=None)
@given(states())
def test_the_library_unpacks_the_same_values(state):
    size = state.grid.group_size
    weights = QuantizationArgs(
        num_bits=state.grid.bits,
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    unpacked = PackedQuantizationCompressor.decompress(FORMAT.encode(state), scheme)["weight"]
    assert torch.equal(unpacked, state.weight) and unpacked.dtype == state.weight.dtype


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_their_bits_and_no_more(bits):
    weight = torch.randn(16, 96)
    grid = UniformGrid.fit(weight, bits=bits, group_size=32)
    encoded = FORMAT.encode(LayerState(grid.nearest(weight), grid=grid))
    assert encoded["weight_packed"].nbytes * 8 == weight.numel() * bits
    assert encoded["weight_scale"].shape == (16, 3)


def test_what_cannot_be_held_says_why():
    weight = torch.randn(8, 32)
    grid = UniformGrid.fit(weight, bits=4)
    linear = Target("x", "linear", nn.ParameterDict({"weight": weight}))
    conv1d = Target("x", "conv1d", nn.ParameterDict({"weight": weight.T}), transposed=True)
    state = LayerState(grid.nearest(weight), grid=grid)
    assert FORMAT.why_not(linear, state) is None
    assert FORMAT.why_not(conv1d, LayerState(weight)) is None  # it is stored dense
    assert "Conv1D" in FORMAT.why_not(conv1d, state)
    affine = UniformGrid.fit(weight, bits=4, symmetric=False)
    assert "zero points" in FORMAT.why_not(linear, dataclasses.replace(state, grid=affine))
    assert "equal steps" in FORMAT.why_not(
        linear, dataclasses.replace(state, grid=fit_rows(weight)[0])
    )


@pytest.fixture
def packed():
    weight = torch.randn(8, 64)
    grid = UniformGrid.fit(weight, bits=3, group_size=16)
    state = LayerState(grid.nearest(weight), grid=grid)
    return FORMAT.encode(state), FORMAT.scheme(state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("weight_scale"), "has the tensors"),
        (lambda t: t.update(weight_packed=t["weight_packed"].float()), "int32 matrix"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]), "are not a layer of"),
        (lambda t: t.update(weight_shape=torch.tensor([8, 65])), "are not a layer of|do not fit"),
        (lambda t: t.update(weight_shape=torch.tensor([9, 64])), "are not a layer of"),
        (lambda t: t.update(weight_shape=torch.tensor([[8, 64]])), "two int64"),
        (lambda t: t.update(weight_shape=torch.tensor([8, -64])), "are not a layer of"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, :3]), "do not fit"),
        (lambda t: t["weight_scale"].zero_(), "finite and positive"),
        (lambda t: t["weight_scale"].fill_(float("nan")), "finite and positive"),
        (lambda t: t.update(weight_scale=t["weight_scale"].int()), "finite and positive"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(packed, change, reason):
    tensors, scheme = packed
    change(tensors)
    with pytest.raises(ArtifactError, match=reason):
        FORMAT.decode(tensors, scheme)


def group(**changes):
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"} | changes,
    }


def test_a_config_says_which_scheme_a_layer_has():
    experts = group(num_bits=2) | {"targets": [r"re:.*\.experts\.\d+\..*"]}
    config = {
        "quantization_config": {
            "config_groups": {"a": experts, "b": group(), "c": group(num_bits=8)}
        }
    }
    config["quantization_config"]["config_groups"]["c"]["targets"] = ["model.q", "model.k"]
    found = [
        FORMAT.scheme_in(config, names)
        for names in (["model.k"], ["model.o"], ["x", "a.experts.3.w1"])
    ]
    assert found == [{"num_bits": bits, "group_size": 32} for bits in (8, 4, 2)]
    assert FORMAT.scheme_in(
        {
            "quantization_config": {
                "config_groups": {"a": group(strategy="channel", group_size=None)}
            }
        },
        ["x"],
    ) == {
        "num_bits": 4,
        "group_size": -1,
    }


@pytest.mark.parametrize(
    "entry",
    [
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
    ],
)
def test_a_config_that_is_not_ours_is_refused(entry):
    with pytest.raises(ArtifactError):
        FORMAT.scheme_in({"quantization_config": entry}, ["a" * 40])
