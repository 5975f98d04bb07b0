"""A value comes back bit for bit, and nothing that is not ours comes back at all."""

import contextlib
import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_order.backends import Backend
from optimum_order.engine import snapshot
from optimum_order.engine.recipe import available, method
from optimum_order.errors import ArtifactError
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.packed import Packed
from optimum_order.layers.state import LayerState, StageRecord
from optimum_order.layers.statistics import AbsMax, Gram, Statistics
from optimum_order.order import Order

ORDERS = [
    "magnitude:0.5",
    "wanda(pattern=2:4)",
    "sparsegpt:0.5",
    "alps:0.5",
    "rtn:2",
    "rtn(bits=4, group_size=16, symmetric=false)",
    "rtn:q4_k",
    "gptq(bits=3, act_order=true)",
    "bitsandbytes:nf4",
    "bitsandbytes(dtype=fp4, double_quant=true)",
    "bitsandbytes:int8",
    "wanda:0.5 > gptq:4",
    "wanda:0.5 > ecsq:4",
    "gptq:fp8 > activations(bits=fp8, per=tensor)",
    "activations:8",
    "bitsandbytes:nf4 > magnitude:0.3",
    "rtn:4 > sparsegpt(sparsity=0.5, off_grid=true)",
    "wanda:0.5 > rtn:4 > eora:4",
]


def equal(one, other) -> bool:
    """Return whether two values are the same in type and bits; a list and a tuple are alike."""
    if isinstance(one, torch.Tensor):
        same = (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
        )
        return same and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(map(equal, one, other))
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(
            equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    return one == other


def state(order: str) -> LayerState:
    """A layer after an order."""
    generator = torch.Generator().manual_seed(0)
    layer = LayerState(torch.randn(32, 64, generator=generator))
    statistics = Statistics.of(torch.randn(128, 64, generator=generator), [Gram, AbsMax])
    original = layer.weight
    for stage in Order.parse(order):
        if method(stage).reads_original:
            layer = dataclasses.replace(layer, original=original)
        layer = method(stage).apply(layer, statistics)
    return layer


def test_a_layer_comes_back_bit_for_bit(tmp_path):
    for order in ORDERS:
        before = state(order)
        written = snapshot.save(before, tmp_path / "one.safetensors")
        assert written == (tmp_path / "one.safetensors").stat().st_size
        after = snapshot.load(tmp_path / "one.safetensors")
        assert equal(before, after), order
        after.check("a layer that was read")  # what was computed on first use is computed again
        assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_superblocks_come_back_with_all_their_scales(tmp_path):
    W = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).half()
    for order in ("rtn:q4_k", "rtn(bits=q2_k, zero=true)", "rtn:q3_k"):
        before = method(Order.parse(order)[0]).apply(LayerState(W))
        small = Packed.of(before).reduced(only_masked=False)
        assert small.weight.dtype in (torch.int8, torch.uint8), "codes take the place of values"
        snapshot.save(small, tmp_path / "one.safetensors")
        after = snapshot.load(tmp_path / "one.safetensors").state()
        assert equal(before, after), order
        after.check("a layer that was read")


def test_every_backend_is_among_them():
    tried = {stage.method for order in ORDERS for stage in Order.parse(order)}
    assert {name for name, cls in available().items() if issubclass(cls, Backend)} <= tried


def test_sixteen_bit_weights_keep_their_dtype(tmp_path):
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = method(Order.parse("rtn:4")[0]).apply(LayerState(W))
    snapshot.save(before, tmp_path / "one.safetensors")
    after = snapshot.load(tmp_path / "one.safetensors")
    assert after.weight.dtype == torch.bfloat16 and torch.equal(after.weight, before.weight)
    assert after.grid.dtype == torch.bfloat16 and torch.equal(after.grid.scale, before.grid.scale)


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text()
)
tensors = st.builds(lambda shape: torch.rand(shape), st.lists(st.integers(0, 3), max_size=3))
records = st.builds(
    StageRecord, st.text(), st.floats(0, 1), st.sampled_from(["outputs", "weights"])
)
values = st.recursive(
    plain | tensors | records | st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values)
def test_any_value_comes_back(tmp_path, value):
    snapshot.save(value, tmp_path / "one.safetensors")
    assert equal(value, snapshot.load(tmp_path / "one.safetensors"))


