"""Masks and survivors there and back, bit for bit, in as many bytes as theory says, whatever a file claims."""

import contextlib
import dataclasses
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimum_order.errors import ArtifactError
from optimum_order.formats import choose
from optimum_order.formats import sparse as module
from optimum_order.formats.base import Layout
from optimum_order.formats.sparse import Sparse, decode_weight
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target, find_targets

FORMAT = Sparse()
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
    """A layer pruned first and then, if there is a grid, quantised."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    if not grid:
        return LayerState(weight, pruned=pruned)
    fitted = UniformGrid.fit(weight, **grid)
    weight = fitted.nearest(weight)
    return LayerState(
        weight if pruned is None else weight.masked_fill(pruned, 0.0), pruned=pruned, grid=fitted
    )


@st.composite
def states(draw):
    """Any layer: values or codes of any width, any mask or N:M or none, rows and groups pruned as a whole."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, m = draw(st.sampled_from(PATTERNS))
    masking = draw(st.sampled_from(["none", "nothing", "random", "n:m", "all"]))
    size = m if masking == "n:m" else draw(st.integers(1, 40))
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    shape = rows, size * groups
    weight = torch.randn(shape, generator=generator) * draw(
        st.sampled_from([1e-6, 0.02, 1.0, 300.0])
    )
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
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    return layer(
        weight, pruned, bits=bits, symmetric=symmetric, group_size=draw(st.sampled_from([-1, size]))
    )


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def stored_bits(state):
    """What theory says a layer takes, in bits, scales and zero points included."""
    weights, survivors = state.weight.numel(), int((~state.mask).sum())
    bits = survivors * state.bits + (weights if survivors < weights else 0)
    if state.grid is not None:
        bits += state.grid.scale.nbytes * 8 + (
            0 if state.grid.symmetric else state.grid.scale.numel() * 8
        )
    return bits


@settings(max_examples=400, deadline=None)
@given(states(), st.sampled_from([1, 64, 2**18]))
def test_decoding_gives_back_what_was_encoded(state, chunk):
    state.check("drawn")
    whole, module._CHUNK = module._CHUNK, chunk  # decoded a row or so at a time
    try:
        encoded = FORMAT.encode(state)
        decoded = FORMAT.decode(encoded, FORMAT.scheme(state))
        assert torch.equal(bits_of(decode_weight(encoded["weight"])), bits_of(decoded.weight))
    finally:
        module._CHUNK = whole
    assert decoded.weight.dtype == state.weight.dtype
    assert torch.equal(bits_of(decoded.weight), bits_of(state.weight))  # bits: -0.0 is not 0.0
    assert torch.equal(decoded.mask, state.mask)
    if state.grid is None:
        assert decoded.grid is None
    else:
        assert (
            torch.equal(decoded.grid.scale, state.grid.scale)
            and decoded.grid.scale.dtype == state.grid.scale.dtype
        )
        assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
        assert (decoded.grid.zero_point is None) == state.grid.symmetric
        assert state.grid.symmetric or torch.equal(decoded.grid.zero_point, state.grid.zero_point)
    decoded.check("decoded")
    assert encoded["weight"].ndim == 1 and encoded["weight"].dtype == torch.uint8
    assert encoded["weight"].nbytes <= 28 + math.ceil(stored_bits(state) / 8) + 2


@pytest.mark.parametrize("shape", [(256, 256), (768, 3072), (512, 2048)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, None])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.95])
def test_bytes_are_within_two_percent_of_theory(shape, bits, sparsity):
    torch.manual_seed(0)
    grid = {} if bits is None else {"bits": bits, "group_size": 128}
    state = layer(torch.randn(shape).bfloat16(), torch.rand(shape) < sparsity, **grid)
    scales = 0 if bits is None else 16 / 128
    theory = 1 + (1 - state.sparsity) * (bits or 16) + scales
    found = (
        8 * sum(tensor.nbytes for tensor in FORMAT.encode(state).values()) / state.weight.numel()
    )
    assert 0.98 * theory <= found <= 1.02 * theory


