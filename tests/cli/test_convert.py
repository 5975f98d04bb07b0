"""`optimum-order convert` saves the same values in another format."""

import json
import shutil

import pytest

from optimum_order.artifact import manifest


def test_the_values_and_the_account_stay(program, saved, tmp_path):
    done = program("convert", saved, tmp_path / "out", "--format", "sparse", "--json")
    assert done.code == 0, done.err
    before = manifest.load(saved)
    after = manifest.load(tmp_path / "out")
    assert json.loads(done.out)["format"] == after["format"] == "sparse"
    assert after["order"] == before["order"]
    for name, layer in before["layers"].items():
        assert after["layers"][name]["digest"] == layer["digest"]
    assert program("verify", tmp_path / "out").code == 0
    done = program("compress", saved, tmp_path / "same", "--format", "sparse")
    assert done.code == 0, "compress without an order does the same"
    assert manifest.load(tmp_path / "same")["files"] == after["files"]


def test_a_dry_run_names_the_format_and_the_bytes_and_writes_nothing(program, saved, tmp_path):
    for format in ("auto", "sparse", "coded", "dense"):
        words = ["convert", saved, tmp_path / "out", "--format", format, "--json"]
        done = program(*words, "--dry-run")
        assert done.code == 0, done.err
        assert list(tmp_path.iterdir()) == []
        forecast = json.loads(done.out)
        made = json.loads(program(*words).out)
        shutil.rmtree(tmp_path / "out")
        assert forecast["format"] == made["format"]
        assert forecast["from"] == manifest.load(saved)["format"]
        assert forecast["before"] == manifest.load(saved)["bytes"]["after"]
        assert forecast["after"] == pytest.approx(made["bytes"]["after"], rel=1e-3)
    done = program("convert", saved, tmp_path / "out", "--format", "dense", "--dry-run")
    assert "→ dense: weights of " in done.out and "Nothing was written." in done.out


def test_options_reach_the_folder(program, saved, tmp_path):
    done = program(
        "convert", saved, tmp_path / "out", "--format", "dense", "--max-shard-size", "100KB"
    )
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    done = program("convert", saved, tmp_path / "out")
    assert done.code == 2 and "--overwrite" in done.err and "overwrite=True" not in done.err
    assert program("convert", saved, tmp_path / "out", "--overwrite").code == 0


def test_what_is_refused_is_one_line(program, saved, tmp_path):
    for words, message in (
        ([saved, tmp_path / "o", "--format", "bitsandbytes"], "bitsandbytes"),
        ([saved, tmp_path / "o", "--format", "spars"], "Did you mean 'sparse'?"),
        ([saved, tmp_path / "o", "--for", "vlm"], "Did you mean 'vllm'?"),
        ([tmp_path / "missing", tmp_path / "o"], "There is no folder"),
        ([tmp_path, tmp_path / "o"], "optimum_order.json"),
        ([saved], "required: OUTPUT"),
        ([saved, tmp_path / "o", "--format", "bitsandbytes", "--dry-run"], "bitsandbytes"),
    ):
        done = program("convert", *words)
        assert done.code == 2 and done.out == "" and message in done.err.splitlines()[-1]
    assert not (tmp_path / "o").exists()
