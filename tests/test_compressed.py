"""A compressed model keeps its promises, is measured on the values that load, and loads in stock transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from optimum_order import CompressedModel, JointCompressor, Order
from optimum_order.artifact import config, hub, manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.data.images import digits
from optimum_order.errors import ArtifactError, FormatError, ModelError, OutputError
from optimum_order.models import precision

SCRIPT = Path(__file__).parent / "reload_stock.py"
INPUTS = torch.arange(1, 25).view(2, 12) % 61  # the inputs of reload_stock.py

# The seven methods at two settings each.
STAGES = [
    ("magnitude:0.5", "magnitude(pattern=2:4)"),
    ("wanda:0.3", "wanda(pattern=4:8)"),
    ("sparsegpt:0.5", "sparsegpt(pattern=2:4)"),
    ("rtn:4", "rtn(bits=3, group_size=32, clip=none)"),
    ("gptq:4", "gptq(bits=3, group_size=-1, act_order=false)"),
    ("bitsandbytes:nf4", "bitsandbytes:int8"),
    ("mixed_precision:4", "mixed_precision(bits=3, quantizer=rtn, first=weaker)"),
]
METHODS = [settings[0].split(":")[0] for settings in STAGES]
PRUNERS = ("magnitude", "wanda", "sparsegpt")
SPARSITY = {"magnitude:0.5": 0.5, "wanda:0.3": 0.3, "sparsegpt:0.5": 0.5}


@pytest.fixture(scope="module")
def compressor(tiny_llama_folder):
    ids = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    return JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=ids, sequence_length=24, device="cpu"
    )


@pytest.fixture(scope="module")
def classifiers():
    """The embedded image classifiers, by name."""
    return {
        name: JointCompressor.from_pretrained(name, calibration_samples=32, device="cpu")
        for name in ("tiny-vit", "tiny-resnet")
    }


def reloaded(folders, root):
    """Return what stock transformers in one fresh process makes of each folder."""
    results = root / "results"
    results.mkdir()
    subprocess.run([sys.executable, SCRIPT, results, *folders], check=True, cwd=root)
    return [load_file(results / f"{index}.safetensors") for index in range(len(folders))]


@pytest.fixture(scope="module")
def pairs(compressor, tmp_path_factory):
    """Every pair of methods, by the first: compressed, saved and reloaded.

    Each method is at both settings, as the first stage and as the second.
    """
    root = tmp_path_factory.mktemp("pairs")
    made = []
    for i, first in enumerate(STAGES):
        for j, second in enumerate(STAGES):
            order = f"{first[(i + j) % 2]} > {second[(i // 2 + j) % 2]}"
            folder = root / str(len(made))
            compressed = compressor.compress(order, progress=False)
            compressed.save_pretrained(folder)
            made.append((METHODS[i], compressed, folder))
    loaded = reloaded([folder for _, _, folder in made], root)
    by_first = {first: [] for first in METHODS}
    for (first, compressed, folder), tensors in zip(made, loaded, strict=True):
        by_first[first].append((compressed, folder, tensors))
    return by_first


def least_sparsity(order):
    """Return the sparsity that the pruning stages of an order reach at least; 0 without any."""
    prunes = [stage for stage in order if stage.method in PRUNERS]
    return max((SPARSITY.get(str(stage), 0.5) for stage in prunes), default=0.0)


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.slow
def test_pairs_keep_the_invariants_and_reload_exactly(pairs, first):
    assert len(pairs[first]) == len(STAGES)
    for compressed, folder, loaded in pairs[first]:
        order = compressed.order
        prunes = [stage for stage in order if stage.method in PRUNERS]
        sparsity = least_sparsity(order)
        # More where an N:M pattern has to hold on top of what is already gone.
        margin = 0.15 if "pattern" in str(order) else 0.02
        for name, state in compressed.layers.items():
            state.check(name)
            assert torch.equal(compressed.model.get_parameter(f"{name}.weight"), state.weight)
            assert (state.grid is not None) == (len(prunes) < 2)
            if prunes:
                removed = state.weight[state.pruned]
                assert not removed.any()
                assert not torch.signbit(removed).any()
                assert sparsity - 0.02 < state.sparsity < sparsity + margin
            else:
                assert state.pruned is None
            assert torch.equal(loaded[f"{name}.weight"].to(state.weight.dtype), state.weight), name
        config = json.loads((folder / "config.json").read_text())
        method = config.get("quantization_config", {}).get("quant_method", "dense")
        quantizers = [stage.method for stage in order if stage.method not in PRUNERS]
        if not quantizers:
            assert method == "dense"
        elif quantizers[-1] == "bitsandbytes":
            assert method == "bitsandbytes"
        else:
            assert method == "compressed-tensors"
        if method != "bitsandbytes":
            with torch.inference_mode():
                assert torch.equal(loaded["outputs"], compressed.model(INPUTS).logits)
        assert verify(folder) == []


VISION = [
    "magnitude:0.5 > rtn:4",
    "rtn(bits=3, group_size=32) > wanda:0.5",
    "sparsegpt:0.5 > gptq:4",
    "gptq:3 > sparsegpt(pattern=2:4)",
    "wanda(pattern=2:4) > bitsandbytes:nf4",
    "bitsandbytes:int8 > wanda:0.5",
    "magnitude:0.5 > mixed_precision:4",
]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
@pytest.mark.slow
def test_pairs_on_image_classifiers_keep_the_invariants_and_reload_exactly(
    classifiers, tmp_path, name
):
    folders = {order: tmp_path / str(index) for index, order in enumerate(VISION)}
    made = {}
    for order, folder in folders.items():
        made[order] = classifiers[name].compress(order, progress=False)
        made[order].save_pretrained(folder)
    for (order, compressed), loaded in zip(
        made.items(), reloaded(list(folders.values()), tmp_path), strict=True
    ):
        model = compressed.model
        for layer, state in compressed.layers.items():
            state.check(layer)
            assert state.grid is not None
            assert 0.48 < state.sparsity < 0.52
            assert torch.equal(model.get_parameter(f"{layer}.weight").flatten(1), state.weight)
        for parameter_name, parameter in model.named_parameters():
            # All of them: nothing may come back random.
            assert torch.equal(loaded[parameter_name].to(parameter.dtype), parameter)
        config = json.loads((folders[order] / "config.json").read_text())
        method = config.get("quantization_config", {}).get("quant_method", "dense")
        packed = "bitsandbytes" if "bitsandbytes" in order else "compressed-tensors"
        assert method == (packed if name == "tiny-vit" else "dense")
        if method != "bitsandbytes":
            size = getattr(model.config, "image_size", 32)
            pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)[..., :size, :size]
            with torch.no_grad():
                expected = model(pixels).logits
            # A convolution of the same numbers elsewhere in memory may round otherwise.
            tolerance = 0 if name == "tiny-vit" else 1e-5
            assert torch.allclose(loaded["outputs"], expected, rtol=0, atol=tolerance)
        assert verify(folders[order]) == []


class TestEvaluate:
    @pytest.mark.parametrize(
        "order", ["bitsandbytes:nf4", "bitsandbytes:int8", "wanda:0.5 > gptq:4"]
    )
    @pytest.mark.slow
    def test_leaves_what_is_saved_untouched(self, compressor, text_file, tmp_path, order):
        """bitsandbytes repacks its weights on the first forward."""
        compressed = compressor.compress(order, progress=False)
        measured = compressed.evaluate(str(text_file), progress=False)
        compressor.evaluate(str(text_file), progress=False)
        compressed.save_pretrained(tmp_path / "out")
        manifest = json.loads((tmp_path / "out" / "optimum_order.json").read_text())
        metric = manifest["metrics"]["perplexity"]
        assert metric["after"]["value"] == measured.value
        assert metric["before"]["value"] > 1
        (loaded,) = reloaded([tmp_path / "out"], tmp_path)
        for name, state in compressed.layers.items():
            assert torch.equal(loaded[f"{name}.weight"].to(state.weight.dtype), state.weight)

    def test_counts_only_for_the_values_that_load(self, compressor, text_file, tmp_path):
        compressed = compressor.compress("bitsandbytes:nf4", progress=False)
        compressed.evaluate(str(text_file), progress=False)

        def metrics(folder, **options):
            compressed.save_pretrained(tmp_path / folder, **options)
            return json.loads((tmp_path / folder / "optimum_order.json").read_text())["metrics"]

        assert metrics("dense", format="dense") == {}
        assert metrics("packed")["perplexity"]["after"]

    def test_on_two_texts_is_two_metrics(self, compressor, text_file, prose, tmp_path):
        (tmp_path / "other.txt").write_text(prose[:5000])
        compressed = compressor.compress("rtn:4", progress=False)
        first = compressed.evaluate(str(text_file), progress=False)
        second = compressed.evaluate(str(tmp_path / "other.txt"), progress=False)
        metrics = compressed.manifest["metrics"]
        assert metrics["perplexity"]["after"]["value"] == first.value
        assert metrics["perplexity on other.txt"]["after"]["value"] == second.value

    def test_of_one_model_by_two_metrics_is_two_figures(self, classifiers):
        original = classifiers["tiny-vit"]
        compressed = original.compress("rtn:2", progress=False)
        fidelity = compressed.evaluate(metric="fidelity", progress=False)
        assert original.evaluate(metric="fidelity", progress=False).value == 0
        accuracy = compressed.evaluate(metric="accuracy", progress=False)
        assert fidelity.value > 0.01
        metrics = compressed.manifest["metrics"]
        assert metrics["fidelity"]["after"]["value"] == fidelity.value
        assert metrics["fidelity"]["before"]["value"] == 0
        assert metrics["accuracy"]["after"]["value"] == accuracy.value
        with pytest.raises(ModelError, match="Did you mean 'accuracy'"):
            compressed.evaluate(metric="acuracy", progress=False)
        with pytest.raises(ModelError, match="Perplexity is for causal language models"):
            compressed.evaluate(metric="perplexity", progress=False)


class TestSave:
    def test_a_folder_is_self_contained(self, compressor, tmp_path):
        compressor.compress("gptq:4", progress=False).save_pretrained(tmp_path / "out")
        generate = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
        text = generate("The", max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert text.startswith("The")

    def test_a_format_that_cannot_hold_a_layer_is_refused(self, compressor, tmp_path):
        compressed = compressor.compress("rtn(bits=4, symmetric=false)", progress=False)
        with pytest.raises(FormatError, match="dense, sparse can"):
            compressed.save_pretrained(tmp_path / "out", format="compressed-tensors")
        with pytest.raises(FormatError, match="Did you mean 'dense'"):
            compressed.save_pretrained(tmp_path / "out", format="denser")
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_not_empty_is_refused(self, compressor, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
        compressed = compressor.compress("magnitude:0.5", progress=False)
        with pytest.raises(OutputError, match="not empty"):
            compressed.save_pretrained(tmp_path / "out")
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]
        with pytest.raises(OutputError, match="'precious.txt'"):
            compressed.save_pretrained(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
        (tmp_path / "out" / "precious.txt").rename(tmp_path / "out" / "config.json")
        compressed.save_pretrained(tmp_path / "out", overwrite=True)
        assert verify(tmp_path / "out") == []

    def test_sparsity_is_that_of_all_layers(self, compressor):
        order = "magnitude(sparsity=0.5, targets=*.mlp.*)"
        compressed = compressor.compress(order, progress=False)
        sizes = {name: state.weight.numel() for name, state in compressed.layers.items()}
        pruned = sum(size for name, size in sizes.items() if ".mlp." in name) / 2
        assert compressed.sparsity == pytest.approx(pruned / sum(sizes.values()))
        assert compressed.manifest["sparsity"] == pytest.approx(compressed.sparsity, abs=1e-6)


class TestManifest:
    def test_says_what_was_done_and_no_more(self, tiny_llama_folder, prose, tmp_path):
        chosen = JointCompressor.from_pretrained(
            tiny_llama_folder,
            calibration=[prose],
            calibration_samples=4,
            sequence_length=32,
            seed=3,
            token="hf_secret",
        )
        order = "wanda(pattern=2:4) > gptq(bits=4, damping=0.02)"
        chosen.compress(order, pause="group", progress=False).save_pretrained(tmp_path / "out")
        files = list((tmp_path / "out").iterdir())
        text = (tmp_path / "out" / "optimum_order.json").read_text()
        manifest = json.loads(text)
        assert manifest["order"] == order
        assert manifest["pause"] == "group"
        assert [stage["method"] for stage in manifest["stages"]] == ["wanda", "gptq"]
        assert manifest["stages"][1]["options"]["group_size"] == "auto"
        assert manifest["seed"] == 3
        assert manifest["calibration"]["tokens"] == 4 * 32
        assert len(manifest["calibration"]["digest"]) == 64
        layer = manifest["layers"]["model.layers.0.mlp.down_proj"]
        # 128 inputs are one group, which is the row.
        assert (layer["bits"], layer["group_size"]) == (4, -1)
        assert (layer["pattern"], layer["sparsity"]) == ("2:4", 0.5)
        assert [stage["stage"] for stage in layer["stages"]] == order.split(" > ")
        assert all(stage["relative_error"] > 0 for stage in layer["stages"])
        beside = {"optimum_order.json", "README.md"}
        assert set(manifest["files"]) == {file.name for file in files} - beside
        assert "hf_secret" not in "".join(file.read_text(errors="ignore") for file in files)
        assert prose[200:260] not in text
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["optimum_order"] == {
            "schema": 1,
            "order": order,
            "manifest": "optimum_order.json",
        }
        assert "optimum_order" not in config["quantization_config"]

    def test_says_what_images_were_used(self, classifiers, tmp_path):
        original = classifiers["tiny-resnet"]
        compressed = original.compress("wanda:0.5", progress=False)
        original.evaluate(progress=False)
        after = compressed.evaluate(progress=False)
        compressed.save_pretrained(tmp_path / "out")
        manifest = json.loads((tmp_path / "out" / "optimum_order.json").read_text())
        calibration = manifest["calibration"]
        assert len(calibration.pop("digest")) == 64
        dtype = precision.choose("auto", torch.float32, torch.device("cpu"))
        assert calibration == {
            "source": "builtin",
            "samples": 32,
            "image_shape": [3, 32, 32],
            "note": "",
            **precision.describe(dtype, torch.device("cpu")),
        }
        metric = manifest["metrics"]["accuracy"]
        assert metric["after"]["value"] == after.value
        assert metric["before"]["value"] > 0.95
        assert metric["after"]["source"] == "builtin"
        assert metric["after"]["digest"] == after.digest
        classify = pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
        images, labels = digits("evaluation")[:2]
        assert classify(Image.fromarray(images[0]))[0]["label"] == str(labels[0])


# What the model does not load


@pytest.fixture(scope="module")
def with_extra(tiny_llama_folder, tmp_path_factory):
    """`tiny_llama_folder` with a block that its config does not count, and a value head."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path_factory.mktemp("extra") / "llama")
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.randn(8, 8),
        "model.layers.2.mlp.eh_proj.weight": torch.randn(8, 16).bfloat16(),
        "v_head.summary.bias": torch.tensor([1, 2, 3], dtype=torch.int64),
    }
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, extra


