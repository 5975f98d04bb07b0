"""Quantized layers there and back, bit for bit, in about as many bytes as their entropy."""

import contextlib
import itertools
import logging
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimum_order import formats
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats import Contents, Layers, choose, entropy_coder, outline
from optimum_order.formats import coded as module
from optimum_order.formats.coded import Coded, decode_weight
from optimum_order.formats.sparse import Sparse
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_targets
from optimum_order.testing import CodecContract, same, same_bits

CODEC = Coded()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dual(weight, pruned=None, bits=4, step=0.5, seed=0, spread=2):
    """A layer on a dual-scale grid, whose columns have exponents of -spread to spread."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-spread, spread + 1, (weight.shape[1],), generator=generator)
    exponent = exponent.to(torch.int8)
    least, most = DualScaleGrid.scale_range(weight.dtype, bits, exponent)
    scale = (weight.float().square().mean(1, keepdim=True).sqrt() * step).clamp(least, most)
    grid = DualScaleGrid(bits, scale.to(weight.dtype).clamp(least, most), exponent)
    grid.check()
    return LayerState(grid.nearest(weight), pruned=pruned, grid=grid)


def uniform(weight, pruned=None, **options):
    """A layer on a uniform grid."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    grid = UniformGrid.fit(weight, **options)
    return LayerState(grid.nearest(weight), pruned=pruned, grid=grid)


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        for dtype in DTYPES:
            weight = torch.randn(5, 128).to(dtype)
            random = torch.rand(5, 128) < 0.5
            for pruned in (None, random, torch.zeros(5, 128).bool(), torch.ones(5, 128).bool()):
                for bits in (2, 4, 8):
                    yield dual(weight, pruned, bits)
                    yield uniform(weight, pruned, bits=bits)
                    yield uniform(weight, pruned, bits=bits, group_size=16, symmetric=False)

    def refused(self):
        weight = torch.randn(8, 32)
        grid, codes = fit_rows(weight)
        yield LayerState(grid.dequantize(codes), grid=grid)
        rows = DualScaleGrid(4, torch.ones(8, 1).double(), torch.zeros(32, dtype=torch.int8))
        yield LayerState(rows.nearest(weight), grid=rows)
        scales = torch.ones(1, 1, device="meta")
        wide = UniformGrid(4, scales, None, 2**20 + 1)
        yield LayerState(torch.empty(1, 2**20 + 1, device="meta"), grid=wide)
        scales = torch.ones(2, 2**23 + 1, device="meta")
        many = UniformGrid(4, scales, None, 2**23 + 1)
        yield LayerState(torch.empty(2, 2**23 + 1, device="meta"), grid=many)


@st.composite
def states(draw):
    """Any layer: every width, dtype, kind of grid and mask; zeros that are pruned or are not."""
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    size = draw(st.integers(1, 12))
    shape = draw(st.integers(1, 30)), size * draw(st.integers(1, 4))
    weight = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.02, 1.0, 300.0]))
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    masking = draw(st.sampled_from(["none", "nothing", "random", "all"]))
    pruned = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if masking != "random":
        pruned = None if masking == "none" else torch.full(shape, masking == "all")
    bits = draw(st.integers(2, 8))
    if draw(st.booleans()):
        return dual(weight, pruned, bits, draw(st.sampled_from([0.1, 0.5, 4.0])), seed)
    group_size = draw(st.sampled_from([-1, size]))
    symmetric = draw(st.booleans())
    return uniform(weight, pruned, bits=bits, symmetric=symmetric, group_size=group_size)


@settings(max_examples=200, deadline=None)
@given(states(), st.sampled_from([1, 64, 2**19]))
def test_any_layer_comes_back_as_it_was(state, band):
    state.check("drawn")
    default = entropy_coder._BAND
    entropy_coder._BAND = band
    try:
        encoded = CODEC.encode(state)
        assert encoded["weight"].nbytes <= CODEC.size(outline(state)).bytes
        decoded = CODEC.decode(encoded, CODEC.scheme(state))
        assert same_bits(decode_weight(encoded["weight"]), state.weight)
    finally:
        entropy_coder._BAND = default
    assert same_bits(decoded.weight, state.weight)
    assert torch.equal(decoded.mask, state.mask)
    assert (decoded.pruned is None) == (not state.mask.any())
    assert same(decoded.grid, state.grid)
    decoded.check("decoded")
    again = CODEC.encode(decoded)
    assert default != band or same_bits(again["weight"], encoded["weight"])


