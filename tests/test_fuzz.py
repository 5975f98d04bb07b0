"""Whatever an artifact holds, reading it is one of our errors or correct, in twice its memory.

Every example damages a saved model in one place. Then the checksums are made right again, as
someone who forges an artifact would, so that the readers behind the checksums have to cope. All of
it runs with little memory to spare: models of a few kilobytes with what libraries need, and one
large enough to tell with exactly two times its files.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import re
import resource
import shutil
import struct
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from optimum_order import JointCompressor, formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError
from optimum_order.files import sha256
from optimum_order.formats.safetensors import Safetensors

CONTAINER = Safetensors()
FORMATS = {
    "dense": "magnitude:0.5",
    "compressed-tensors": "magnitude:0.5 > rtn(bits=3, group_size=16)",
    "bitsandbytes": "magnitude:0.5 > bitsandbytes(dtype=nf4, blocksize=32, double_quant=true)",
    "gptq": "magnitude:0.5 > rtn(bits=3, group_size=32)",
    "sparse": "magnitude(pattern=2:4) > rtn(bits=3, group_size=16)",
    "coded": "magnitude:0.5 > rtn(bits=3, group_size=16, symmetric=false)",
}
INDEX = "model.safetensors.index.json"
SPARE = 16 * 2**20
"""Bytes that reading may take: room for libraries, and far less than a lie would need."""

NUMBERS = [-1, 0, 1, 2, 3, 31, 33, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64, 10**400, 0.5, 64.0]
DTYPES = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16"]
DTYPES += ["I32", "U32", "F32", "C64", "F64", "I64", "U64", "F4"]
PATHS = [
    "",
    "x",
    "..",
    "../model.safetensors",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "n" * 5000,
    "model.safetensors",
]
WORDS = [*DTYPES, *FORMATS, "float32", "float8", "Linear", "re:(a+)+$"]
NAMES = st.sampled_from(WORDS) | st.sampled_from(PATHS)
LEAVES = st.none() | st.booleans() | st.sampled_from(NUMBERS) | NAMES
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(NAMES, LEAVES, max_size=2)
RANDOM = st.randoms(use_true_random=False)
FUZZED = settings(
    max_examples=20, deadline=timedelta(seconds=10), suppress_health_check=list(HealthCheck)
)


def saved_in_each_format(model, root, shard):
    """An artifact in each format, of several shards if it is larger than one may be."""
    source = root / "source"
    model.to(torch.bfloat16).save_pretrained(source)
    compressor = JointCompressor.from_pretrained(source)
    made = {}
    for name, order in FORMATS.items():
        compressed = compressor.compress(order, progress=False)
        contents = dataclasses.replace(compressed._contents(), processor=None)
        codec = formats.choose(contents, name)
        facts = compressed._facts() | {"metrics": {}}
        artifact.save(contents, facts, root / name, codec=codec, max_shard_size=shard)
        assert verify(root / name) == []
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def artifacts(make_model, tmp_path_factory):
    model = make_model("llama", intermediate_size=64, num_key_value_heads=4)
    made = saved_in_each_format(model, tmp_path_factory.mktemp("fuzz"), "8KB")
    assert all((folder / INDEX).exists() for folder in made.values())
    return made


@pytest.fixture(scope="module", autouse=True)
def imported_objects_are_not_collected_again(artifacts):
    """Collecting garbage takes a second with all that is imported, and a moment without."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def larger(make_model, tmp_path_factory):
    """Artifacts of 56 layers, each small beside the files: reading goes layer by layer."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
    }
    made = saved_in_each_format(
        make_model("llama", **sizes), tmp_path_factory.mktemp("larger"), "1MB"
    )
    assert all((folder / INDEX).exists() for folder in made.values())
    return made


@contextlib.contextmanager
def at_most(spare):
    """Let everybody fail who takes more memory than this: torch, numpy, safetensors or Python.

    Mapped files count too. Everything of 64 kB or more gets pages of its own, which are counted and
    given back, so that nothing hides in memory that was taken and freed before.
    """
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + spare
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


_MMAP_THRESHOLD = -3


def survives(made: Path, changes: dict[str, bytes], spare: int = SPARE):
    """Read an artifact some of whose files were changed; what is not refused must be right.

    Args:
        made: The artifact.
        changes: New contents of its files.
        spare: Memory that reading may take.
    """
    folder = made.with_name(f"{made.name}-changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    for name, content in changes.items():
        (folder / name).write_bytes(content)
    with at_most(spare):
        check(made, folder, changes)


def check(made: Path, folder: Path, changes: dict[str, bytes]):
    untouched = all((made / name).read_bytes() == content for name, content in changes.items())
    assert untouched or manifest.FILE in changes or verify(folder)
    try:
        facts = manifest.load(folder)
    except ArtifactError:
        facts = None
    if facts is not None:
        for name in set(changes) & set(facts["files"]):
            facts["files"][name] = {"sha256": sha256(folder / name), "bytes": len(changes[name])}
        manifest.write(facts, folder)
        read_or_refused(folder, facts["layers"])
        problems = verify(folder)
        assert all(isinstance(problem, str) for problem in problems)
        if not problems:
            stated = json.loads((made / manifest.FILE).read_text())["layers"]
            stored = {
                name: layer["stored"] for name, layer in stated.items() if name in facts["layers"]
            }
            for name, state in CONTAINER.read(folder, stored):
                assert artifact.values_digest(state.weight) == stated[name]["digest"]
    read_or_refused(folder, None)


def read_or_refused(folder, layers):
    wanted = layers and {
        name: entry.get("stored") if isinstance(entry, dict) else entry
        for name, entry in layers.items()
    }
    with contextlib.suppress(ArtifactError):
        for _, state in CONTAINER.read(folder, wanted):
            assert state.weight.ndim == 2


def some_value(random):
    """One of `VALUES` by a generator of random numbers, for benchmarks/survival.py."""

    def leaf():
        return random.choice(
            [None, random.random() < 0.5, random.choice(NUMBERS), random.choice([*WORDS, *PATHS])]
        )

    return random.choice(
        [leaf(), [leaf() for _ in range(random.randrange(4))], {random.choice(WORDS): leaf()}]
    )


def some_place(value, random):
    """The path to something inside a JSON value, deep down as likely as on top."""
    path = []
    while value and isinstance(value, (dict, list)):
        key = random.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        path, value = [*path, key], value[key]
        if random.random() < 0.3:
            break
    return path


def at(value, path):
    for key in path:
        value = value[key]
    return value


def damaged(value, random, how, new):
    """A JSON value with one place in it changed, left out, renamed or copied to another."""
    path = some_place(value, random)
    if how == "copy":
        new = at(value, some_place(value, random))
    value = json.loads(json.dumps(value))
    parent, key = at(value, path[:-1]), path[-1]
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[str(new)[:5000]] = parent.pop(key)
    else:
        parent[key] = new
    return value


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


HOW = st.sampled_from(["set", "set", "drop", "copy", "rename"])
JSON = st.sampled_from(["config.json", manifest.FILE, INDEX])
RESHAPES = ["same", "flat", "scalar", "empty", "column", "cube", "transposed", "huge"]
every_format = pytest.mark.parametrize("format", FORMATS)


def some_shard(made, random):
    return random.choice(sorted(made.glob("*.safetensors")))


def value_in_json(made, file, random, how, new):
    content = json.loads((made / file).read_text())
    return {file: json.dumps(damaged(content, random, how, new)).encode()}


def value_in_header(made, random, how, new):
    file = some_shard(made, random)
    header, body = header_of(file.read_bytes())
    return {file.name: with_header(json.dumps(damaged(header, random, how, new)).encode(), body)}


@every_format
@FUZZED
@given(file=JSON, random=RANDOM, how=HOW, new=VALUES)
def test_any_value_in_json(artifacts, format, file, random, how, new):
    made = artifacts[format]
    survives(made, value_in_json(made, file, random, how, new))


@every_format
@FUZZED
@given(random=RANDOM, how=HOW, new=VALUES)
def test_any_value_in_the_header_of_a_shard(artifacts, format, random, how, new):
    made = artifacts[format]
    survives(made, value_in_header(made, random, how, new))


def changed_at(data, at, random, how):
    """Return bytes that are flipped, cut off, inserted or removed at a place."""
    if how == "flip":
        data[at] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = random.randbytes(random.randrange(1, 9))
    else:
        del data[at : at + random.randrange(1, 9)]
    return bytes(data)


@every_format
@FUZZED
@given(
    random=RANDOM,
    near_the_start=st.booleans(),
    how=st.sampled_from(["flip", "cut", "insert", "remove"]),
)
def test_any_byte_of_any_file(artifacts, format, random, near_the_start, how):
    made = artifacts[format]
    read = (file for file in made.iterdir() if not manifest.DOCUMENTS.fullmatch(file.name))
    file = random.choice(sorted(read))
    data = bytearray(file.read_bytes())
    at = random.randrange(min(len(data), 2000) if near_the_start else len(data))
    survives(made, {file.name: changed_at(data, at, random, how)})


def bytes_in_a_tensor(made, random):
    file = some_shard(made, random)
    header, body = header_of(file.read_bytes())
    key = random.choice([key for key in sorted(header) if key != "__metadata__"])
    begin, end = header[key]["data_offsets"]
    changed = bytearray(body)
    for at in random.choices(range(begin, min(end, begin + 32)), k=random.randrange(1, 5)):
        changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
    return {file.name: with_header(json.dumps(header).encode(), bytes(changed))}


@every_format
@FUZZED
@given(random=RANDOM)
def test_any_bytes_in_a_tensor_of_a_layer(artifacts, format, random):
    made = artifacts[format]
    survives(made, bytes_in_a_tensor(made, random))


def tensor_of_another_kind(made, random, dtype, reshape):
    """A header that safetensors itself accepts, because the sizes come out right."""
    file = some_shard(made, random)
    tensors = load(file.read_bytes())
    key = random.choice(sorted(tensors))
    metadata = header_of(file.read_bytes())[0]["__metadata__"]
    old = save({key: tensors.pop(key)})
    header, body = header_of(old)
    bits = (
        4 if dtype == "F4" else int(re.search(r"(\d+)(_|$)", "8" if dtype == "BOOL" else dtype)[1])
    )
    shape = header[key]["shape"]
    count = len(body) * 8 // bits
    shape = {
        "same": [*shape[:-1], count * shape[-1] // max(1, math.prod(shape))] if shape else [count],
        "flat": [count],
        "scalar": [],
        "empty": [0, 2**40],
        "column": [count, 1],
        "cube": [1, count, 1],
        "transposed": shape[::-1],
        "huge": [2**31, 2**31],
    }[reshape]
    size = math.prod(shape) * bits // 8
    rest, content = header_of(save(tensors) if tensors else struct.pack("<Q", 2) + b"{}")
    size = min(size, 2**20)
    rest[key] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [len(content), len(content) + size],
    }
    rest["__metadata__"] = metadata
    content += (body * (size // max(1, len(body)) + 1))[:size]
    return {file.name: with_header(json.dumps(rest).encode(), content)}


@every_format
@FUZZED
@given(random=RANDOM, dtype=st.sampled_from(DTYPES), reshape=st.sampled_from(RESHAPES))
def test_any_tensor_of_another_kind(artifacts, format, random, dtype, reshape):
    made = artifacts[format]
    survives(made, tensor_of_another_kind(made, random, dtype, reshape))


@every_format
@settings(FUZZED, max_examples=4, deadline=None)
@given(kind=st.sampled_from(["json", "header", "bytes", "tensor"]), random=RANDOM, data=st.data())
@pytest.mark.slow
def test_it_takes_no_more_memory_than_twice_the_files(larger, format, kind, random, data):
    made = larger[format]
    changes = {
        "json": lambda: value_in_json(
            made, data.draw(JSON), random, data.draw(HOW), data.draw(VALUES)
        ),
        "header": lambda: value_in_header(made, random, data.draw(HOW), data.draw(VALUES)),
        "bytes": lambda: bytes_in_a_tensor(made, random),
        "tensor": lambda: tensor_of_another_kind(
            made, random, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(RESHAPES))
        ),
    }[kind]()
    survives(made, changes, 2 * sum(file.stat().st_size for file in made.iterdir()))