@pytest.mark.parametrize("low_memory", [False, True])
def test_weights_that_nobody_loads_are_carried_over_and_counted(with_extra, tmp_path, low_memory):
    folder, extra = with_extra
    compressor = JointCompressor.from_pretrained(folder)
    options = {"low_memory": True, "work_dir": tmp_path / "work"} if low_memory else {}
    compressed = compressor.compress("rtn:8", progress=False, **options)
    assert compressor.estimate("rtn:8").steps[-1].exact is False
    saved = tmp_path / "saved"
    compressed.save_pretrained(saved, format="compressed-tensors")
    compressed.close()
    convert(saved, tmp_path / "dense", "dense")
    size = sum(tensor.nbytes for tensor in extra.values())
    for result in (saved, tmp_path / "dense"):
        assert verify(result) == []
        assert manifest.load(result)["unloaded"] == {"tensors": 3, "bytes": size}
        stored: dict[str, torch.Tensor] = {}
        for file in result.glob("*.safetensors"):
            stored |= load_file(file)
        for name, tensor in extra.items():
            assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)


@pytest.fixture(scope="module")
def original(compressor):
    return compressor.compress("wanda:0.5 > gptq:4", progress=False)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    original.evaluate(INPUTS.repeat(2, 2), progress=False)
    original.save_pretrained(folder)
    return folder