def test_a_dict_that_looks_like_a_mark_is_still_a_dict(tmp_path):
    value = {"class": "LayerState", "fields": {"tensor": "0"}, "dtype": "float32"}
    snapshot.save(value, tmp_path / "one.safetensors")
    assert snapshot.load(tmp_path / "one.safetensors") == value


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A snapshot of a layer as bytes."""
    file = tmp_path_factory.mktemp("whole") / "one.safetensors"
    snapshot.save(
        {"states": {"layer": state("wanda:0.5 > gptq:4")}, "records": {"layer": []}}, file
    )
    return file.read_bytes()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_is_refused(whole, tmp_path, part):
    (tmp_path / "cut.safetensors").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ArtifactError, match="damaged or no snapshot"):
        snapshot.load(tmp_path / "cut.safetensors")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_change_anywhere_is_refused(whole, tmp_path, data):
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    at = data.draw(st.integers(0, end - 1) | st.integers(end, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "bad.safetensors").write_bytes(changed)
    try:
        value = snapshot.load(tmp_path / "bad.safetensors")
    except ArtifactError:
        return
    (tmp_path / "good.safetensors").write_bytes(whole)
    assert equal(value, snapshot.load(tmp_path / "good.safetensors"))  # a space of the header, say


def described(file, content) -> None:
    """A file whose header describes this content and has one tensor, "0"; its digest is right."""
    tensors, text = {"0": torch.zeros(2)}, json.dumps(content)
    save_file(tensors, file, metadata={"snapshot": text, "sha256": snapshot._digest(text, tensors)})


@pytest.mark.parametrize(
    "content",
    [
        {"class": "Path", "fields": {}},
        {"class": "os.system", "fields": {}},
        {"class": "Backend", "fields": {}},
        {"class": "LayerState", "fields": {"weight": {"tensor": "0"}, "more": 1}},
        {"class": "LayerState", "fields": []},
        {"tensor": "1"},
        {"tensor": {"tensor": "0"}},
        {"dtype": "load"},
        {"neither": 1},
        {},
    ],
)
def test_an_unknown_class_or_mark_is_refused(content, tmp_path):
    described(tmp_path / "other.safetensors", content)
    with pytest.raises(ArtifactError, match="Delete it") as refused:
        snapshot.load(tmp_path / "other.safetensors")
    assert "sha256" not in str(refused.value)


leaves = plain | st.sampled_from(
    [{"tensor": "0"}, {"tensor": "1"}, {"dtype": "bfloat16"}, {"dtype": ["load"]}]
)
names = (
    st.sampled_from(
        ["tensor", "dtype", "dict", "class", "fields", "weight", "pruned", "grid", "scale"]
    )
    | st.text()
)
objects = st.fixed_dictionaries(
    {
        "class": st.sampled_from(sorted(snapshot._classes())) | leaves,
        "fields": st.dictionaries(names, leaves, max_size=4),
    }
)
contents = st.recursive(
    leaves | objects,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents)
def test_any_description_is_refused_or_made(tmp_path, content):
    described(tmp_path / "other.safetensors", content)
    with contextlib.suppress(ArtifactError):
        snapshot.load(tmp_path / "other.safetensors")


def test_nesting_without_end_is_refused(tmp_path):
    text = "[" * 100_000 + "]" * 100_000
    digest = snapshot._digest(text, {"0": torch.zeros(2)})
    save_file(
        {"0": torch.zeros(2)},
        tmp_path / "deep.safetensors",
        metadata={"snapshot": text, "sha256": digest},
    )
    with pytest.raises(ArtifactError, match="recursion"):
        snapshot.load(tmp_path / "deep.safetensors")


def test_a_missing_or_other_file_is_refused(tmp_path):
    save_file({"0": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("missing", "other", "text"):
        with pytest.raises(ArtifactError):
            snapshot.load(tmp_path / f"{name}.safetensors")


def test_only_one_class_has_each_name():
    classes = snapshot._classes()
    assert {"LayerState", "StageRecord", "UniformGrid"} <= set(classes)
    grids = [grid for grid in snapshot._grids(Grid) if grid.__module__.startswith("optimum_order.")]
    assert [grid for grid in grids if classes[grid.__name__] is not grid] == []


def test_an_unwritable_folder_leaves_nothing(tmp_path):
    (tmp_path / "one.safetensors").mkdir()  # in the way of the rename
    with pytest.raises(OSError):
        snapshot.save({"a": 1}, tmp_path / "one.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_the_file_is_plain_safetensors(whole, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(whole)
    with safe_open(tmp_path / "one.safetensors", "pt") as opened:
        assert set(opened.metadata()) == {"snapshot", "sha256"}
