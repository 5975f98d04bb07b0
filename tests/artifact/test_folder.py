"""A saved folder is whole or absent, and is written in the memory of a few blocks."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from optimum_order.artifact import folder as artifact
from optimum_order.errors import OutputError


def test_staging_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), artifact.staging(tmp_path / "out", overwrite=False) as folder:
        (folder / "half").write_text("written")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_staging_replaces_only_on_success(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("")
    with pytest.raises(RuntimeError), artifact.staging(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").exists()
    with artifact.staging(out, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert [file.name for file in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("")
    rename = type(out).rename

    def fails(self, target):
        if self.parent.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fails)
    with pytest.raises(OutputError, match="No space left"), artifact.staging(out, overwrite=True):
        pass
    assert (out / "config.json").exists() and list(tmp_path.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    out = tmp_path / "out"
    program = "import os, signal, sys; from pathlib import Path\n"
    program += "from optimum_order.artifact import folder\n"
    program += "with folder.staging(Path(sys.argv[1]), overwrite=False) as result:\n"
    program += "    (result / 'half').touch()\n"
    program += "    os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", program, out], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    (tmp_path / ".out.v2.0123abcd.partial").mkdir()  # of the path "out.v2"
    (tmp_path / ".out.0123abcd.partial").mkdir()  # killed before it had a lock
    os.utime(tmp_path / ".out.0123abcd.partial", (0, 0))
    (tmp_path / ".out.4567abcd.partial").mkdir()  # about to take its lock
    with artifact.staging(out, overwrite=False) as alive:
        assert not left.exists()
        (alive / "new").touch()
        with artifact.staging(tmp_path / "out", overwrite=False) as second:
            assert second != alive and (alive / "new").exists()
            (second / "old").touch()
        shutil.rmtree(out)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        *(".out.4567abcd.partial", ".out.v2.0123abcd.partial", "new", "out")
    ]


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
    real = tmp_path / "real"
    real.mkdir()
    (real / "config.json").write_text("")
    (tmp_path / "link").symlink_to(real)
    with artifact.staging(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert [file.name for file in real.iterdir()] == ["new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]
    monkeypatch.chdir(real)
    for path in (real, tmp_path):
        with pytest.raises(OutputError, match="current folder"):
            artifact.check_output(path, overwrite=True)


def test_only_an_artifact_or_a_model_is_replaced(tmp_path):
    for number, names in enumerate(
        [
            ["thesis/final.tex"],
            ["config.json", "thesis/final.tex"],
            ["config.json", "notes.txt"],
            [".git/HEAD", "config.json"],
            ["main.py"],
        ]
    ):
        out = tmp_path / str(number)
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("{}")
        with pytest.raises(OutputError, match="is no file of an artifact or a model"):
            artifact.check_output(out, overwrite=True)
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json"):
        (model / name).write_text("{}")
    (model / ".gitattributes").write_text("")
    artifact.check_output(model, overwrite=True)
    (model / "link.json").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"'link\.json'"):
        artifact.check_output(model, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_filled_meanwhile_stays_and_the_result_is_beside_it(
    tmp_path, monkeypatch, overwrite
):
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="the finished result is in") as error,
        artifact.staging(out, overwrite=overwrite) as folder,
    ):
        (folder / "result").write_text("")
        if overwrite:  # filled between the last look and the rename
            rename = type(out).rename

            def slow(self, target):
                if self == folder and target == out:
                    out.mkdir()
                    (out / "precious.txt").write_text("precious")
                return rename(self, target)

            monkeypatch.setattr(type(out), "rename", slow)
        else:
            out.mkdir()
            (out / "precious.txt").write_text("precious")
    assert (out / "precious.txt").read_text() == "precious"
    (result,) = set(tmp_path.iterdir()) - {out}
    assert f"'{result}'" in str(error.value)
    assert [file.name for file in result.iterdir()] == ["result"]


def test_names_of_any_length_fit_or_are_refused_at_once(tmp_path):
    longest = tmp_path / ("n" * 255)
    with artifact.staging(longest, overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
    with artifact.staging(longest, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert list(tmp_path.iterdir()) == [longest]
    for path in (tmp_path / ("n" * 256), tmp_path / ("ü" * 128), tmp_path / ("n" * 300) / "out"):
        with pytest.raises(OutputError, match="a name has at most 255"):
            artifact.check_output(path, overwrite=False)
    deep = tmp_path.joinpath(*["d" * 200] * 20)
    with pytest.raises(OutputError, match="may have"):
        artifact.check_output(deep, overwrite=False)


def test_the_digest_of_values_is_of_their_bits():
    weight = torch.randn(4, 6)
    digest = artifact.values_digest(weight)
    assert digest == artifact.values_digest(weight.T.contiguous().T)
    assert digest != artifact.values_digest(-weight)
    zero = torch.zeros(2, 2)
    assert artifact.values_digest(zero) != artifact.values_digest(-zero)


NO_ROOM = """
import resource, signal, sys
from optimum_order import JointCompressor
folder, out, *limits = sys.argv[1:]
compressed = JointCompressor.from_pretrained(folder).compress("magnitude:0.5", progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the limit is an error, as a full disk is
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        compressed.save_pretrained(out)
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_disk_without_room_is_one_clear_error_and_leaves_nothing(tiny_llama_folder, tmp_path):
    limits = ["100", "5000", "100000"]  # fails in the config, the tokenizer, the weights
    command = [sys.executable, "-c", NO_ROOM, tiny_llama_folder, tmp_path / "out", *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    errors = done.stdout.splitlines()
    assert len(errors) == 3
    for error in errors:
        assert error.startswith("OutputError Cannot write") and "make room" in error
    assert not list(tmp_path.iterdir())


CHILD = """
import resource, sys
from collections.abc import Mapping
from optimum_order import JointCompressor, LayerState, formats
from optimum_order.artifact.folder import save, values_digest
from optimum_order.artifact.verify import verify
from optimum_order.models.memory import giving_memory_back
from optimum_order.models.units import find_units

folder, out, *names = sys.argv[1:]
# What is imported on the way is not measured.
JointCompressor.from_pretrained("tiny-llama").source.load_empty()
source = JointCompressor.from_pretrained(folder).source
with open("/proc/self/status") as status:
    taken = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + 56 * 2**20, taken + 56 * 2**20))
memory = giving_memory_back()  # as a run with low_memory does
memory.__enter__()
weights = source.load_empty()
targets = {target.name: target for unit in find_units(weights.model) for target in unit.targets}


class States(Mapping):
    def __getitem__(self, name):
        weight = weights[f"{name}.weight"]
        return LayerState(weight.masked_fill(weight < 0.5, 0), pruned=weight < 0.5)

    def __iter__(self):
        return iter(targets)

    def __len__(self):
        return len(targets)


layers = {}
for name, state in States().items():
    layers[name] = {"shape": list(state.weight.shape), "pruned": int(state.pruned.sum())}
    layers[name] |= {"bits": 16, "digest": values_digest(state.weight)}
pruned = sum(layer["pruned"] for layer in layers.values())
total = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
facts = {"schema": 1, "order": "magnitude:0.5", "stages": [{"stage": "magnitude:0.5"}]}
facts |= {"schedule": "stage", "base_model": {"id": "", "digest": ""}, "layers": layers, "bytes": {}, "versions": {}}
facts |= {"metrics": {}, "sparsity": round(pruned / total, 6)}
tensors = weights.overlaid(targets, States())
contents = formats.Contents(weights.model, formats.Layers(targets, States()), tensors)
for name in names:
    codec = formats.choose(contents, name)
    save(contents, facts, f"{out}/{name}", codec=codec)
    assert verify(f"{out}/{name}") == []
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.slow
def test_a_model_is_saved_and_verified_in_the_memory_of_a_few_blocks(large_llama, tmp_path):
    """100 MB of weights where 56 MB may be taken."""
    model, folder = large_llama
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path), "dense", "sparse"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = model.state_dict()
    for format in ("dense", "sparse"):
        assert len(list((tmp_path / format).glob("*.safetensors"))) > 3
        loaded = type(model).from_pretrained(tmp_path / format)
        for name, tensor in loaded.state_dict().items():
            small = (expected[name] < 0.5) & ("_proj." in name)
            assert torch.equal(tensor, expected[name].masked_fill(small, 0))