class TestSaved:
    """A model that was saved is what it was before."""

    def test_it_has_the_same_values_figures_and_recipe(self, original, folder):
        loaded = CompressedModel.from_pretrained(folder)
        assert str(loaded.order) == "wanda:0.5 > gptq:4" and loaded.schedule == "stage"
        assert loaded.config.model_type == "llama" and loaded.tokenizer.vocab_size
        assert loaded.manifest == manifest.load(folder)
        assert loaded.recipe == config.read(folder)
        for name, state in original.layers.items():
            assert torch.equal(loaded.layers[name].weight, state.weight)
            assert loaded.layers[name].grid is not None
        before = original.evaluate(INPUTS.repeat(2, 2), progress=False)
        assert loaded.evaluate(INPUTS.repeat(2, 2), progress=False).scores == before.scores
        with pytest.raises(ModelError, match="which a saved model does not hold"):
            loaded.evaluate(INPUTS.repeat(2, 2), "fidelity", progress=False)

    def test_it_is_saved_again_as_convert_does(self, folder, tmp_path):
        loaded = CompressedModel.from_pretrained(folder)
        assert loaded.save_pretrained(tmp_path / "same") == "compressed-tensors"
        assert manifest.load(tmp_path / "same") == manifest.load(folder)
        assert loaded.save_pretrained(tmp_path / "dense", format="dense") == "dense"
        convert(folder, tmp_path / "converted", "dense")
        expected = manifest.load(tmp_path / "converted")
        assert manifest.load(tmp_path / "dense") == expected
        assert verify(tmp_path / "dense") == []

    def test_what_is_no_artifact_is_refused(self, tiny_llama_folder, tmp_path):
        with pytest.raises(ArtifactError, match="is not a folder that optimum-order wrote"):
            CompressedModel.from_pretrained(tiny_llama_folder)
        with pytest.raises(ArtifactError, match="There is no folder"):
            CompressedModel.from_pretrained(tmp_path / "missing")

    def test_it_generates_as_transformers_does(self, original):
        inputs = INPUTS[:1]
        ids = original.generate(inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids, original.model.generate(inputs, max_new_tokens=4, do_sample=False))

    def test_an_artifact_is_replaced_and_another_folder_is_not(self, original, folder, tmp_path):
        place = Path(shutil.copytree(folder, tmp_path / "model"))
        with pytest.raises(OutputError, match="not empty"):
            original.save_pretrained(place, format="dense", overwrite=False)
        assert original.save_pretrained(place, format="dense") == "dense"
        assert verify(place) == [] and manifest.load(place)["format"] == "dense"
        (place / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"notes\.txt"):
            original.save_pretrained(place)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            original.save_pretrained(tmp_path / "other")

    def test_shards_are_as_large_as_is_said(self, original, tmp_path):
        original.save_pretrained(tmp_path / "out", format="dense", max_shard_size="100KB")
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
        assert verify(tmp_path / "out") == []

    def test_it_is_pushed_to_the_id_or_to_the_name_of_the_folder(
        self, original, tmp_path, monkeypatch
    ):
        calls = []
        monkeypatch.setattr(hub, "check", lambda *args: calls.append(("check", *args)))
        monkeypatch.setattr(hub, "push", lambda *args, **options: calls.append((*args, options)))
        original.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", private=True)
        options = {"token": "t", "private": True}
        assert calls == [("check", "mine", "t"), (tmp_path / "mine", "mine", options)]
        original.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/model")
        assert calls[-1][1] == "me/model"

    def test_what_a_notebook_shows_is_short(self, original, folder, compressor):
        state = next(iter(original.layers.values()))
        measurement = original.evaluate(INPUTS.repeat(2, 2), progress=False)
        estimate = compressor.estimate("rtn:4")
        things = [original, compressor, original.order, state, measurement, estimate]
        things.append(CompressedModel.from_pretrained(folder))
        for thing in things:
            assert repr(thing).startswith(f"{type(thing).__name__}(") and len(repr(thing)) < 250
            assert "tensor" not in repr(thing).replace("compressed-tensors", "")
            assert thing._repr_html_().startswith(("<table>", "<code>"))
        assert eval(repr(original.order), {"Order": Order}) == original.order
        assert (
            repr(state)
            == "LayerState(64 x 64, float32, 50.0% pruned, 4-bit UniformGrid in rows, 1 note)"
        )
        assert repr(original).count("perplexity") == 1 and "bits/weight" in repr(original)
