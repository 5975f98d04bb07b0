"""From format to format with the same values, or an error that says why not."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError, OutputError
from optimum_order.files import sha256
from optimum_order.formats.safetensors import Safetensors


def compress(model, order, folder, format, *, measured=False):
    """Compress, measure on a little text if wanted, and save; the manifest."""
    compressor = JointCompressor.from_pretrained(model, sequence_length=16)
    compressed = compressor.compress(order, progress=False)
    if measured:
        compressor.evaluate(["one two three " * 40], progress=False)
        compressed.evaluate(["one two three " * 40], format=format, progress=False)
    compressed.save_pretrained(folder, format=format)
    return manifest.load(folder)


@pytest.fixture(scope="module")
def bfloat16(tiny_llama_folder, tmp_path_factory):
    """`tiny_llama_folder`, in the dtype in which most formats hold it."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path_factory.mktemp("bfloat16") / "llama")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def saved(bfloat16, tmp_path_factory):
    """One model in every format."""
    root = tmp_path_factory.mktemp("formats")
    for format in ("dense", "compressed-tensors", "gptq", "sparse"):
        compress(
            bfloat16,
            "magnitude:0.3 > rtn(bits=2, group_size=32)",
            root / format,
            format,
            measured=True,
        )
    compress(
        bfloat16,
        "magnitude:0.5 > bitsandbytes:nf4",
        root / "bitsandbytes",
        "bitsandbytes",
        measured=True,
    )
    return root


def values(folder):
    """Every layer's name and value, as the artifact has it."""
    layers = manifest.load(folder)["layers"]
    found = dict(
        Safetensors().read(folder, {name: said["stored"] for name, said in layers.items()})
    )
    return found, {name: state.weight for name, state in found.items()}


CODES = ("compressed-tensors", "gptq", "sparse")
POSSIBLE = [(one, other) for one in CODES for other in ("dense", *CODES)]
POSSIBLE += [
    ("dense", "dense"),
    ("dense", "sparse"),
    ("bitsandbytes", "dense"),
    ("bitsandbytes", "bitsandbytes"),
]


@pytest.mark.parametrize(("source", "format"), POSSIBLE)
def test_the_values_are_the_same(saved, source, format, tmp_path):
    written = convert(saved / source, tmp_path / "out", format)
    assert written == manifest.load(tmp_path / "out") and written["format"] == format
    assert verify(tmp_path / "out") == []
    (before, weights), (after, found) = values(saved / source), values(tmp_path / "out")
    assert list(weights) == list(found)
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name].view(torch.uint8), weight.view(torch.uint8))
        if before[name].grid is not None and format != "dense" and source != "bitsandbytes":
            assert torch.equal(after[name].grid.scale, before[name].grid.scale)
    others = {
        name
        for name in load_file(saved / "dense" / "model.safetensors")
        if name.removesuffix(".weight") not in weights
    }
    for name in others:
        tensors = [
            load_file(folder / "model.safetensors")[name]
            for folder in (saved / source, tmp_path / "out")
        ]
        assert torch.equal(*tensors)


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "sparse"])
def test_what_is_written_loads_to_the_same_model(saved, format, tmp_path):
    convert(saved / "sparse", tmp_path / "out", format)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (
            transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (saved / "dense", tmp_path / "out")
        )
    assert torch.equal(one, other)


def test_the_manifest_keeps_what_was_done_and_says_anew_what_is_stored(saved, tmp_path):
    stated = manifest.load(saved / "sparse")
    written = convert(saved / "sparse", tmp_path / "out", "compressed-tensors")
    direct = manifest.load(saved / "compressed-tensors")
    changed = {"format", "bytes", "files", "layers", "digest"}
    assert {key: value for key, value in written.items() if key not in changed} == {
        key: value for key, value in stated.items() if key not in changed
    }
    assert written["layers"] == direct["layers"] and written["bytes"] == direct["bytes"]
    assert written["metrics"]["perplexity"]["after"] == stated["metrics"]["perplexity"]["after"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (saved / "sparse").iterdir()}
    assert set(written["files"]) == names - {manifest.FILE}
    config, expected = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "out", saved / "compressed-tensors")
    )
    assert config == expected
    tensors = [
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", saved / "compressed-tensors")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_metrics_of_other_kernels_are_left_out(saved, tmp_path):
    assert manifest.load(saved / "bitsandbytes")["metrics"]
    assert convert(saved / "bitsandbytes", tmp_path / "dense", "dense")["metrics"] == {}
    assert convert(saved / "bitsandbytes", tmp_path / "same", "bitsandbytes")["metrics"]


def test_a_generation_config_comes_along(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "in")
    config = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(config))
    facts = manifest.load(folder)
    file = folder / "generation_config.json"
    facts["files"][file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    manifest.write({key: value for key, value in facts.items() if key != "digest"}, folder)
    convert(folder, tmp_path / "out", "dense")
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    )


