"""A saved folder is whole or not there, and `verify` sees whatever is changed in it."""

import json
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, OutputError
from optimum_order.files import sha256

ORDER = "wanda(pattern=2:4) > rtn:4"
SHARDED = "magnitude:0.5 > rtn(bits=4, group_size=32)"
FORMATS = ("dense", "compressed-tensors", "gptq", "sparse")
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tiny_llama_folder, tmp_path_factory):
    ids = torch.randint(2, 300, (2, 16))
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=ids, sequence_length=16
    )
    folder = tmp_path_factory.mktemp("artifact") / "out"
    compressor.compress(ORDER, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, change, *, reseal=True):
    """Change the manifest; sealed again, so that only what it says is wrong and not its digest."""
    facts = json.loads((folder / manifest.FILE).read_text())
    change(facts)
    if reseal:
        manifest.write(facts, folder)
    else:
        (folder / manifest.FILE).write_text(json.dumps(facts))


def restate(folder, name):
    """Make the manifest agree with a file that was changed, to see what else is looked at."""
    stated = {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    edit(folder, lambda facts: facts["files"].update({name: stated}))


def rewrite(folder, change, metadata=None):
    """Change the weights and make the manifest agree with the new file."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata or header)
    restate(folder, file.name)


def test_an_untouched_artifact_verifies(saved):
    assert verify(saved) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_in_any_file_is_seen(saved, tmp_path, seed):
    draw = random.Random(seed)
    folder = shutil.copytree(saved, tmp_path / "copy")
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        assert verify(folder), file.name
        file.write_bytes(whole[: draw.randrange(len(whole))])
        assert verify(folder), file.name
        file.write_bytes(whole)
    assert verify(folder) == []


def test_truncated_missing_and_added_files_are_seen(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "bytes, the manifest says" in verify(copy)[0]
    weights.unlink()
    assert verify(copy) == ["model.safetensors is missing."]
    weights.mkdir()
    (copy / "extra.py").write_text("print('hello')")
    assert "extra.py is in the folder and not in the manifest." in verify(copy)


@pytest.mark.parametrize("place", ["manifest", "config", "header", "stages"])
def test_an_order_edited_in_any_one_place_is_seen(copy, place):
    other = "rtn:4 > wanda(pattern=2:4)"
    if place == "manifest":
        edit(copy, lambda facts: facts.update(order=other))
    elif place == "stages":
        edit(copy, lambda facts: facts["stages"].reverse())
    elif place == "header":
        rewrite(copy, lambda tensors: None, metadata={"optimum_order": other, "format": "pt"})
    else:
        config = json.loads((copy / "config.json").read_text())
        config["optimum_order"]["order"] = other
        (copy / "config.json").write_text(json.dumps(config))
        restate(copy, "config.json")
    assert any("order" in problem for problem in verify(copy))


@pytest.fixture(scope="module")
def all_sharded(make_model, tmp_path_factory):
    """The same layers in four formats, each in several files."""
    root = tmp_path_factory.mktemp("sharded")
    model = make_model("llama", intermediate_size=64, num_key_value_heads=4).to(torch.bfloat16)
    model.save_pretrained(root / "source")
    compressed = JointCompressor.from_pretrained(root / "source").compress(SHARDED, progress=False)
    contents = compressed._contents()
    facts = compressed._facts() | {"metrics": {}}
    for name in FORMATS:
        codec = formats.choose(contents, name)
        artifact.save(contents, facts, root / name, codec=codec, max_shard_size="8KB")
        assert verify(root / name) == [] and (root / name / INDEX).exists()
    return root


@pytest.fixture(params=FORMATS)
def sharded(all_sharded, tmp_path, request):
    return shutil.copytree(all_sharded / request.param, tmp_path / request.param)


@pytest.fixture
def copy_of(all_sharded, tmp_path):
    return lambda name: shutil.copytree(all_sharded / name, tmp_path / name)


def change_tensor(folder, key, change):
    """Change one tensor in place, and make the manifest agree with its file."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][key]
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors[key])
    save_file(tensors, file, metadata=header)
    restate(folder, file.name)


def test_swapped_shards_are_seen(sharded):
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert any(one.name in problem for problem in verify(sharded))
    restate(sharded, one.name)
    restate(sharded, other.name)
    assert "in another file than it is" in verify(sharded)[0]


