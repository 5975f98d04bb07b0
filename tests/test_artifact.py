"""A saved folder is whole or not there, and `verify` sees whatever is changed in it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, artifact, manifest
from optimum_order.errors import ArtifactError, OutputError

ORDER = "wanda(pattern=2:4) > rtn:4"


@pytest.fixture(scope="module")
def saved(tiny_llama_folder, tmp_path_factory):
    ids = torch.randint(2, 300, (2, 16))
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, calibration=ids, sequence_length=16)
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
    stated = {"sha256": manifest.sha256(folder / name), "bytes": (folder / name).stat().st_size}
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
    assert artifact.verify(saved) == []


def test_a_flipped_bit_in_any_file_is_seen(saved, tmp_path):
    for file in sorted(saved.iterdir()):
        folder = shutil.copytree(saved, tmp_path / file.name)
        data = bytearray((folder / file.name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file.name).write_bytes(data)
        assert artifact.verify(folder), file.name


def test_truncated_missing_and_added_files_are_seen(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "bytes, the manifest says" in artifact.verify(copy)[0]
    weights.unlink()
    assert artifact.verify(copy) == ["model.safetensors is missing."]
    weights.mkdir()
    (copy / "extra.py").write_text("print('hello')")
    assert "extra.py is in the folder and not in the manifest." in artifact.verify(copy)


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
    assert any("order" in problem for problem in artifact.verify(copy))


def test_a_code_that_was_changed_is_seen(copy):
    key = "model.layers.1.mlp.up_proj.weight_packed"
    rewrite(copy, lambda tensors: tensors[key][0].add_(1))
    assert artifact.verify(copy) == [
        "layer model.layers.1.mlp.up_proj does not decode to the values that were measured."
    ]


def test_fewer_zeros_than_pruned_weights_and_a_broken_pattern_are_seen(copy):
    name = "model.layers.0.self_attn.q_proj"
    edit(copy, lambda facts: facts["layers"][name].update(pruned=64 * 64))
    sparsity, zeros = artifact.verify(copy)
    assert "sparsity" in sparsity and "fewer than the 4096 weights said to be pruned" in zeros
    edit(copy, lambda facts: facts["layers"][name].update(pruned=64 * 32, pattern="1:4"))
    assert artifact.verify(copy) == [f"layer {name} does not keep the pattern 1:4."]


def test_wrong_bits_and_layers_that_are_not_there_are_seen(copy):
    name = "model.layers.0.self_attn.q_proj"
    edit(copy, lambda facts: facts["layers"][name].update(bits=3))
    assert artifact.verify(copy) == [f"layer {name} has 4 bits, the manifest says 3."]
    edit(copy, lambda facts: facts["layers"].update({"model.layers.9.mlp.up_proj": facts["layers"][name]}))
    assert any("model.layers.9.mlp.up_proj" in problem for problem in artifact.verify(copy))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_names_that_lead_out_of_the_folder_are_seen(copy, name):
    edit(copy, lambda facts: facts["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert f"the manifest names a file it may not: {name!r}." in artifact.verify(copy)


@pytest.mark.parametrize("key", ["pruned", "shape", "bits", "group_size", "stored"])
def test_values_of_the_wrong_kind_are_seen_not_raised(copy, key):
    edit(copy, lambda facts: facts["layers"]["model.layers.0.self_attn.q_proj"].update({key: "x"}))
    assert artifact.verify(copy)


def test_rows_that_overlap_are_refused(copy):
    name = "model.layers.0.self_attn.q_proj"
    rows = {"rows": [["model.embed_tokens.weight", 0, 64]] * 1000, "transposed": False}
    edit(copy, lambda facts: facts["layers"][name].update(stored=rows))
    assert "rows cannot be read" in artifact.verify(copy)[0]


def test_no_manifest_is_a_difference_and_no_folder_an_error(copy, tmp_path):
    (copy / manifest.FILE).unlink()
    assert "not a folder that optimum-order wrote" in artifact.verify(copy)[0]
    with pytest.raises(ArtifactError, match="no folder"):
        artifact.verify(tmp_path / "nowhere")


def test_an_edited_manifest_is_seen(copy):
    edit(copy, lambda facts: facts.update(seed=7), reseal=False)
    assert "its digest does not match" in artifact.verify(copy)[0]


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
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


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
    assert (tmp_path / "link").is_symlink() and [f.name for f in (tmp_path / "real").iterdir()] == ["new"]
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


@pytest.mark.parametrize("limit", [100, 5_000, 100_000])  # fails in the config, the tokenizer, the weights
def test_a_disk_without_room_is_one_clear_error_and_leaves_nothing(tiny_llama_folder, tmp_path, limit):
    command = [sys.executable, "-c", NO_ROOM, tiny_llama_folder, tmp_path / "out", str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("OutputError Cannot write") and "make room" in ran.stdout
    assert not list(tmp_path.iterdir())
