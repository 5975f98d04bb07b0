"""Masks and survivors there and back, bit for bit, in as many bytes as theory says."""

import contextlib
import dataclasses
import itertools
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.errors import ArtifactError
from optimum_order.formats import Contents, Layers, choose, outline
from optimum_order.formats import sparse as module
from optimum_order.formats.layout import Layout
from optimum_order.formats.sparse import Sparse, decode_weight
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_targets
from optimum_order.testing import CodecContract, same_bits

CODEC = Sparse()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [
    (1, 2),
    (2, 4),
    (1, 4),
    (3, 4),
    (4, 8),
    (3, 9),
    (8, 16),
    (16, 32),
    (2, 64),
    (3, 64),
    (61, 64),
]


def n_of_m(shape, n, m, generator=None):
    """A random mask that removes all but n of every m."""
    order = torch.rand(*shape[:-1], shape[-1] // m, m, generator=generator).argsort(-1)
    return (order >= n).reshape(shape)


def layer(weight, pruned=None, **grid):
    """A layer pruned first and then, if there is a grid, quantized."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    if not grid:
        return LayerState(weight, pruned=pruned)
    fitted = UniformGrid.fit(weight, **grid)
    weight = fitted.nearest(weight)
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    return LayerState(weight, pruned=pruned, grid=fitted)


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        grids = [{}, {"bits": 2}, {"bits": 3, "group_size": 16, "symmetric": False}, {"bits": 8}]
        for grid, dtype in itertools.product(grids, DTYPES):
            weight = torch.randn(5, 128).to(dtype)
            yield layer(weight, torch.rand(5, 128) < 0.5, **grid)
            yield layer(weight, n_of_m((5, 128), 2, 4), **grid)
            zeros = dataclasses.replace(layer(weight, weight < 1, **grid), pruned=None)
            yield zeros
            if grid:
                yield layer(weight, **grid)

    def refused(self):
        weight = torch.randn(8, 32)
        grid, codes = fit_rows(weight)
        yield LayerState(grid.dequantize(codes), grid=grid)
        yield LayerState(weight.double())
        yield LayerState(torch.empty(1, 2**20 + 1))


@st.composite
def states(draw):
    """Any layer: values or codes of any width, any mask or N:M or none, rows and groups pruned."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, m = draw(st.sampled_from(PATTERNS))
    masking = draw(st.sampled_from(["none", "nothing", "random", "n:m", "all"]))
    size = m if masking == "n:m" else draw(st.integers(1, 40))
    rows = draw(st.integers(1, 9))
    shape = rows, size * draw(st.integers(1, 4))
    spread = draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    weight = torch.randn(shape, generator=generator) * spread
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    weight[torch.rand(shape, generator=generator) < 0.05] = draw(st.sampled_from([0.0, -0.0, 1.0]))
    pruned = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if masking == "n:m":
        pruned = n_of_m(shape, n, m, generator)
    elif masking != "random":
        pruned = None if masking == "none" else torch.full(shape, masking == "all")
    if masking == "random" and draw(st.booleans()):
        pruned[draw(st.integers(0, rows - 1))] = True
        pruned[:, :size] |= draw(st.booleans())
    if draw(st.booleans()):
        return layer(weight, pruned)
    return layer(
        weight,
        pruned,
        bits=draw(st.integers(2, 8)),
        symmetric=draw(st.booleans()),
        group_size=draw(st.sampled_from([-1, size])),
    )


def stored_bits(state):
    """What theory says a layer takes, in bits, scales and zero points included."""
    weights = state.weight.numel()
    survivors = int((~state.mask).sum())
    bits = survivors * state.bits + (weights if survivors < weights else 0)
    if state.grid is not None:
        bits += state.grid.scale.nbytes * 8
        bits += 0 if state.grid.symmetric else state.grid.scale.numel() * 8
    return bits


@settings(max_examples=200, deadline=None)
@given(states(), st.sampled_from([1, 64, 2**18]))
def test_any_layer_comes_back_as_it_was(state, chunk):
    state.check("drawn")
    default = module._CHUNK
    module._CHUNK = chunk  # decoded a row or so at a time
    try:
        encoded = CODEC.encode(state)
        decoded = CODEC.decode(encoded, CODEC.scheme(state))
        assert same_bits(decode_weight(encoded["weight"]), decoded.weight)
    finally:
        module._CHUNK = default
    assert same_bits(decoded.weight, state.weight)
    assert torch.equal(decoded.mask, state.mask)
    if state.grid is None:
        assert decoded.grid is None
    else:
        assert same_bits(decoded.grid.scale, state.grid.scale)
        assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
        assert (decoded.grid.zero_point is None) == state.grid.symmetric
        assert state.grid.symmetric or torch.equal(decoded.grid.zero_point, state.grid.zero_point)
    decoded.check("decoded")
    assert encoded["weight"].ndim == 1 and encoded["weight"].dtype == torch.uint8
    assert encoded["weight"].nbytes <= 28 + math.ceil(stored_bits(state) / 8) + 2
    assert encoded["weight"].nbytes <= CODEC.size(outline(state)).bytes


def test_bytes_are_within_two_percent_of_theory():
    for shape, bits, sparsity in itertools.product(
        [(256, 256), (768, 3072), (512, 2048)], [2, 3, 4, 8, None], [0.3, 0.5, 0.7, 0.95]
    ):
        grid = {} if bits is None else {"bits": bits, "group_size": 128}
        state = layer(torch.randn(shape).bfloat16(), torch.rand(shape) < sparsity, **grid)
        scales = 0 if bits is None else 16 / 128
        theory = 1 + (1 - state.sparsity) * (bits or 16) + scales
        size = 8 * CODEC.encode(state)["weight"].nbytes / state.weight.numel()
        assert size == pytest.approx(theory, rel=0.02), (shape, bits, sparsity)


def test_n_of_m_takes_an_index_where_that_is_smaller():
    for (n, m, index), bits in itertools.product(
        [
            (2, 4, 3 / 4),
            (1, 4, 2 / 4),
            (4, 8, 7 / 8),
            (8, 16, 14 / 16),
            (1, 2, 1 / 2),
            (2, 64, 11 / 64),
            (3, 64, 1 / 4),
        ],
        [4, None],
    ):
        grid = {"bits": bits} if bits else {}
        state = layer(torch.randn(256, 512).half(), n_of_m((256, 512), n, m), **grid)
        theory = index + n / m * (bits or 16) + (16 / 512 if bits else 0)
        encoded = CODEC.encode(state)
        size = 8 * encoded["weight"].nbytes / state.weight.numel()
        assert size == pytest.approx(theory, rel=0.02), (n, m, bits)
        assert torch.equal(CODEC.decode(encoded, {}).mask, state.mask)


def test_masks_are_numbered_in_the_order_of_the_integers_whose_bits_they_are():
    for n, m in PATTERNS:
        count = min(math.comb(m, n), 2**16)
        masks = module._masks(np.arange(count), n, m)
        powers = np.array([1 << bit for bit in range(m)], dtype=object)
        integers = (masks * powers).sum(1).tolist()
        assert integers == sorted(set(integers)) and set(masks.sum(1)) == {n}
        assert integers[0] == 2**n - 1
        assert count < math.comb(m, n) or integers[-1] == (2**n - 1) << (m - n)
        assert np.array_equal(module._numbers(masks), np.arange(count))


def test_a_small_layer_does_not_take_the_memory_of_a_table_of_masks():
    encoded = CODEC.encode(layer(torch.randn(8, 64), n_of_m((8, 64), 3, 64)))
    assert encoded["weight"][4:7].tolist() == [2, 3, 64]  # an index
    tracemalloc.start()
    try:
        decode_weight(encoded["weight"])
        peak = tracemalloc.get_traced_memory()[1]  # includes the memory of numpy
    finally:
        tracemalloc.stop()
    assert peak < 2**17


def test_a_pattern_that_is_not_kept_everywhere_takes_a_bitmask():
    pruned = n_of_m((64, 256), 2, 4)
    pruned[63, 255] = ~pruned[63, 255]
    encoded = CODEC.encode(layer(torch.randn(64, 256).half(), pruned))
    assert 8 * encoded["weight"].nbytes == 8 * 28 + 64 * 256 + 16 * int((~pruned).sum())


def test_survivors_whose_code_is_zero_are_no_less_survivors():
    state = layer(torch.randn(64, 256), torch.rand(64, 256) < 0.5, bits=2)
    decoded = CODEC.decode(CODEC.encode(state), {})
    assert int((state.weight == 0).sum()) > 1.2 * int(state.pruned.sum())
    assert torch.equal(decoded.pruned, state.pruned)


def test_a_quantized_layer_that_was_not_pruned_has_no_mask():
    state = layer(torch.randn(64, 256), bits=4, group_size=64)
    assert CODEC.encode(state)["weight"].nbytes == 28 + 64 * 256 // 2 + 64 * 4 * 4
    assert CODEC.decode(CODEC.encode(state), {}).pruned is None


def test_zeros_are_left_out_where_the_mask_is_unknown_and_are_not_called_pruned():
    for grid in ({"bits": 4}, {}):
        pruned = layer(torch.randn(64, 256), torch.rand(64, 256) < 0.5, **grid)
        unknown = dataclasses.replace(pruned, pruned=None)
        assert CODEC.encodes(unknown)
        encoded = CODEC.encode(unknown)
        assert encoded["weight"].nbytes <= CODEC.encode(pruned)["weight"].nbytes
        decoded = CODEC.decode(encoded, {})
        assert decoded.pruned is None and torch.equal(decoded.weight, pruned.weight)


def test_what_is_neither_pruned_nor_quantized_stays_dense():
    weight = torch.randn(8, 32)
    assert not CODEC.encodes(LayerState(weight))
    assert not CODEC.encodes(LayerState(weight, pruned=torch.zeros(8, 32, dtype=torch.bool)))
    for state in (layer(weight, bits=8), layer(weight, weight > 2)):
        assert CODEC.encodes(state) and CODEC.encodes(outline(state))


def test_a_layer_that_cannot_be_held_says_why(target_of):
    weight = torch.randn(8, 32)
    grid, codes = fit_rows(weight)
    for state, reason in [
        (LayerState(grid.dequantize(codes), grid=grid), "RowGrid is not a grid of equal steps"),
        (LayerState(weight.double()), "torch.float64; they must be"),
        (LayerState(torch.empty(1, 2**20 + 1)), "it has 1048577 inputs"),
    ]:
        assert reason in CODEC.why_not(target_of("linear"), state)
    affine = layer(weight, bits=4, symmetric=False)
    assert CODEC.why_not(target_of("linear"), affine) is None


def test_a_model_that_cannot_be_held_says_why(make_model, make_image_model):
    alone = "is not stored in tensors of its own"
    for model, pattern, reason in [
        (make_model("llama"), "q_proj", None),
        (make_model("gpt2"), "c_proj", None),
        (make_model("mixtral"), "experts", None),
        (make_image_model("resnet"), "convolution", None),
        (make_model("gpt_oss"), "experts", f"experts.gate_up_proj.0' {alone}"),
        (make_image_model("regnet"), "weight.", f"weight.0' {alone}"),
    ]:
        targets = {t.name: t for t in find_targets(model) if pattern in t.name}
        states = {name: LayerState(t.read(), t.read() > 0) for name, t in targets.items()}
        refusal = CODEC.why_not_model(Layout.of(model), Layers(targets, states))
        assert refusal is None if reason is None else reason in refusal
        empty = CODEC.why_not_model(Layout.of(model), Layers(targets, {}))
        assert "No layer is pruned or quantized" in empty


def test_auto_never_takes_what_needs_this_package_to_load(make_model):
    model = make_model("llama")
    targets = {target.name: target for target in find_targets(model) if "proj" in target.name}
    states = {
        name: layer(target.read(), torch.rand(target.view.shape) < 0.9, bits=8)
        for name, target in targets.items()
    }
    contents = Contents(model, Layers(targets, states))
    assert choose(contents, "sparse").name == "sparse"
    assert choose(contents).name == "compressed-tensors"


# Damaged bytes

HEADER = struct.Struct("<8B3IQ")
FIELDS = module._Header._fields


def payloads():
    """The bytes of small layers of 8 x 64, as something that can be changed."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    random = torch.rand(8, 64) < 0.5
    states = {
        "bitmask": layer(weight, random, bits=4, group_size=16),
        "index": layer(weight, n_of_m((8, 64), 2, 4), bits=3, symmetric=False),
        "values": layer(weight.half(), random),
        "dense": layer(weight, bits=5),
    }
    return {
        kind: bytearray(CODEC.encode(state)["weight"].numpy().tobytes())
        for kind, state in states.items()
    }


PAYLOADS = payloads()


def decode(data):
    return CODEC.decode({"weight": torch.tensor(list(data), dtype=torch.uint8)}, {})


def with_header(kind, **changes):
    data = bytearray(PAYLOADS[kind])
    fields = dict(zip(FIELDS, HEADER.unpack(data[: HEADER.size]), strict=True)) | changes
    data[: HEADER.size] = HEADER.pack(*fields.values())
    return data


def test_headers_of_no_layer_are_refused():
    plain = {"bits": 0, "affine": 0, "group_size": 0}
    size = r"has \d+ bytes, got \d+"
    for (changes, reason), kind in itertools.product(
        [
            ({"version": 2}, "version 2 .* upgrade"),
            ({"precision": 3}, "no layer has the header"),
            ({"bits": 1}, "no layer has the header"),
            ({"bits": 9}, "no layer has the header"),
            ({"affine": 2}, "no layer has the header"),
            ({"mask": 4}, "no layer has the header"),
            ({"mask": 2, "n": 4, "m": 4}, "no layer has the header"),
            ({"mask": 2, "n": 16, "m": 32}, "no layer has the header"),
            ({"mask": 2, "n": 0, "m": 4}, "no layer has the header"),
            ({"mask": 2, "n": 1, "m": 3}, "no layer has the header"),
            ({"mask": 1, "n": 1, "m": 4}, "no layer has the header"),
            ({"reserved": 1}, "no layer has the header"),
            ({"rows": 0}, "no layer has the header"),
            ({"inputs": 0}, "no layer has the header"),
            ({"bits": 4, "group_size": 0}, "no layer has the header"),
            ({"bits": 4, "group_size": 24}, "no layer has the header"),
            ({"bits": 0, "group_size": 64}, "no layer has the header"),
            ({"rows": 9}, size),
            ({"rows": 2**32 - 1}, size),
            ({"rows": 2**31, "inputs": 2**20} | plain, size),
            ({"inputs": 2**21} | plain, "no layer has the header"),
        ],
        PAYLOADS,
    ):
        with pytest.raises(ArtifactError, match=reason):
            decode(with_header(kind, **changes))


def test_too_few_and_too_many_bytes_are_refused():
    for data in PAYLOADS.values():
        assert decode(data).weight.shape == (8, 64)
        for cut in range(len(data)):
            with pytest.raises(ArtifactError, match=r"bytes, got|uint8, got"):
                decode(data[:cut])
        with pytest.raises(ArtifactError, match="bytes, got"):
            decode(data + b"\0")


def test_a_mask_that_does_not_match_the_codes_is_refused():
    mask = HEADER.size + 8 * 4 * 4
    for byte in range(mask, mask + 64):
        for bit in range(8):
            changed = bytearray(PAYLOADS["bitmask"])
            changed[byte] ^= 1 << bit
            with pytest.raises(ArtifactError, match=r"mask keeps \d+ weights, and \d+ are stored"):
                decode(changed)


def test_an_index_outside_its_table_is_refused():
    data = bytearray(PAYLOADS["index"])
    data[HEADER.size + 8 * 4 + 8] |= 0b111  # of 2:4 there are six
    with pytest.raises(ArtifactError, match="there are 6 masks of 2:4, got number 7"):
        decode(data)


def test_bits_that_nobody_reads_are_zero():
    for shape in [(3, 5), (1, 1)]:
        state = layer(torch.ones(shape), bits=3)
        data = bytearray(CODEC.encode(state)["weight"].numpy().tobytes())
        data[-1] |= 0x80
        with pytest.raises(ArtifactError, match="must be zero"):
            decode(data)


def test_scales_that_are_not_finite_and_positive_are_refused():
    for value in [0.0, -1.0, float("nan"), float("inf")]:
        data = bytearray(PAYLOADS["bitmask"])
        data[HEADER.size : HEADER.size + 4] = struct.pack("<f", value)
        with pytest.raises(ArtifactError, match="finite and positive"):
            decode(data)


def test_zero_points_out_of_range_are_refused():
    data = bytearray(PAYLOADS["index"])
    data[HEADER.size + 8 * 4] = 8  # of three bits
    with pytest.raises(ArtifactError, match="zero points of 3 bits must be below 8, got 8"):
        decode(data)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(PAYLOADS)),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_are_refused_or_make_another_layer_of_that_size(kind, changes):
    data = bytearray(PAYLOADS[kind])
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(ArtifactError):
        # a bit of mask at least for each weight, but for a few in an index
        assert decode(data).weight.numel() <= 8 * 64 * 8


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_layer(data):
    with contextlib.suppress(ArtifactError):
        assert decode(data).weight.ndim == 2


def peak_and_present():
    """Resident memory of this process since its peak was last forgotten, and now, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS")]


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak of a function"
)
@pytest.mark.parametrize("kind", ["bitmask", "index", "values"])
def test_decoding_takes_little_more_memory_than_its_result(kind):
    shape = 4096, 4096
    pruned = n_of_m(shape, 2, 4) if kind == "index" else torch.rand(shape) < 0.5
    grid = {} if kind == "values" else {"bits": 4}
    encoded = CODEC.encode(layer(torch.randn(shape).bfloat16(), pruned, **grid))
    del pruned
    decode_weight(encoded["weight"])  # what is imported and cached on the way
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_and_present()[1]
    weight = decode_weight(encoded["weight"])
    assert peak_and_present()[0] - before <= 1.3 * weight.nbytes
