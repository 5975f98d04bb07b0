"""Artifacts of earlier versions load and verify; their work dirs are refused in one line."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_order.cli import main
from optimum_order.errors import OutputError

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
VERSIONS = [folder.name.removeprefix("artifact-") for folder in sorted(FIXTURES.glob("artifact-*"))]
assert "0.1.0" in VERSIONS


@pytest.fixture(scope="module")
def make():
    """The module tests/fixtures/make.py: the model, the order and the inputs of those files."""
    spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(version):
    return load_file(FIXTURES / f"logits-{version}.safetensors")["logits"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sparse_artifact_computes_the_same_logits(make, version):
    folder = FIXTURES / f"artifact-{version}" / "sparse"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(make.INPUTS).logits, logits(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_packed_artifact_computes_the_same_logits_without_this_package(version, tmp_path):
    folder = FIXTURES / f"artifact-{version}" / "compressed-tensors"
    subprocess.run([sys.executable, HERE / "reload_stock.py", tmp_path, folder], check=True)
    torch.testing.assert_close(load_file(tmp_path / "0.safetensors")["outputs"], logits(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_artifacts_verify(make, version, capsys):
    for format in make.FORMATS:
        with pytest.raises(SystemExit) as end:
            main(["verify", str(FIXTURES / f"artifact-{version}" / format)])
        assert end.value.code == 0, capsys.readouterr()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_work_dir_is_refused_in_one_line_and_left_as_it_is(make, version, tmp_path):
    original = FIXTURES / f"work-dir-{version}"
    folder = shutil.copytree(original, tmp_path / "work")
    with pytest.raises(OutputError) as refusal:
        make.compressor().compress(make.ORDER, work_dir=folder, resume=True, progress=False)
    message = str(refusal.value)
    assert version in message
    assert "remove" in message
    assert "give another" in message
    assert len(message.splitlines()) == 1
    for file in [*original.glob("*.safetensors"), original / "fingerprint.json"]:
        assert (folder / file.name).read_bytes() == file.read_bytes()
