"""The adapter of a saved folder: what PEFT reads is what was measured, and nothing is trusted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_order import CompressedModel, JointCompressor
from optimum_order.artifact import adapter, card, manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.bench import Load, measure
from optimum_order.cli import main
from optimum_order.errors import ArtifactError, FormatError, ModelError
from optimum_order.layers.low_rank import LowRank
from optimum_order.testing import gaussian

IDS = torch.arange(2, 26).view(2, 12)
FORMATS = ("dense", "compressed-tensors", "sparse")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def compressed(tiny_llama_folder, text_file):
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder,
        calibration=str(text_file),
        calibration_samples=4,
        sequence_length=32,
        device="cpu",
    )
    order = "rtn(bits=4, group_size=32, scales=float16) > eora(rank=8, targets=*.mlp.*)"
    return compressor.compress(f"{order} > eora(rank=4, targets=*.self_attn.*)", progress=False)


@pytest.fixture(scope="module")
def saved(compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    for format in FORMATS:
        compressed.save_pretrained(folder / format, format=format)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "compressed-tensors", tmp_path / "out")


def signed(folder, change):
    """Change a manifest and seal it again, with the digests that the files now have."""
    from optimum_order import files

    facts = manifest.load(folder)
    change(facts)
    for name in facts["files"]:
        facts["files"][name] = {
            "sha256": files.sha256(folder / name),
            "bytes": (folder / name).stat().st_size,
        }
    manifest.write({key: value for key, value in facts.items() if key != "digest"}, folder)


@pytest.mark.parametrize("format", FORMATS)
def test_our_own_loader_and_the_model_in_memory_agree(saved, compressed, format):
    assert verify(saved / format) == []
    again = CompressedModel.from_pretrained(saved / format, device="cpu")
    assert torch.equal(logits(again.model), logits(compressed.model))
    plain = AutoModelForCausalLM.from_pretrained(saved / format)
    assert not torch.equal(logits(plain), logits(compressed.model)), "the adapter is beside it"
    for name, state in compressed.layers.items():
        mine = again.layers[name]
        assert torch.equal(mine.weight, state.weight)
        assert torch.equal(mine.adapter.a, state.adapter.a), name
        assert torch.equal(mine.adapter.b, state.adapter.b), name


@pytest.mark.parametrize("format", FORMATS)
def test_its_bytes_are_counted_and_foreseen(saved, compressed, format):
    facts = manifest.load(saved / format)
    file = saved / format / "adapter" / "adapter_model.safetensors"
    weights = sum(path.stat().st_size for path in (saved / format).glob("*.safetensors"))
    assert facts["bytes"]["adapter"] == file.stat().st_size
    assert facts["bytes"]["after"] == weights + file.stat().st_size
    stored = sum(state.adapter.nbytes for state in compressed.layers.values())
    assert stored < file.stat().st_size < 1.5 * stored
    shapes = [layer["shape"] for layer in facts["layers"].values()]
    weights = sum(rows * inputs for rows, inputs in shapes)
    per_weight = 8 * facts["bytes"]["adapter"] / weights
    least = {"dense": 32, "compressed-tensors": 4, "sparse": 4}[format]
    assert facts["bytes"]["per_weight_bits"] > least + 0.99 * per_weight
    if format == "dense":
        assert facts["bytes"]["per_weight_bits"] == round(32 + per_weight, 4)
    assert facts["requires"][-1] == "peft"
    assert facts["layers"]["model.layers.0.mlp.up_proj"]["adapter"]["rank"] == 8
    if format != "sparse":
        size = compressed._session.result_bytes(str(compressed.order), format)
        assert size == facts["bytes"]["after"]


def test_another_format_keeps_it(saved, compressed, tmp_path):
    convert(saved / "sparse", tmp_path / "out", "compressed-tensors")
    assert verify(tmp_path / "out") == []
    again = CompressedModel.from_pretrained(tmp_path / "out", device="cpu")
    assert torch.equal(logits(again.model), logits(compressed.model))
    again.save_pretrained(tmp_path / "more", format="dense")
    assert verify(tmp_path / "more") == []


@pytest.mark.parametrize("format", ["gguf", "bitsandbytes", "gptq"])
def test_formats_without_peft_are_refused_before_the_work(
    tiny_llama_folder, text_file, format, saved, tmp_path
):
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder, dtype="bfloat16", calibration=str(text_file), sequence_length=32
    )
    orders = {
        "bitsandbytes": "bitsandbytes:nf4 > eora:4",
        "gptq": "gptq(bits=4, group_size=32) > eora:4",
    }
    order = orders.get(format, "rtn(bits=4, group_size=32) > eora:4")
    with pytest.raises(FormatError, match="PEFT puts adapters on") as error:
        compressor.compress(order, format=format, unproven=True, progress=False)
    assert "\n" not in str(error.value)
    if format == "gguf":
        with pytest.raises(FormatError, match="PEFT puts adapters on"):
            convert(saved / "sparse", tmp_path / "out", format, unproven=True)


def test_several_widths_are_refused_where_peft_finds_no_weight(compressed):
    order = (
        "rtn(bits=4, group_size=32, targets=*.mlp.*) > rtn(bits=8, targets=*.self_attn.*) > eora:4"
    )
    with pytest.raises(FormatError, match="'compressed-tensors' does not load these layers so"):
        compressed._session.compress(order, format="compressed-tensors", progress=False)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_engines_that_were_not_seen_to_add_it_are_refused(compressed, engine):
    with pytest.raises(FormatError, match="was not seen to load an adapter"):
        compressed._session.compress(
            "rtn(bits=4, group_size=32) > eora:4", engine=engine, progress=False
        )


def test_peft_as_the_engine_takes_what_it_loads(compressed, tmp_path):
    assert compressed.save_pretrained(tmp_path / "out", engine="peft") == "compressed-tensors"


def test_layers_whose_columns_would_move_are_refused(compressed, tmp_path):
    session = compressed._session
    made = session.compress("ecsq:3 > eora:4", progress=False)
    made.save_pretrained(tmp_path / "out", format="coded")
    again = CompressedModel.from_pretrained(tmp_path / "out", device="cpu")
    assert torch.equal(logits(again.model), logits(made.model))
    with pytest.raises(FormatError, match="would change what the adapter reads"):
        convert(tmp_path / "out", tmp_path / "more", "compressed-tensors", unproven=True)


def test_no_run_goes_on_from_it(folder, text_file):
    with pytest.raises(ModelError, match="has an adapter, made for the weights"):
        JointCompressor.from_pretrained(folder).compress("magnitude:0.5", progress=False)


def test_it_is_measured_with_its_adapter(folder, compressed, text_file):
    measured = JointCompressor.from_pretrained(folder, sequence_length=32, device="cpu").evaluate(
        str(text_file), progress=False
    )
    assert measured.value == compressed.evaluate(str(text_file), progress=False).value


def test_engines_do_not_measure_it_without(folder):
    with pytest.raises(ArtifactError, match="has an adapter, which no engine here adds"):
        measure(folder, [], Load(1, 1, 1, 1, 1))


def test_a_tampered_adapter_is_noticed(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify(folder) == [
        "adapter/adapter_model.safetensors was changed after it was written: its sha256 does not "
        "match."
    ]
    signed(folder, lambda facts: None)
    (problem,) = verify(folder)
    assert "has another adapter than the one that was measured" in problem


def test_files_that_do_not_fit_the_manifest_are_refused(saved, tmp_path):
    def config(folder, **changes):
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def tensors(folder, change):
        file = folder / "adapter" / "adapter_model.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file)

    first = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    attacks = {
        "does not fit the layers": lambda f: config(f, lora_alpha=800),
        "not fit the layers": lambda f: config(f, auto_mapping={"base_model_class": "os"}),
        "adapters of other layers": lambda f: tensors(f, lambda t: t.update(more=t[first].clone())),
        "of other layers": lambda f: tensors(f, lambda t: t.pop(first)),
        "another shape": lambda f: tensors(f, lambda t: t.update({first: t[first][:4]})),
        "not in 16 bits": lambda f: tensors(f, lambda t: t.update({first: t[first].float()})),
        "cannot be read": lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(b"x"),
    }
    for words, attack in attacks.items():
        folder = shutil.copytree(saved / "dense", tmp_path / words.replace(" ", "-"))
        attack(folder)
        signed(folder, lambda facts: None)
        assert any(words in problem for problem in verify(folder)), words
        with pytest.raises(ModelError, match=words):
            CompressedModel.from_pretrained(folder)


@pytest.mark.parametrize("rank", [0, -1, 10**9, "8", None, True])
def test_a_rank_that_no_layer_has_is_refused_before_anything_is_read(folder, rank):
    def change(facts):
        facts["layers"]["model.layers.0.mlp.up_proj"]["adapter"] = {"rank": rank}

    signed(folder, change)
    assert any("its rank is" in problem for problem in verify(folder))


def test_a_config_names_each_rank_and_scales_nothing():
    ranks = {"b": 4, "a": 8, "c": 8}
    config = adapter.config(ranks, "CAUSAL_LM")
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {"b": 4}
    assert config["target_modules"] == ["a", "b", "c"]


def test_a_description_tells_two_adapters_apart():
    one = LowRank.rounded(gaussian(2, 8), gaussian(4, 2), torch.float16)
    other = LowRank.rounded(gaussian(2, 8), gaussian(4, 2, 1), torch.float16)
    assert adapter.describe(one) != adapter.describe(other)
    assert adapter.describe(one)["dtype"] == "float16"


def test_the_card_has_the_lines_that_load_it(folder):
    text = str(card.make(manifest.load(folder), "me/small", AutoModelForCausalLM))
    assert 'model = AutoModelForCausalLM.from_pretrained("me/small")' in text
    assert 'model = PeftModel.from_pretrained(model, "me/small", subfolder="adapter")' in text
    assert "pipeline(" not in text and "vllm serve" not in text
    assert "peft`" in text and "of these, the adapter" in text
    other = str(card.make(manifest.load(folder), "me/b", AutoModelForCausalLM, revision="dev"))
    assert 'subfolder="adapter", revision="dev")' in other


def test_inspect_shows_it(folder, capsys):
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(folder)])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "14 with an adapter of rank 4 to 8" in shown and "of these the adapter" in shown
    assert "peft" in shown
