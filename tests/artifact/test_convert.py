"""From format to format with the same values, or an error that says why not."""

import io
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, formats
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError, OutputError
from optimum_order.files import sha256
from optimum_order.testing import same_bits

TEXT = ["one two three " * 40]


def compress(model, order, folder, format, *, measured=False):
    """Compress, measure on a little text if wanted, and save; the manifest."""
    compressor = JointCompressor.from_pretrained(model, sequence_length=16)
    compressed = compressor.compress(order, progress=False)
    if measured:
        compressor.evaluate(TEXT, progress=False)
        compressed.evaluate(TEXT, format=format, progress=False)
    compressed.save_pretrained(folder, format=format)
    return manifest.load(folder)


@pytest.fixture(scope="module")
def bfloat16(tiny_llama_folder, tmp_path_factory):
    """`tiny_llama_folder`, in the dtype in which most formats hold it."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path_factory.mktemp("bfloat16") / "llama")
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(bfloat16, tmp_path_factory):
    """One model in every format. Do not write into it."""
    root = tmp_path_factory.mktemp("formats")
    order = "magnitude:0.3 > rtn(bits=2, group_size=32)"
    for format in ("dense", "compressed-tensors", "gptq", "sparse"):
        compress(bfloat16, order, root / format, format, measured=True)
    order = "magnitude:0.5 > bitsandbytes:nf4"
    compress(bfloat16, order, root / "bitsandbytes", "bitsandbytes", measured=True)
    return root


def states_in(folder):
    """Every layer of an artifact."""
    facts = manifest.load(folder)
    stored = {name: entry["stored"] for name, entry in facts["layers"].items()}
    return dict(formats.container(facts["format"]).read(folder, stored))


def tensors_in(folder):
    return load_file(folder / "model.safetensors")


def reseal(folder, facts, file):
    """Make the manifest agree with a file that was changed."""
    facts["files"][file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    manifest.write(facts, folder)


CODES = ("compressed-tensors", "gptq", "sparse")
POSSIBLE = dict.fromkeys(CODES, ("dense", *CODES))
POSSIBLE |= {"dense": ("dense", "sparse"), "bitsandbytes": ("dense", "bitsandbytes")}


@pytest.mark.parametrize("source", POSSIBLE)
def test_the_values_are_the_same(saved, source, tmp_path):
    before = states_in(saved / source)
    for format in POSSIBLE[source]:
        out = tmp_path / format
        written = convert(saved / source, out, format)
        assert written == manifest.load(out) and written["format"] == format
        assert verify(out) == []
        after = states_in(out)
        assert list(before) == list(after)
        for name, state in before.items():
            assert same_bits(after[name].weight, state.weight), (format, name)
            if state.grid is not None and format != "dense" and source != "bitsandbytes":
                assert torch.equal(after[name].grid.scale, state.grid.scale)
        for name in tensors_in(saved / "dense"):
            if name.removesuffix(".weight") not in before:
                assert torch.equal(tensors_in(saved / source)[name], tensors_in(out)[name])


def test_what_is_written_loads_to_the_same_model(saved, tmp_path):
    ids = torch.arange(20)[None]

    def logits(folder):
        with torch.no_grad():
            return transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits

    expected = logits(saved / "dense")
    for format in ("dense", "compressed-tensors", "sparse"):
        convert(saved / "sparse", tmp_path / format, format)
        assert torch.equal(logits(tmp_path / format), expected)


def test_the_manifest_keeps_what_was_done_and_says_anew_what_is_stored(saved, tmp_path):
    before = manifest.load(saved / "sparse")
    written = convert(saved / "sparse", tmp_path / "out", "compressed-tensors")
    direct = manifest.load(saved / "compressed-tensors")
    changed = {"format", "requires", "bytes", "files", "layers", "digest"}
    one, other = (
        {key: value for key, value in facts.items() if key not in changed}
        for facts in (written, before)
    )
    assert one == other
    assert written["layers"] == direct["layers"] and written["bytes"] == direct["bytes"]
    assert written["metrics"]["perplexity"]["after"] == before["metrics"]["perplexity"]["after"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (saved / "sparse").iterdir()}
    assert set(written["files"]) == names - {manifest.FILE, "README.md"}
    for name in ("config.json", "model.safetensors"):
        made = (tmp_path / "out" / name).read_bytes()
        assert made == (saved / "compressed-tensors" / name).read_bytes()


def test_metrics_of_other_kernels_are_left_out(saved, tmp_path):
    assert manifest.load(saved / "bitsandbytes")["metrics"]
    assert convert(saved / "bitsandbytes", tmp_path / "dense", "dense")["metrics"] == {}
    assert convert(saved / "bitsandbytes", tmp_path / "same", "bitsandbytes")["metrics"]


def test_a_generation_config_comes_along(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "in")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": 7}))
    reseal(folder, manifest.load(folder), file)
    convert(folder, tmp_path / "out", "dense")
    assert json.loads((tmp_path / "out" / file.name).read_text())["max_new_tokens"] == 7


class TestMasks:
    def test_sparse_keeps_its_own(self, saved, tmp_path):
        convert(saved / "sparse", tmp_path / "out", "sparse")
        one = tensors_in(saved / "sparse")
        other = tensors_in(tmp_path / "out")
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_zeros_are_the_mask_if_there_are_as_many_of_them(self, bfloat16, tmp_path):
        """Few weights are exactly zero if nothing rounded them."""
        compress(bfloat16, "magnitude:0.5", tmp_path / "dense", "dense")
        compress(bfloat16, "magnitude:0.5", tmp_path / "sparse", "sparse")
        convert(tmp_path / "dense", tmp_path / "out", "sparse")
        converted = states_in(tmp_path / "out")
        for name, state in states_in(tmp_path / "sparse").items():
            assert torch.equal(converted[name].pruned, state.pruned)

    @pytest.mark.parametrize("source", ["compressed-tensors", "gptq", "dense"])
    def test_zeros_are_no_mask_if_there_are_more(self, saved, source, tmp_path):
        written = convert(saved / source, tmp_path / "out", "sparse")
        for state in states_in(saved / "sparse").values():
            assert int((state.weight == 0).sum()) > int(state.pruned.sum())
        assert all(state.pruned is None for state in states_in(tmp_path / "out").values())
        direct = manifest.load(saved / "sparse")
        for name, entry in direct["layers"].items():
            assert written["layers"][name]["pruned"] == entry["pruned"]
        if source != "dense":  # they are left out all the same
            assert written["bytes"]["per_weight_bits"] < direct["bytes"]["per_weight_bits"]
        convert(tmp_path / "out", tmp_path / "back", source)
        assert verify(tmp_path / "back") == []

    def test_a_layer_that_was_not_pruned_has_none(self, bfloat16, tmp_path):
        compress(bfloat16, "rtn:4", tmp_path / "in", "compressed-tensors")
        convert(tmp_path / "in", tmp_path / "out", "sparse")
        assert all(state.pruned is None for state in states_in(tmp_path / "out").values())


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe", "opt"])
def test_every_architecture(make_model, architecture, tmp_path):
    auto = transformers.AutoModelForCausalLM
    make_model(architecture).save_pretrained(tmp_path / "model")
    for number, order in enumerate(
        ["magnitude:0.5 > rtn(bits=4, group_size=8)", "magnitude(sparsity=0.5, pattern=2:4)"]
    ):
        root = tmp_path / str(number)
        compress(tmp_path / "model", order, root / "sparse", "sparse")
        convert(root / "sparse", root / "dense", "dense")
        (root / "dense" / "generation_config.json").unlink(missing_ok=True)
        convert(root / "sparse", root / "again", "sparse")
        expected = auto.from_pretrained(root / "sparse").state_dict()
        for name in ("dense", "again"):
            loaded = auto.from_pretrained(root / name).state_dict()
            assert expected.keys() == loaded.keys()
            assert all(torch.equal(tensor, loaded[key]) for key, tensor in expected.items())


def test_image_classifiers(make_image_model, tmp_path):
    auto = transformers.AutoModelForImageClassification
    for architecture in ("vit", "resnet"):
        root = tmp_path / architecture
        make_image_model(architecture).save_pretrained(root / "model")
        order = "magnitude:0.5 > rtn(bits=4, group_size=-1)"
        compress(root / "model", order, root / "sparse", "sparse")
        convert(root / "sparse", root / "dense", "dense")
        loaded = auto.from_pretrained(root / "dense").state_dict()
        for name, tensor in auto.from_pretrained(root / "sparse").state_dict().items():
            assert torch.equal(tensor, loaded[name])


def test_a_folder_is_replaced_only_if_told_even_by_itself(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    with pytest.raises(OutputError, match="not empty"):
        convert(folder, folder, "dense")
    convert(folder, folder, "dense", overwrite=True)
    assert manifest.load(folder)["format"] == "dense" and verify(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_format_that_cannot_hold_it_says_why(saved, tmp_path):
    for source, format, reason in [
        ("dense", "compressed-tensors", "No layer is quantized.* What is stored dense are values"),
        ("sparse", "bitsandbytes", "UniformGrid is not a grid of the bitsandbytes library"),
        ("bitsandbytes", "sparse", "BlockGrid is not a grid of equal steps"),
        ("sparse", "sparce", r"Did you mean 'sparse'\?"),
    ]:
        with pytest.raises(FormatError, match=reason):
            convert(saved / source, tmp_path / "out", format)
    assert convert(saved / "sparse", tmp_path / "out")["format"] == "compressed-tensors"


def test_code_is_never_asked_for_or_run(saved, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "evil").mkdir()
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Own\n"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    for number, model_type in enumerate(("llama", "unheard-of")):
        folder = shutil.copytree(saved / "dense", tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoConfig": "own.Own"}, "model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(code)
        facts = manifest.load(folder)
        for name in ("config.json", "own.py"):
            size = (folder / name).stat().st_size
            facts["files"][name] = {"sha256": sha256(folder / name), "bytes": size}
        manifest.write(facts, folder)
        assert any("names code to run (auto_map)" in problem for problem in verify(folder))
        with pytest.raises(ArtifactError, match="auto_map"):
            convert(folder, tmp_path / f"out-{number}", "dense")
        facts["base_model"]["remote_code"] = True
        manifest.write(facts, folder)
        assert verify(folder) == []
        if model_type == "llama":
            convert(folder, tmp_path / f"out-{number}", "dense")
        else:
            with pytest.raises(ArtifactError, match="cannot be used"):
                convert(folder, tmp_path / "other", "dense")
    assert not ran.exists()


def test_what_does_not_verify_is_not_converted(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    (folder / "extra.py").write_text("")
    with pytest.raises(ArtifactError, match=r"extra\.py is in .* lists all differences \(1\)"):
        convert(folder, tmp_path / "out", "dense")
    with pytest.raises(ArtifactError, match="not a folder that optimum-order wrote"):
        convert(tmp_path, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a layer more", "a tensor less", "a format"])
def test_what_does_not_fit_its_own_model_is_refused(saved, damage, tmp_path):
    """All of it is consistent: somebody made the manifest to go with it."""
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    file = folder / "model.safetensors"
    facts = manifest.load(folder)
    tensors = load_file(file)
    if damage == "a layer more":
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors["model.extra.weight"] = tensors[name].clone()
    elif damage == "a tensor less":
        del tensors["model.norm.weight"]
    else:
        facts["format"] = "dens"
    save_file(tensors, file, metadata={"format": "pt", manifest.KEY: facts["order"]})
    reseal(folder, facts, file)
    reason = "which LlamaForCausalLM has|no format that is installed"
    with pytest.raises(ArtifactError, match=reason):
        convert(folder, tmp_path / "out", "dense")