def test_a_shard_with_other_weights_is_seen(copy_of):
    folder = copy_of("dense")
    change_tensor(folder, f"{LAYER}.weight", lambda weight: weight.copy_(weight.flip(0)))
    assert verify(folder) == [f"layer {LAYER} does not decode to the values that were measured."]


def test_an_order_edited_in_the_header_of_any_shard_is_seen(sharded):
    for file in sorted(sharded.glob("*.safetensors")):
        whole = file.read_bytes()
        save_file(load_file(file), file, metadata={"optimum_order": "rtn:4", "format": "pt"})
        restate(sharded, file.name)
        assert any("says the order is 'rtn:4'" in problem for problem in verify(sharded)), file.name
        file.write_bytes(whole)
        restate(sharded, file.name)
    assert verify(sharded) == []


def test_a_weight_off_its_grid_is_seen(copy_of):
    folder = copy_of("dense")

    def nudge(weight):
        weight.view(torch.int16)[3, torch.nonzero(weight[3])[0]] += 1  # to the next bfloat16

    change_tensor(folder, f"{LAYER}.weight", nudge)
    assert verify(folder) == [f"layer {LAYER} does not decode to the values that were measured."]


def test_a_mask_that_does_not_match_the_codes_is_seen(copy_of):
    folder = copy_of("sparse")
    (rows, inputs), scales = (64, 32), 2 * 64
    mask = slice(28 + scales, 28 + scales + rows * inputs // 8)  # after the header and the scales

    def more(payload):
        payload[mask][:4] = 0xFF

    def moved(payload):
        payload[mask].copy_(payload[mask].flip(0))

    change_tensor(folder, f"{LAYER}.weight", more)
    assert "its mask keeps" in verify(folder)[0]
    shutil.rmtree(folder)
    folder = copy_of("sparse")
    change_tensor(folder, f"{LAYER}.weight", moved)  # as many bits, elsewhere
    assert verify(folder) == [f"layer {LAYER} does not decode to the values that were measured."]
    shutil.rmtree(folder)
    folder = copy_of("sparse")
    edit(
        folder,
        lambda facts: facts["layers"][LAYER].update(pruned=facts["layers"][LAYER]["pruned"] - 1),
    )
    assert any(
        "has a mask of 1024 weights, the manifest says 1023" in problem
        for problem in verify(folder)
    )


def test_a_newer_schema_asks_for_an_upgrade(copy):
    edit(copy, lambda facts: facts.update(schema=manifest.SCHEMA + 1))
    assert len(verify(copy)) == 1 and "Upgrade it" in verify(copy)[0]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "nowhere.safetensors", "a\0b", "n" * 5000]
)
def test_an_index_that_points_out_of_the_folder_or_nowhere_is_seen(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][f"{LAYER}.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    restate(sharded, INDEX)
    assert any("not a .safetensors beside it" in p or "is missing" in p for p in verify(sharded))


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000, "nowhere/nothing", "./config.json"])
def test_file_names_that_no_system_takes_are_seen(copy, name):
    edit(copy, lambda facts: facts["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert verify(copy) == [f"{name} is missing."]


def test_a_header_that_declares_more_than_the_file_holds_is_seen(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = next(key for key in header if key != "__metadata__")
    for shape, end in (
        ([2**31, 2**31], None),
        ([2**20, 2**20], 2**41),
        ([2**62, 4], 0),
        ([-1, 5], None),
    ):
        lie = header | {key: header[key] | {"shape": shape}}
        if end is not None:
            lie[key] = lie[key] | {"data_offsets": [lie[key]["data_offsets"][0], end]}
        text = json.dumps(lie).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        restate(sharded, file.name)
        assert f"{file} cannot be read" in verify(sharded)[0]
    file.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    restate(sharded, file.name)
    assert f"{file} cannot be read" in verify(sharded)[0]


def test_layers_that_declare_more_than_their_bytes_hold_are_seen(copy_of):
    def huge(folder, key, change):
        change_tensor(folder, f"{LAYER}.{key}", change)
        return verify(folder)[0]

    def sparse_shape(payload):
        payload[8:16] = torch.tensor([0xFF] * 7 + [0x7F], dtype=torch.uint8)  # rows, inputs

    assert "has the header" in huge(copy_of("sparse"), "weight", sparse_shape)
    packed = copy_of("compressed-tensors")
    assert "are not a layer of" in huge(packed, "weight_shape", lambda shape: shape.fill_(2**40))
    gptq = copy_of("gptq")
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"]["bits"] = 2
    (gptq / "config.json").write_text(json.dumps(config))
    restate(gptq, "config.json")
    assert "do not fit a layer" in verify(gptq)[0]


def test_a_code_that_was_changed_is_seen(copy):
    key = "model.layers.1.mlp.up_proj.weight_packed"
    rewrite(copy, lambda tensors: tensors[key][0].add_(1))
    assert verify(copy) == [
        "layer model.layers.1.mlp.up_proj does not decode to the values that were measured."
    ]


def test_fewer_zeros_than_pruned_weights_and_a_broken_pattern_are_seen(copy):
    name = "model.layers.0.self_attn.q_proj"
    edit(copy, lambda facts: facts["layers"][name].update(pruned=64 * 64))
    sparsity, zeros = verify(copy)
    assert "sparsity" in sparsity and "fewer than the 4096 weights said to be pruned" in zeros
    edit(copy, lambda facts: facts["layers"][name].update(pruned=64 * 32, pattern="1:4"))
    assert verify(copy) == [f"layer {name} does not keep the pattern 1:4."]


def test_a_stored_mask_that_is_not_the_one_said_is_seen(tiny_llama_folder, tmp_path):
    compressed = JointCompressor.from_pretrained(tiny_llama_folder).compress(
        "magnitude:0.5 > rtn:4", progress=False
    )
    compressed.save_pretrained(tmp_path / "out", format="sparse")
    assert verify(tmp_path / "out") == []
    name = "model.layers.0.self_attn.q_proj"
    copy = shutil.copytree(tmp_path / "out", tmp_path / "flipped")
    rewrite(
        copy, lambda tensors: tensors[f"{name}.weight"][-1500].bitwise_xor_(1)
    )  # half its codes are 1024 bytes
    assert "its mask keeps 20" in verify(copy)[0]
    edit(tmp_path / "out", lambda facts: facts["layers"][name].update(pruned=2047))
    assert f"layer {name} has a mask of 2048 weights, the manifest says 2047." in verify(
        tmp_path / "out"
    )


def test_wrong_bits_and_layers_that_are_not_there_are_seen(copy):
    name = "model.layers.0.self_attn.q_proj"
    edit(copy, lambda facts: facts["layers"][name].update(bits=3))
    assert verify(copy) == [f"layer {name} has 4 bits, the manifest says 3."]
    edit(
        copy,
        lambda facts: facts["layers"].update({"model.layers.9.mlp.up_proj": facts["layers"][name]}),
    )
    assert any("model.layers.9.mlp.up_proj" in problem for problem in verify(copy))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_names_that_lead_out_of_the_folder_are_seen(copy, name):
    edit(copy, lambda facts: facts["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert f"the manifest names a file it may not: {name!r}." in verify(copy)


@pytest.mark.parametrize("key", ["pruned", "shape", "bits", "group_size", "stored"])
def test_values_of_the_wrong_kind_are_seen_not_raised(copy, key):
    edit(copy, lambda facts: facts["layers"]["model.layers.0.self_attn.q_proj"].update({key: "x"}))
    assert verify(copy)


def test_rows_that_overlap_are_refused(copy):
    name = "model.layers.0.self_attn.q_proj"
    rows = {"rows": [["model.embed_tokens.weight", 0, 64]] * 1000, "transposed": False}
    edit(copy, lambda facts: facts["layers"][name].update(stored=rows))
    assert "rows cannot be read" in verify(copy)[0]


def test_no_manifest_is_a_difference_and_no_folder_an_error(copy, tmp_path):
    (copy / manifest.FILE).unlink()
    assert "not a folder that optimum-order wrote" in verify(copy)[0]
    with pytest.raises(ArtifactError, match="no folder"):
        verify(tmp_path / "nowhere")


def test_an_edited_manifest_is_seen(copy):
    edit(copy, lambda facts: facts.update(seed=7), reseal=False)
    assert "its digest does not match" in verify(copy)[0]


def test_staging_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), artifact.staging(tmp_path / "out", overwrite=False) as folder:
        (folder / "half").write_text("written")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_staging_replaces_only_when_it_ends_well(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(RuntimeError), artifact.staging(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "old").exists()
    with artifact.staging(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["new"] and len(
        list(tmp_path.iterdir())
    ) == 1


def test_outputs_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        artifact.check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="Nothing can be made"):
        artifact.check_output(tmp_path / "file" / "out", overwrite=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        artifact.check_output(tmp_path / "full", overwrite=False)


def test_a_link_is_followed_and_the_current_folder_kept(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with artifact.staging(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink() and [f.name for f in (tmp_path / "real").iterdir()] == [
        "new"
    ]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]
    monkeypatch.chdir(tmp_path / "real")
    for path in (tmp_path / "real", tmp_path):
        with pytest.raises(OutputError, match="current folder"):
            artifact.check_output(path, overwrite=True)


NO_ROOM = """
import resource, signal, sys
from optimum_order import JointCompressor
compressed = JointCompressor.from_pretrained(sys.argv[1]).compress("magnitude:0.5", progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the limit is an error, as a full disk is
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    compressed.save_pretrained(sys.argv[2])
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "limit", [100, 5_000, 100_000]
)  # fails in the config, the tokenizer, the weights
def test_a_disk_without_room_is_one_clear_error_and_leaves_nothing(
    tiny_llama_folder, tmp_path, limit
):
    command = [sys.executable, "-c", NO_ROOM, tiny_llama_folder, tmp_path / "out", str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("OutputError Cannot write") and "make room" in ran.stdout
    assert not list(tmp_path.iterdir())


def test_pages_for_people_and_hidden_folders_are_left_alone(copy):
    for name in ("README.md", "optimum_order.png", "LICENSE", "NOTICE.txt", ".gitattributes"):
        (copy / name).write_text("edited on the Hub")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("of a clone")
    assert verify(copy) == []
    (copy / "docs").mkdir()
    for name in ("README.md.py", "docs/README.md", "LICENSE.py"):
        (copy / name).write_text("not ours")
    assert [problem.split()[0] for problem in verify(copy)] == [
        "LICENSE.py",
        "README.md.py",
        "docs/README.md",
    ]


def test_a_link_is_only_followed_inside_a_cache_of_the_hub(saved, tmp_path):
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    store.mkdir()
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        shutil.copy(file, store / file.name)
        (snapshot / file.name).symlink_to(store / file.name)
    assert verify(snapshot) == []
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    assert verify(snapshot) == ["the manifest names a file it may not: 'config.json'."]
    (tmp_path / "elsewhere").mkdir()
    for file in saved.iterdir():
        (tmp_path / "elsewhere" / file.name).symlink_to(store / file.name)
    assert all("names a file it may not" in problem for problem in verify(tmp_path / "elsewhere"))


CHILD = """
import resource, sys
from collections.abc import Mapping
from optimum_order import JointCompressor, LayerState
from optimum_order.artifact.verify import verify
from optimum_order.compressed import CompressedModel, Provenance
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Result, Subject
from optimum_order.order import Order
from optimum_order.models.units import find_units

folder, out, *formats = sys.argv[1:]
JointCompressor.from_pretrained("tiny-llama").source.load_empty()  # what is imported on the way is not measured
compressor = JointCompressor.from_pretrained(folder)
with open("/proc/self/status") as status:
    limit = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData")) + 56 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
weights = compressor.source.load_empty()
units = find_units(weights.model)
targets = {target.name: target for unit in units for target in unit.targets}

class States(Mapping):
    def __getitem__(self, name):
        weight = weights[f"{name}.weight"]
        return LayerState(weight.masked_fill(weight < 0.5, 0), pruned=weight < 0.5)
    def __iter__(self):
        return iter(targets)
    def __len__(self):
        return len(targets)

states = States()
result = Result(states, {name: [] for name in targets}, tuple(Order.parse("magnitude:0.5")))
tensors = weights.overlaid(targets, states)
base = {"id": "large", "revision": None, "architecture": "", "dtype": "bfloat16", "digest": ""}
provenance = Provenance(Recipe.of(Order.parse("magnitude:0.5")), "block", base, None, 0.0)
subject = Subject(weights.model, units)
compressed = CompressedModel(compressor, subject, result, provenance, tensors)
for format in formats:
    compressed.save_pretrained(f"{out}/{format}", format)
    assert verify(f"{out}/{format}") == []
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_is_saved_and_verified_in_the_memory_of_a_few_blocks(large_llama, tmp_path):
    """100 MB of weights where 56 MB may be taken."""
    model, folder = large_llama
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path), "dense", "sparse"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = model.state_dict()
    for format in ("dense", "sparse"):
        assert len(list((tmp_path / format).glob("*.safetensors"))) > 3
        for name, tensor in model.__class__.from_pretrained(tmp_path / format).state_dict().items():
            small = (expected[name] < 0.5) & ("_proj." in name)
            assert torch.equal(tensor, expected[name].masked_fill(small, 0))