@pytest.mark.parametrize(
    ("n", "m", "index"),
    [
        (2, 4, 3 / 4),
        (1, 4, 2 / 4),
        (4, 8, 7 / 8),
        (8, 16, 14 / 16),
        (1, 2, 1 / 2),
        (2, 64, 11 / 64),
        (3, 64, 1 / 4),
    ],
)
@pytest.mark.parametrize("bits", [4, None])
def test_n_of_m_takes_an_index_where_that_is_smaller(n, m, index, bits):
    state = layer(
        torch.randn(256, 512).half(), n_of_m((256, 512), n, m), **({"bits": bits} if bits else {})
    )
    theory = index + n / m * (bits or 16) + (16 / 512 if bits else 0)
    encoded = FORMAT.encode(state)
    assert 8 * encoded["weight"].nbytes / state.weight.numel() == pytest.approx(theory, rel=0.02)
    assert torch.equal(FORMAT.decode(encoded, {}).mask, state.mask)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_masks_are_numbered_in_the_order_of_the_integers_whose_bits_they_are(n, m):
    count = min(math.comb(m, n), 2**16)
    masks = module._masks(np.arange(count), n, m)
    integers = [sum(1 << int(bit) for bit in np.flatnonzero(mask)) for mask in masks]
    assert integers == sorted(set(integers)) and set(masks.sum(1)) == {n}
    assert integers[0] == 2**n - 1 and (
        count < math.comb(m, n) or integers[-1] == (2**n - 1) << (m - n)
    )
    assert np.array_equal(module._numbers(masks), np.arange(count))


def test_a_small_layer_does_not_take_the_memory_of_a_table_of_masks():
    encoded = FORMAT.encode(layer(torch.randn(8, 64), n_of_m((8, 64), 3, 64)))
    assert encoded["weight"][4:7].tolist() == [2, 3, 64]  # an index
    tracemalloc.start()
    try:
        decode_weight(encoded["weight"])
        peak = tracemalloc.get_traced_memory()[1]  # numpy's memory is in there
    finally:
        tracemalloc.stop()
    assert peak < 2**17


def test_a_pattern_that_is_not_kept_everywhere_takes_a_bitmask():
    pruned = n_of_m((64, 256), 2, 4)
    pruned[63, 255] = ~pruned[63, 255]
    state = layer(torch.randn(64, 256).half(), pruned)
    assert 8 * FORMAT.encode(state)["weight"].nbytes == 8 * 28 + 64 * 256 + 16 * int(
        (~pruned).sum()
    )


def test_survivors_whose_code_is_zero_are_no_less_survivors():
    state = layer(torch.randn(64, 256), torch.rand(64, 256) < 0.5, bits=2)
    decoded = FORMAT.decode(FORMAT.encode(state), {})
    assert int((state.weight == 0).sum()) > 1.2 * int(state.pruned.sum())
    assert torch.equal(decoded.pruned, state.pruned)


def test_a_quantised_layer_that_nothing_was_pruned_of_has_no_mask():
    state = layer(torch.randn(64, 256), bits=4, group_size=64)
    assert FORMAT.encode(state)["weight"].nbytes == 28 + 64 * 256 // 2 + 64 * 4 * 4
    assert FORMAT.decode(FORMAT.encode(state), {}).pruned is None


@pytest.mark.parametrize("grid", [{"bits": 4}, {}])
def test_zeros_are_left_out_of_a_layer_whose_mask_is_not_known_but_not_called_pruned(grid):
    known = layer(torch.randn(64, 256), torch.rand(64, 256) < 0.5, **grid)
    unknown = dataclasses.replace(known, pruned=None)
    assert FORMAT.encodes(unknown)
    encoded = FORMAT.encode(unknown)
    assert encoded["weight"].nbytes <= FORMAT.encode(known)["weight"].nbytes
    decoded = FORMAT.decode(encoded, {})
    assert decoded.pruned is None and torch.equal(decoded.weight, known.weight)