class TestMasks:
    def test_sparse_keeps_its_own(self, saved, tmp_path):
        convert(saved / "sparse", tmp_path / "out", "sparse")
        one, other = (
            load_file(folder / "model.safetensors")
            for folder in (saved / "sparse", tmp_path / "out")
        )
        assert one.keys() == other.keys() and all(
            torch.equal(tensor, other[name]) for name, tensor in one.items()
        )

    def test_zeros_are_the_mask_if_there_are_as_many_of_them(self, bfloat16, tmp_path):
        """Few weights are exactly zero if nothing rounded them."""
        compress(bfloat16, "magnitude:0.5", tmp_path / "dense", "dense")
        compress(bfloat16, "magnitude:0.5", tmp_path / "sparse", "sparse")
        convert(tmp_path / "dense", tmp_path / "out", "sparse")
        expected, found = values(tmp_path / "sparse")[0], values(tmp_path / "out")[0]
        assert all(
            torch.equal(found[name].pruned, state.pruned) for name, state in expected.items()
        )

    @pytest.mark.parametrize("source", ["compressed-tensors", "gptq", "dense"])
    def test_zeros_are_no_mask_if_there_are_more(self, saved, source, tmp_path):
        written = convert(saved / source, tmp_path / "out", "sparse")
        known, found = values(saved / "sparse")[0], values(tmp_path / "out")[0]
        assert all(
            int((state.weight == 0).sum()) > int(state.pruned.sum()) for state in known.values()
        )
        assert all(state.pruned is None for state in found.values())
        stated = manifest.load(saved / "sparse")
        assert [said["pruned"] for said in written["layers"].values()] == [
            said["pruned"] for said in stated["layers"].values()
        ]
        if source != "dense":  # they are left out all the same
            assert written["bytes"]["per_weight_bits"] < stated["bytes"]["per_weight_bits"]
        convert(tmp_path / "out", tmp_path / "back", source)
        assert verify(tmp_path / "back") == []

    def test_a_layer_that_nothing_was_pruned_of_has_none(self, bfloat16, tmp_path):
        compress(bfloat16, "rtn:4", tmp_path / "in", "compressed-tensors")
        convert(tmp_path / "in", tmp_path / "out", "sparse")
        assert all(state.pruned is None for state in values(tmp_path / "out")[0].values())


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe", "opt"])
@pytest.mark.parametrize(
    "order", ["magnitude:0.5 > rtn(bits=4, group_size=8)", "magnitude(sparsity=0.5, pattern=2:4)"]
)
def test_every_architecture(make_model, architecture, order, tmp_path):
    make_model(architecture).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", order, tmp_path / "sparse", "sparse")
    convert(tmp_path / "sparse", tmp_path / "dense", "dense")
    (tmp_path / "dense" / "generation_config.json").unlink(missing_ok=True)
    convert(tmp_path / "sparse", tmp_path / "again", "sparse")
    loaded = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("sparse", "dense", "again")
    ]
    for other in loaded[1:]:
        assert loaded[0].keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in loaded[0].items())


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_image_classifiers(make_image_model, architecture, tmp_path):
    make_image_model(architecture).save_pretrained(tmp_path / "model")
    compress(
        tmp_path / "model",
        "magnitude:0.5 > rtn(bits=4, group_size=-1)",
        tmp_path / "sparse",
        "sparse",
    )
    convert(tmp_path / "sparse", tmp_path / "dense", "dense")
    auto = transformers.AutoModelForImageClassification
    one, other = (
        auto.from_pretrained(tmp_path / name).state_dict() for name in ("sparse", "dense")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_folder_is_replaced_only_if_told_even_by_itself(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    with pytest.raises(OutputError, match="not empty"):
        convert(folder, folder, "dense")
    convert(folder, folder, "dense", overwrite=True)
    assert manifest.load(folder)["format"] == "dense" and verify(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_format_that_cannot_hold_it_says_why(saved, tmp_path):
    for source, format, reason in [
        ("dense", "compressed-tensors", "No layer is quantised.* What is stored dense are values"),
        ("sparse", "bitsandbytes", "UniformGrid is not a grid of the bitsandbytes library"),
        ("bitsandbytes", "sparse", "BlockGrid is not a grid of equal steps"),
        ("sparse", "sparce", r"Did you mean 'sparse'\?"),
    ]:
        with pytest.raises(FormatError, match=reason):
            convert(saved / source, tmp_path / "out", format)
    assert convert(saved / "sparse", tmp_path / "out")["format"] == "compressed-tensors"


def test_what_does_not_verify_is_not_converted(saved, tmp_path):
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    (folder / "extra.py").write_text("")
    with pytest.raises(
        ArtifactError, match=r"extra\.py is in the folder .* lists all differences \(1\)"
    ):
        convert(folder, tmp_path / "out", "dense")
    with pytest.raises(ArtifactError, match="not a folder that optimum-order wrote"):
        convert(tmp_path, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a layer more", "a tensor less", "a format"])
def test_what_does_not_fit_its_own_model_is_refused(saved, damage, tmp_path):
    """All of it is consistent: somebody made the manifest to go with it."""
    folder = shutil.copytree(saved / "sparse", tmp_path / "model")
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj"
    facts, tensors = manifest.load(folder), load_file(file)
    if damage == "a layer more":
        tensors["model.extra.weight"] = tensors[f"{name}.weight"].clone()
    elif damage == "a tensor less":
        del tensors["model.norm.weight"]
    else:
        facts["format"] = "dens"
    save_file(tensors, file, metadata={"format": "pt", manifest.KEY: facts["order"]})
    facts["files"][file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    manifest.write({key: value for key, value in facts.items() if key != "digest"}, folder)
    with pytest.raises(
        ArtifactError, match=r"which LlamaForCausalLM has|no format that is installed"
    ):
        convert(folder, tmp_path / "out", "dense")
