"""`verify` sees whatever is changed in a saved folder."""

import dataclasses
import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError
from optimum_order.files import sha256

SHARDED = "magnitude:0.5 > rtn(bits=4, group_size=32)"
FORMATS = ("dense", "compressed-tensors", "gptq", "sparse")
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1.mlp.up_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
OTHER_VALUES = "does not decode to the values that were measured"


@pytest.fixture(scope="module")
def saved(tiny_llama_folder, tmp_path_factory):
    """An artifact in one file. Do not write into it."""
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=torch.randint(2, 300, (2, 16)), sequence_length=16
    )
    folder = tmp_path_factory.mktemp("artifact") / "out"
    compressor.compress("wanda(pattern=2:4) > rtn:4", progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def all_sharded(make_model, tmp_path_factory):
    """The same layers in four formats, each in several files."""
    root = tmp_path_factory.mktemp("sharded")
    model = make_model("llama", intermediate_size=64, num_key_value_heads=4).to(torch.bfloat16)
    model.save_pretrained(root / "source")
    compressed = JointCompressor.from_pretrained(root / "source").compress(SHARDED, progress=False)
    contents = dataclasses.replace(compressed._contents(), processor=None)
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
    """A fresh copy of one of the sharded artifacts."""

    def copy_of(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(all_sharded / name, tmp_path / name)

    return copy_of


def edit(folder, change, *, reseal=True):
    """Change the manifest; sealed again, only what it says is wrong and not its digest."""
    facts = json.loads((folder / manifest.FILE).read_text())
    change(facts)
    if reseal:
        manifest.write(facts, folder)
    else:
        (folder / manifest.FILE).write_text(json.dumps(facts))


def edit_layer(folder, name=Q_PROJ, **changes):
    edit(folder, lambda facts: facts["layers"][name].update(changes))


def restate(folder, name):
    """Make the manifest agree with a file that was changed, to see what else is compared."""
    entry = {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    edit(folder, lambda facts: facts["files"].update({name: entry}))


def rewrite(folder, change, file="model.safetensors", metadata=None):
    """Change the tensors of a file, and make the manifest agree with it."""
    with safe_open(folder / file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata=metadata or header)
    restate(folder, file)


def change_tensor(folder, key, change):
    """Change one tensor of a sharded artifact in place."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][key]
    rewrite(folder, lambda tensors: change(tensors[key]), file)


# Files


def test_an_untouched_artifact_verifies(saved):
    assert verify(saved) == []


def test_a_flipped_bit_in_any_file_that_a_program_reads_is_seen(copy):
    read = [file for file in copy.iterdir() if not manifest.DOCUMENTS.fullmatch(file.name)]
    assert {"model.safetensors", "config.json", manifest.FILE} <= {file.name for file in read}
    for seed in range(5):
        draw = random.Random(seed)
        for file in sorted(read):
            whole = file.read_bytes()
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            assert verify(copy), file.name
            file.write_bytes(whole[: draw.randrange(len(whole))])
            assert verify(copy), file.name
            file.write_bytes(whole)
    assert verify(copy) == []


def test_truncated_missing_and_added_files_are_seen(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "bytes, the manifest says" in verify(copy)[0]
    weights.unlink()
    assert verify(copy) == ["model.safetensors is missing."]
    weights.mkdir()
    (copy / "extra.py").write_text("print('hello')")
    assert "extra.py is in the folder and not in the manifest." in verify(copy)


def test_swapped_shards_are_seen(sharded):
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    assert any(one.name in problem for problem in verify(sharded))
    restate(sharded, one.name)
    restate(sharded, other.name)
    assert "in another file than it is" in verify(sharded)[0]


def test_file_names_that_no_system_takes_are_seen(saved, tmp_path):
    for number, name in enumerate(["a\0b", "n" * 5000, "nowhere/nothing", "./config.json"]):
        folder = shutil.copytree(saved, tmp_path / str(number))
        entry = {name: {"sha256": "0" * 64, "bytes": 1}}
        edit(folder, lambda facts, entry=entry: facts["files"].update(entry))
        assert verify(folder) == [f"{name} is missing."]


def test_names_that_lead_out_of_the_folder_are_seen(copy):
    for name in ("../secret", "/etc/hostname"):
        entry = {name: {"sha256": "0" * 64, "bytes": 1}}
        edit(copy, lambda facts, entry=entry: facts["files"].update(entry))
        assert f"the manifest names a file it may not: {name!r}." in verify(copy)


def test_an_index_that_points_out_of_the_folder_or_nowhere_is_seen(sharded):
    index = json.loads((sharded / INDEX).read_text())
    for name in [
        "../model.safetensors",
        "/etc/passwd",
        "nowhere.safetensors",
        "a\0b",
        "n" * 5000,
    ]:
        index["weight_map"][f"{LAYER}.weight"] = name
        (sharded / INDEX).write_text(json.dumps(index))
        restate(sharded, INDEX)
        problems = verify(sharded)
        assert any("file beside it" in p or "is missing" in p for p in problems), problems


def test_pages_for_people_and_hidden_folders_are_left_alone(copy):
    for name in ("README.md", "optimum_order.png", "LICENSE", "NOTICE.txt", ".gitattributes"):
        (copy / name).write_text("edited on the Hub")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("of a clone")
    assert verify(copy) == []
    (copy / "docs").mkdir()
    others = ["LICENSE.py", "README.md.py", "docs/README.md"]
    for name in others:
        (copy / name).write_text("not ours")
    assert [problem.split()[0] for problem in verify(copy)] == others


def test_a_link_is_only_followed_inside_a_cache_of_the_hub(saved, tmp_path):
    store = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "0123"
    elsewhere = tmp_path / "elsewhere"
    for folder in (store, snapshot, elsewhere):
        folder.mkdir(parents=True)
    for file in saved.iterdir():
        shutil.copy(file, store / file.name)
        (snapshot / file.name).symlink_to(store / file.name)
        (elsewhere / file.name).symlink_to(store / file.name)
    assert verify(snapshot) == []
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    assert verify(snapshot) == ["config.json is a link: nothing outside the folder is read."]
    (problem,) = verify(elsewhere)
    assert "is a link" in problem


def test_what_is_no_file_is_named_and_never_read(saved, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hf_secret")

    def link(path):
        path.symlink_to(secret)

    def dangling(path):
        path.symlink_to(tmp_path / "nowhere")

    def circle(path):
        path.symlink_to(path)

    kinds = {link: "link", dangling: "link", circle: "link", os.mkfifo: "pipe"}
    names = ("README.md", "LICENSE", "NOTICE", "optimum_order.png", "config.json", manifest.FILE)
    for number, (make, word) in enumerate(kinds.items()):
        for name in names:
            folder = shutil.copytree(saved, tmp_path / f"{number}-{name}")
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            (problem,) = verify(folder)
            assert word in problem if name != manifest.FILE else "is not read" in problem
    folder = shutil.copytree(saved, tmp_path / "folder")
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md" / "x").write_text("")
    assert verify(folder) == ["README.md/x is in the folder and not in the manifest."]


# The manifest


def test_no_manifest_is_a_difference_and_no_folder_an_error(copy, tmp_path):
    (copy / manifest.FILE).unlink()
    assert "not a folder that optimum-order wrote" in verify(copy)[0]
    with pytest.raises(ArtifactError, match="no folder"):
        verify(tmp_path / "nowhere")


def test_an_edited_manifest_is_seen(copy):
    edit(copy, lambda facts: facts.update(seed=7), reseal=False)
    assert "its digest does not match" in verify(copy)[0]


def test_a_newer_schema_asks_for_an_upgrade(copy):
    edit(copy, lambda facts: facts.update(schema=manifest.SCHEMA + 1))
    assert len(verify(copy)) == 1 and "Upgrade it" in verify(copy)[0]


def test_a_format_that_is_not_installed_is_seen(copy):
    edit(copy, lambda facts: facts.update(format="shiny"))
    (problem,) = verify(copy)
    assert "stored as 'shiny', which is no format that is installed" in problem


@pytest.mark.parametrize("place", ["manifest", "config", "header", "stages"])
def test_an_order_edited_in_any_one_place_is_seen(copy, place):
    other = "rtn:4 > wanda(pattern=2:4)"
    if place == "manifest":
        edit(copy, lambda facts: facts.update(order=other))
    elif place == "stages":
        edit(copy, lambda facts: facts["stages"].reverse())
    elif place == "header":
        header = {"optimum_order": other, "format": "pt"}
        rewrite(copy, lambda tensors: None, metadata=header)
    else:
        config = json.loads((copy / "config.json").read_text())
        config["optimum_order"]["order"] = other
        (copy / "config.json").write_text(json.dumps(config))
        restate(copy, "config.json")
    assert any("order" in problem for problem in verify(copy))


def test_an_order_edited_in_the_header_of_any_shard_is_seen(sharded):
    for file in sorted(sharded.glob("*.safetensors")):
        whole = file.read_bytes()
        header = {"optimum_order": "rtn:4", "format": "pt"}
        rewrite(sharded, lambda tensors: None, file.name, header)
        assert any("says the order is 'rtn:4'" in problem for problem in verify(sharded)), file.name
        file.write_bytes(whole)
        restate(sharded, file.name)
    assert verify(sharded) == []


def test_values_of_the_wrong_kind_are_seen_not_raised(saved, tmp_path):
    for key in ["pruned", "shape", "bits", "group_size", "stored"]:
        folder = shutil.copytree(saved, tmp_path / key)
        edit_layer(folder, **{key: "x"})
        assert verify(folder), key


def test_rows_that_overlap_are_refused(copy):
    rows = {"rows": [["model.embed_tokens.weight", 0, 64]] * 1000, "transposed": False}
    edit_layer(copy, stored=rows)
    assert "rows cannot be read" in verify(copy)[0]


# Layers


def test_other_weights_in_a_shard_are_seen(copy_of):
    def flip(weight):
        weight.copy_(weight.flip(0))

    def nudge(weight):  # off its grid, to the next bfloat16
        weight.view(torch.int16)[3, torch.nonzero(weight[3])[0]] += 1

    for change in (flip, nudge):
        folder = copy_of("dense")
        change_tensor(folder, f"{LAYER}.weight", change)
        assert verify(folder) == [f"layer {LAYER} {OTHER_VALUES}."]


def test_a_code_that_was_changed_is_seen(copy):
    rewrite(copy, lambda tensors: tensors[f"{LAYER}.weight_packed"][0].add_(1))
    assert verify(copy) == [f"layer {LAYER} {OTHER_VALUES}."]


def test_a_mask_that_does_not_match_the_codes_is_seen(copy_of):
    rows, inputs = 64, 32
    first = 28 + 2 * 64  # after the header and the scales
    mask = slice(first, first + rows * inputs // 8)

    def more(payload):
        payload[mask][:4] = 0xFF

    def moved(payload):  # as many bits, elsewhere
        payload[mask].copy_(payload[mask].flip(0))

    folder = copy_of("sparse")
    change_tensor(folder, f"{LAYER}.weight", more)
    assert "its mask keeps" in verify(folder)[0]
    folder = copy_of("sparse")
    change_tensor(folder, f"{LAYER}.weight", moved)
    assert verify(folder) == [f"layer {LAYER} {OTHER_VALUES}."]
    folder = copy_of("sparse")
    edit_layer(folder, LAYER, pruned=1023)
    expected = f"layer {LAYER} has a mask of 1024 weights, the manifest says 1023."
    assert expected in verify(folder)


def test_fewer_zeros_than_pruned_weights_and_a_broken_pattern_are_seen(copy):
    edit_layer(copy, pruned=64 * 64)
    sparsity, zeros = verify(copy)
    assert "sparsity" in sparsity and "fewer than the 4096 weights said to be pruned" in zeros
    edit_layer(copy, pruned=64 * 32, pattern="1:4")
    assert verify(copy) == [f"layer {Q_PROJ} does not keep the pattern 1:4."]


def test_wrong_bits_wrong_groups_and_unknown_layers_are_seen(copy):
    layer = json.loads((copy / manifest.FILE).read_text())["layers"][Q_PROJ]
    edit_layer(copy, bits=3)
    assert verify(copy) == [f"layer {Q_PROJ} has 4 bits, the manifest says 3."]
    edit_layer(copy, bits=4, group_size=7)
    size = layer["group_size"]
    assert verify(copy) == [f"layer {Q_PROJ} has groups of {size}, the manifest says 7."]
    edit(copy, lambda facts: facts["layers"].update({"model.layers.9.mlp.up_proj": layer}))
    assert any("model.layers.9.mlp.up_proj" in problem for problem in verify(copy))


def test_inputs_that_are_rounded_otherwise_than_said_are_seen(tiny_llama_folder, tmp_path):
    compressor = JointCompressor.from_pretrained(tiny_llama_folder)
    compressed = compressor.compress("rtn:8 > activations:8", progress=False)
    compressed.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    edit_layer(tmp_path / "out", inputs="fp8 per token")
    assert verify(tmp_path / "out") == [
        f"layer {Q_PROJ} has inputs int8 per token, the manifest says fp8 per token."
    ]
    edit(tmp_path / "out", lambda facts: facts["layers"][Q_PROJ].pop("inputs"))
    assert len(verify(tmp_path / "out")) == 1


def test_groups_said_of_a_grid_without_groups_are_seen(tiny_llama_folder, tmp_path):
    compressed = JointCompressor.from_pretrained(tiny_llama_folder).compress(
        "bitsandbytes:int8", progress=False
    )
    compressed.save_pretrained(tmp_path / "out")
    edit_layer(tmp_path / "out", group_size=64)
    assert verify(tmp_path / "out") == [f"layer {Q_PROJ} has groups of None, the manifest says 64."]


# Lies about sizes


def test_a_header_that_declares_more_than_the_file_holds_is_seen(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = next(key for key in header if key != "__metadata__")

    def write(size, text=b""):
        file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
        restate(sharded, file.name)
        return verify(sharded)[0]

    for shape, end in [
        ([2**31, 2**31], None),
        ([2**20, 2**20], 2**41),
        ([2**62, 4], 0),
        ([-1, 5], None),
    ]:
        lie = header | {key: header[key] | {"shape": shape}}
        if end is not None:
            lie[key] = lie[key] | {"data_offsets": [lie[key]["data_offsets"][0], end]}
        text = json.dumps(lie).encode()
        assert f"{file} cannot be read" in write(len(text), text)
    assert f"{file} cannot be read" in write(2**62)


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