def test_a_power_that_float16_does_not_hold_is_no_less_exact():
    exponent = torch.tensor([0, 5, 20], dtype=torch.int8)
    least, most = DualScaleGrid.scale_range(torch.float16, 3, exponent)
    scale = torch.tensor([[least], [1e-2], [most]], dtype=torch.float64)
    grid = DualScaleGrid(3, scale.half().clamp(least, most), exponent)
    grid.check()
    codes = torch.tensor([[-4, 1, 3], [3, -1, -4], [2, 3, -3]], dtype=torch.int16)
    state = LayerState(grid.dequantize(codes), grid=grid)
    assert torch.isfinite(state.weight).all()
    assert same_bits(decode_weight(CODEC.encode(state)["weight"]), state.weight)


def kind_of(state):
    return module._Parts.of(CODEC.encode(state)["weight"]).header.mask


def test_a_mask_takes_as_little_as_can_be():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).bfloat16()
    pruned = torch.rand(256, 512, generator=generator) < 0.5
    plain = CODEC.encode(dual(weight))["weight"].nbytes
    assert kind_of(dual(weight)) == module._NONE

    none = torch.zeros_like(pruned)
    assert kind_of(dual(weight, none)) == module._NONE
    assert CODEC.encode(dual(weight, none))["weight"].nbytes == plain

    state = dual(weight)
    zeros = LayerState(state.weight, state.weight == 0, state.grid)
    assert kind_of(zeros) == module._ZEROS
    assert CODEC.encode(zeros)["weight"].nbytes == plain

    state = dual(weight, pruned)
    assert kind_of(state) == module._MARK
    unmarked = CODEC.encode(LayerState(state.weight, None, state.grid))["weight"].nbytes
    zero_bits = int((state.weight == 0).sum()) / 8
    assert CODEC.encode(state)["weight"].nbytes - unmarked < 0.8 * zero_bits


def test_where_every_code_occurs_the_mask_is_bits():
    generator = torch.Generator().manual_seed(0)
    scale = torch.full((64, 1), 0.5)
    grid = DualScaleGrid(8, scale, torch.zeros(64, dtype=torch.int8))
    codes = torch.randint(-128, 128, (64, 64), generator=generator, dtype=torch.int16)
    codes[:8] = 0
    pruned = (codes == 0) & (torch.rand(64, 64, generator=generator) < 0.3)
    state = LayerState(grid.dequantize(codes), pruned, grid)
    assert kind_of(state) == module._BITS
    decoded = CODEC.decode(CODEC.encode(state), {})
    assert torch.equal(decoded.pruned, pruned) and same_bits(decoded.weight, state.weight)

    data = bytearray(CODEC.encode(state)["weight"].numpy().tobytes())
    header = module._Header._make(HEADER.unpack(data[: HEADER.size]))
    begin = HEADER.size + header.scales + header.offsets
    data[begin + header.masks : begin + header.masks] = b"\0"
    with pytest.raises(ArtifactError, match="its mask must have .* bits"):
        decode(signed(data, masks=header.masks + 1))


def test_four_bits_take_less_than_packed_codes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator).bfloat16()
    for symmetric in (True, False):
        state = uniform(weight, bits=4, group_size=128, symmetric=symmetric)
        bytes_ = CODEC.encode(state)["weight"].nbytes
        assert bytes_ < 0.9 * Sparse().encode(state)["weight"].nbytes, symmetric