def test_what_is_neither_pruned_nor_quantised_stays_dense():
    weight = torch.randn(8, 32)
    assert not FORMAT.encodes(LayerState(weight))
    assert not FORMAT.encodes(LayerState(weight, pruned=torch.zeros(8, 32, dtype=torch.bool)))
    assert FORMAT.encodes(layer(weight, bits=8))
    assert FORMAT.encodes(layer(weight, weight > 2))


def test_what_cannot_be_held_says_why(make_model, make_image_model):
    weight = torch.randn(8, 32)
    target = Target("x", "linear", nn.ParameterDict({"weight": weight}))
    assert FORMAT.why_not(target, layer(weight, bits=4, symmetric=False)) is None
    grid, codes = fit_rows(weight)
    assert "RowGrid is not a grid of equal steps" in FORMAT.why_not(
        target, LayerState(grid.dequantize(codes), grid=grid)
    )
    assert "torch.float64; they must be" in FORMAT.why_not(target, LayerState(weight.double()))
    assert "it has 1048577 inputs" in FORMAT.why_not(target, LayerState(torch.empty(1, 2**20 + 1)))
    for model, pattern, reason in [
        (make_model("llama"), "q_proj", None),
        (make_model("gpt2"), "c_proj", None),
        (make_model("mixtral"), "experts", None),
        (make_image_model("resnet"), "convolution", None),
        (
            make_model("gpt_oss"),
            "experts",
            "experts.gate_up_proj.0' is not stored in tensors of its own",
        ),
        (make_image_model("regnet"), "weight.", "weight.0' is not stored in tensors of its own"),
    ]:
        targets = [target for target in find_targets(model) if pattern in target.name]
        layers = {
            target.name: (target, LayerState(target.read(), target.read() > 0))
            for target in targets
        }
        found = FORMAT.why_not_model(Layout.of(model), layers)
        assert (found is None) if reason is None else (reason in found)
        assert "No layer is pruned or quantised" in FORMAT.why_not_model(Layout.of(model), {})


def test_auto_never_takes_what_needs_this_package_to_load(make_model):
    model = make_model("llama")
    layers = {
        target.name: (target, layer(target.read(), torch.rand(target.view.shape) < 0.9, bits=8))
        for target in find_targets(model)
        if "proj" in target.name
    }
    assert choose(model, layers, "sparse").name == "sparse"
    assert choose(model, layers).name == "compressed-tensors"


HEADER = struct.Struct("<8B3IQ")
FIELDS = module._Header._fields


def payload(kind):
    """The bytes of a small layer of 8 x 64, as something that can be changed."""
    torch.manual_seed(0)
    weight, random, two = torch.randn(8, 64), torch.rand(8, 64) < 0.5, n_of_m((8, 64), 2, 4)
    states = {
        "bitmask": layer(weight, random, bits=4, group_size=16),
        "index": layer(weight, two, bits=3, symmetric=False),
        "values": layer(weight.half(), random),
        "dense": layer(weight, bits=5),
    }
    return bytearray(FORMAT.encode(states[kind])["weight"].numpy().tobytes())


def decode(data):
    return FORMAT.decode({"weight": torch.tensor(list(data), dtype=torch.uint8)}, {})


def header(data, **changes):
    fields = dict(zip(FIELDS, HEADER.unpack(data[: HEADER.size]), strict=True)) | changes
    data[: HEADER.size] = HEADER.pack(*fields.values())


@pytest.mark.parametrize("kind", ["bitmask", "index", "values", "dense"])
@pytest.mark.parametrize(
    ("changes", "reason"),
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
        ({"rows": 9}, r"has \d+ bytes, got \d+"),
        ({"rows": 2**32 - 1}, r"has \d+ bytes, got \d+"),
        (
            {"rows": 2**31, "inputs": 2**20, "bits": 0, "affine": 0, "group_size": 0},
            r"has \d+ bytes, got \d+",
        ),
        ({"inputs": 2**21, "bits": 0, "affine": 0, "group_size": 0}, "no layer has the header"),
    ],
)
def test_headers_of_no_layer_are_refused(kind, changes, reason):
    data = payload(kind)
    header(data, **changes)
    with pytest.raises(ArtifactError, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["bitmask", "index", "values", "dense"])