def test_bytes_are_within_three_percent_of_the_entropy():
    """Scales, exponents, tables and checksums included."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator).bfloat16()
    for step in (1.0, 0.5, 0.25):
        state = dual(weight, None, 6, step, spread=0)
        counts = np.unique(state.grid.quantize(state.weight).numpy(), return_counts=True)[1]
        entropy = -(counts * np.log2(counts / weight.numel())).sum()
        assert 8 * CODEC.encode(state)["weight"].nbytes < 1.03 * entropy, step


def test_what_is_not_quantized_stays_dense():
    weight = torch.randn(8, 32)
    assert not CODEC.encodes(LayerState(weight))
    assert not CODEC.encodes(LayerState(weight, weight > 0))
    assert CODEC.encodes(dual(weight)) and CODEC.encodes(outline(dual(weight)))
    with pytest.raises(FormatError, match="A grid of equal steps is needed, got NoneType"):
        CODEC.encode(LayerState(weight))


def test_a_layer_that_cannot_be_held_says_why(target_of):
    reasons = [
        "RowGrid is not a grid of equal steps",
        "torch.float64; they must be",
        "it has 1048577 inputs",
        "it has 16777218 scales, and may have 16777216",
    ]
    for state, reason in zip(TestContract().refused(), reasons, strict=True):
        assert reason in CODEC.why_not(target_of("linear"), state)


# Choosing and loading


def contents(model, make=dual, pattern="proj"):
    targets = {t.name: t for t in find_targets(model) if pattern in t.name}
    states = {name: make(target.read()) for name, target in targets.items()}
    for name, target in targets.items():
        target.write(states[name].weight)
    return Contents(model, Layers(targets, states))


def test_auto_takes_it_for_a_layer_on_a_dual_scale_grid_and_says_how_to_load(make_model, caplog):
    formats._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose(contents(make_model("llama"))).name == "coded"
    assert "'import optimum_order' before transformers loads it" in caplog.text


def test_auto_takes_it_for_no_other_layer(make_model, caplog):
    formats._say.cache_clear()
    four = contents(make_model("llama"), lambda weight: uniform(weight, bits=4))
    affine = contents(make_model("llama"), lambda weight: uniform(weight, bits=4, symmetric=False))
    with caplog.at_level(logging.WARNING):
        assert choose(four).name == "compressed-tensors"
        assert choose(affine).name == "dense"
        assert choose(four, "coded").name == "coded"
    assert "import optimum_order" not in caplog.text


def test_a_model_that_cannot_be_held_says_why(make_model):
    model = make_model("gpt_oss")
    assert "not stored in tensors of its own" in CODEC.why_not_model(
        contents(model, pattern="experts").layout, contents(model, pattern="experts").layers
    )
    empty = Layers({}, {})
    assert CODEC.why_not_model(contents(model).layout, empty) == "No layer is quantized."


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """A model with both kinds of grid, saved, with the folder."""
    folder = tmp_path_factory.mktemp("coded")
    model = make_model("llama").bfloat16()
    kinds = itertools.cycle([dual, lambda w: uniform(w, w.abs() < 0.01, bits=3, symmetric=False)])
    whole = contents(model, lambda weight: next(kinds)(weight))
    container = formats.container("coded")
    container.write(whole, choose(whole, "coded"), folder, header={}, max_shard_size="5GB")
    return whole, folder


def test_a_folder_holds_what_was_saved(saved):
    whole, folder = saved
    states = dict(formats.container("coded").read(folder, dict.fromkeys(whole.layers.states)))
    for name, state in whole.layers.states.items():
        assert same(states[name].grid, state.grid) and same_bits(states[name].weight, state.weight)
        assert torch.equal(states[name].mask, state.mask)


def test_transformers_loads_it_in_a_fresh_process(saved, tmp_path):
    whole, folder = saved
    code = """
import sys, torch, transformers
import optimum_order
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
"""
    file = tmp_path / "state.pt"
    subprocess.run([sys.executable, "-c", code, folder, file], check=True, capture_output=True)
    loaded = torch.load(file)
    expected = whole.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in expected.items())


def test_a_damaged_layer_does_not_load(saved, tmp_path):
    _, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][-1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# Damaged bytes

HEADER = struct.Struct("<5BbH5I")
FIELDS = module._Header._fields


def payloads():
    """The bytes of small layers of 8 x 64, as something that can be changed."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    random = torch.rand(8, 64) < 0.5
    layers = {
        "dual": dual(weight),
        "marked": dual(weight.half(), random, 3),
        "symmetric": uniform(weight.bfloat16(), bits=5, group_size=16),
        "affine": uniform(weight, random, bits=4, group_size=16, symmetric=False),
    }
    return {
        kind: bytearray(CODEC.encode(state)["weight"].numpy().tobytes())
        for kind, state in layers.items()
    }


PAYLOADS = payloads()


def decode(data):
    return CODEC.decode({"weight": torch.tensor(list(data), dtype=torch.uint8)}, {})


def signed(data, **changes):
    """The bytes with other fields in the header, and a checksum that is right."""
    fields = dict(zip(FIELDS, HEADER.unpack(data[: HEADER.size]), strict=True))
    fields |= changes | {"checksum": 0}
    end = HEADER.size + fields["scales"] + fields["offsets"] + fields["masks"]
    blank = HEADER.pack(*fields.values())
    fields["checksum"] = zlib.crc32(blank + bytes(data[HEADER.size : end]))
    return HEADER.pack(*fields.values()) + bytes(data[HEADER.size :])


def test_signing_is_what_the_codec_does():
    for data in PAYLOADS.values():
        assert signed(data) == data