def test_too_few_and_too_many_bytes_are_refused(kind):
    data = payload(kind)
    assert decode(data).weight.shape == (8, 64)
    for cut in range(len(data)):
        with pytest.raises(ArtifactError, match=r"bytes, got|uint8, got"):
            decode(data[:cut])
    with pytest.raises(ArtifactError, match="bytes, got"):
        decode(data + b"\0")


def test_a_mask_that_does_not_match_the_codes_is_refused():
    data = payload("bitmask")
    mask = HEADER.size + 8 * 4 * 4
    for byte in range(mask, mask + 64):
        for bit in range(8):
            changed = bytearray(data)
            changed[byte] ^= 1 << bit
            with pytest.raises(
                ArtifactError, match=r"its mask keeps \d+ weights, and \d+ are stored"
            ):
                decode(changed)


def test_an_index_outside_its_table_is_refused():
    data = payload("index")
    data[HEADER.size + 8 * 4 + 8] |= 0b111  # of 2:4 there are six
    with pytest.raises(ArtifactError, match="there are 6 masks of 2:4, got number 7"):
        decode(data)


@pytest.mark.parametrize(("rows", "inputs"), [(3, 5), (1, 1)])
def test_bits_that_nobody_reads_are_zero(rows, inputs):
    data = bytearray(
        FORMAT.encode(layer(torch.ones(rows, inputs), bits=3))["weight"].numpy().tobytes()
    )
    data[-1] |= 0x80
    with pytest.raises(ArtifactError, match="must be zero"):
        decode(data)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused(value):
    data = payload("bitmask")
    data[HEADER.size : HEADER.size + 4] = struct.pack("<f", value)
    with pytest.raises(ArtifactError, match="finite and positive"):
        decode(data)


def test_zero_points_out_of_range_are_refused():
    data = payload("index")
    data[HEADER.size + 8 * 4] = 8  # of three bits
    with pytest.raises(ArtifactError, match="zero points of 3 bits must be below 8, got 8"):
        decode(data)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight_scale": torch.ones(3)},
        {"weight": torch.zeros(40, dtype=torch.uint8), "weight_scale": torch.ones(3)},
        {"weight": torch.zeros(40)},
        {"weight": torch.zeros(40, dtype=torch.int8)},
        {"weight": torch.zeros(2, 40, dtype=torch.uint8)},
        {"weight": torch.zeros(0, dtype=torch.uint8)},
        {"weight": torch.zeros(27, dtype=torch.uint8)},
    ],
)
def test_tensors_of_no_layer_are_refused(tensors):
    with pytest.raises(ArtifactError):
        FORMAT.decode(tensors, {})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["bitmask", "index", "values", "dense"]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_are_refused_or_make_another_layer_of_that_size(kind, changes):
    data = payload(kind)
    for at, byte in changes:
        data[at % len(data)] = byte
    try:
        decoded = decode(data)
    except ArtifactError:
        return
    assert (
        decoded.weight.numel() <= 8 * 64 * 8
    )  # a bit of mask at least for each weight, but for a few in an index


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_layer(data):
    with contextlib.suppress(ArtifactError):
        assert decode(data).weight.ndim == 2


def peak_and_present():
    """Resident memory of this process since it was last told to forget its peak, and now, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS")]


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak of a function"
)
@pytest.mark.parametrize("what", ["bitmask", "index", "values"])
def test_decoding_takes_little_more_memory_than_its_result(what):
    torch.manual_seed(0)
    shape = 4096, 4096
    pruned = n_of_m(shape, 2, 4) if what == "index" else torch.rand(shape) < 0.5
    encoded = FORMAT.encode(
        layer(torch.randn(shape).bfloat16(), pruned, **({} if what == "values" else {"bits": 4}))
    )
    del pruned
    decode_weight(encoded["weight"])  # what is imported and cached on the way
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_and_present()[1]
    weight = decode_weight(encoded["weight"])
    assert peak_and_present()[0] - before <= 1.3 * weight.nbytes