def test_headers_of_no_layer_are_refused():
    none = "no layer has the header"
    for changes, reason in [
        ({"version": 2}, "version 2 .* upgrade"),
        ({"precision": 3}, none),
        ({"bits": 1}, none),
        ({"bits": 9}, none),
        ({"grid": 3}, none),
        ({"mask": 4}, none),
        ({"mask": 0, "mark": 1}, none),
        ({"mask": 2, "mark": 0}, none),
        ({"mask": 3, "mark": 0}, none),
        ({"reserved": 1}, none),
        ({"group_size": 0}, none),
        ({"group_size": 24}, "has groups of 24"),
        ({"group_size": 128}, "has groups of 128"),
        ({"scales": 2**32 - 1}, "a layer with this header has over"),
    ]:
        for kind, data in PAYLOADS.items():
            with pytest.raises(ArtifactError, match=reason):
                with contextlib.suppress(MemoryError):
                    decode(signed(data, **changes))
                    raise AssertionError(f"{kind}, {changes}")


def test_a_dual_scale_grid_has_groups_of_whole_rows():
    with pytest.raises(ArtifactError, match="has groups of 32"):
        decode(signed(PAYLOADS["dual"], group_size=32))


def test_codes_out_of_range_are_refused():
    for kind, bits in [("dual", 3), ("symmetric", 4), ("affine", 3)]:
        with pytest.raises(ArtifactError, match="out of range|zero points of 3 bits"):
            decode(signed(PAYLOADS[kind], bits=bits))
    zeros = entropy_coder.encode_numbers(np.full(32, 7, np.int8))
    with pytest.raises(ArtifactError, match="a code of 3 bits is out of range"):
        decode(signed(with_numbers("affine", None, zeros), bits=3))


def with_numbers(kind, scales=None, offsets=None):
    data = PAYLOADS[kind]
    header = module._Header._make(HEADER.unpack(data[: HEADER.size]))
    ends = [HEADER.size, HEADER.size + header.scales]
    ends.append(ends[1] + header.offsets)
    one = bytes(data[ends[0] : ends[1]]) if scales is None else scales
    other = bytes(data[ends[1] : ends[2]]) if offsets is None else offsets
    changed = bytes(data[: HEADER.size]) + one + other + bytes(data[ends[2] :])
    return signed(changed, scales=len(one), offsets=len(other))


def test_scales_and_offsets_that_no_grid_has_are_refused():
    for value in [0.0, -1.0, float("nan"), float("inf")]:
        scales = np.full(8, value, np.float32).view(np.uint32)
        with pytest.raises(ArtifactError, match="finite and positive"):
            decode(with_numbers("dual", entropy_coder.encode_numbers(scales)))
    tiny = np.full(8, 1e-40, np.float32).view(np.uint32)
    with pytest.raises(ArtifactError, match="its grid is none: With these exponents"):
        decode(with_numbers("dual", entropy_coder.encode_numbers(tiny)))
    exponents = np.full(64, -128, np.int8)
    with pytest.raises(ArtifactError, match="its grid is none: Exponents must be"):
        decode(with_numbers("dual", None, entropy_coder.encode_numbers(exponents)))
    zeros = np.full(32, 16, np.int8)
    with pytest.raises(ArtifactError, match="must be below 16, got 16"):
        decode(with_numbers("affine", None, entropy_coder.encode_numbers(zeros)))
    short = entropy_coder.encode_numbers(np.arange(7, dtype=np.uint32))
    with pytest.raises(ArtifactError):
        decode(with_numbers("dual", short))


def test_every_changed_byte_is_seen():
    for data in PAYLOADS.values():
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 0x41
            with pytest.raises(ArtifactError):
                decode(damaged)


def test_too_few_and_too_many_bytes_are_refused():
    for data in PAYLOADS.values():
        assert decode(data).weight.shape == (8, 64)
        for cut in range(len(data)):
            with pytest.raises(ArtifactError):
                decode(data[:cut])
        with pytest.raises(ArtifactError):
            decode(data + b"\0")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(PAYLOADS)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_with_right_checksums_are_refused_or_another_layer(kind, changes):
    data = bytearray(PAYLOADS[kind])
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(ArtifactError):
        assert decode(signed(data)).weight.numel() <= 64 * len(data)


@settings(max_examples=100, deadline=None)
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
def test_decoding_takes_little_more_memory_than_its_result():
    generator = torch.Generator().manual_seed(0)
    encoded = CODEC.encode(dual(torch.randn(4096, 4096, generator=generator).bfloat16()))
    decode_weight(encoded["weight"])  # what is imported and cached on the way
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_and_present()[1]
    weight = decode_weight(encoded["weight"])
    assert peak_and_present()[0] - before <= 1.3 * weight.nbytes
