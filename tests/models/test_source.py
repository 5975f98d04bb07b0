"""Where a model comes from: what can be loaded is, what cannot is refused with a reason."""

import json
import os
import shutil
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as prune_methods
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_order import JointCompressor
from optimum_order.errors import ModelError
from optimum_order.models.source import EMBEDDED, Checkpoint, InMemory, auto_class, weights_digest
from optimum_order.models.units import find_units


def open_checkpoint(model, **kwargs):
    settings = {"revision": None, "token": None, "dtype": "auto", "trust_remote_code": False}
    return Checkpoint(model, **(settings | kwargs))


@pytest.fixture
def copy(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def test_loads_afresh_each_time(tiny_llama_folder):
    checkpoint = open_checkpoint(tiny_llama_folder)
    first, second = checkpoint.load(), checkpoint.load()
    first.lm_head.weight.data.zero_()
    assert second.lm_head.weight.any() and not second.training
    assert checkpoint.processor.bos_token == "<s>"
    assert checkpoint.bytes == (tiny_llama_folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("architecture", ["vit", "deit", "resnet"])
def test_what_a_model_reads_is_known_before_it_is_loaded(
    make_image_model, tiny_llama_folder, architecture, tmp_path
):
    model = make_image_model(architecture)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.main_input_name == InMemory.of(model).main_input_name == "pixel_values"
    assert type(checkpoint.load()) is type(model)
    assert open_checkpoint(tiny_llama_folder).main_input_name == "input_ids"


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_models(name):
    checkpoint = open_checkpoint(name)
    assert checkpoint.embedded and checkpoint.id == name and checkpoint.processor is not None
    assert 0 < checkpoint.bytes < 10_000_000
    assert (checkpoint.main_input_name == "input_ids") == (name == "tiny-llama")
    assert not checkpoint.load().training


def test_an_image_processor_without_pillow_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["PIL"] = sys.modules["PIL.Image"] = None
from optimum_order import JointCompressor
from optimum_order.errors import OptimumOrderError
compressor = JointCompressor.from_pretrained("tiny-vit")
try:
    compressor.draw()
except OptimumOrderError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "needs the library Pillow" in done.stdout
    assert "pip install 'optimum-order[vision]'" in done.stdout


def test_weights_in_memory_lie_row_after_row(make_image_model):
    """However they lay before: a convolution's filters are seen as rows of a matrix."""
    model = make_image_model("resnet").to(memory_format=torch.channels_last)
    copied = InMemory.of(model).load()
    assert all(tensor.is_contiguous() for tensor in copied.state_dict().values())
    assert not all(
        tensor.is_contiguous() for tensor in model.state_dict().values()
    )  # the user's own
    assert weights_digest(copied) == weights_digest(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_llama_folder, dtype):
    model = open_checkpoint(tiny_llama_folder, dtype=dtype).load()
    assert model.lm_head.weight.dtype == getattr(torch, dtype)


def test_sharded(tiny_llama_folder, tmp_path):
    whole = open_checkpoint(tiny_llama_folder).load()
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_digest(open_checkpoint(tmp_path / "sharded").load()) == weights_digest(whole)


def test_digest_sees_one_bit(tiny_llama_folder):
    model = open_checkpoint(tiny_llama_folder).load()
    before = weights_digest(model)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert weights_digest(model) != before


def test_missing_folders_and_ids(tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="Cannot read the model 'nobody/nothing'"):
        open_checkpoint("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="Cannot read the model"):
        open_checkpoint(tmp_path / "empty")


def test_pickled_weights_are_refused(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Cannot load the weights"):
        open_checkpoint(copy).load()


def test_missing_weights_are_refused_not_made_up(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.*would be random"):
        open_checkpoint(copy).load()


def test_a_processor_that_cannot_be_read_is_an_error_that_names_its_file(copy):
    whole = {file.name: file.read_bytes() for file in copy.glob("tokenizer*")}
    unknown = json.loads(whole["tokenizer.json"])
    unknown["pre_tokenizer"] = {"type": "FromTheFuture"}
    broken = [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", json.dumps(unknown).encode()),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[1"),
        ("special_tokens_map.json", b"{"),
        ("processor_config.json", b"{"),
    ]
    for name, content in broken:
        (copy / name).write_bytes(content)
        checkpoint = open_checkpoint(copy)
        if checkpoint.processor is None:
            message = str(checkpoint.processor_error)
            assert message.startswith(f"The model has a '{name}' that cannot be used: "), message
            assert "\n" not in message and "magnitude, rtn" in message
        else:
            assert name in ("special_tokens_map.json", "processor_config.json"), name
        (copy / name).unlink()
        if name in whole:
            (copy / name).write_bytes(whole[name])
    assert open_checkpoint(copy).processor is not None
    for file in copy.glob("tokenizer*"):
        file.unlink()
    checkpoint = open_checkpoint(copy)
    assert checkpoint.processor is None and checkpoint.processor_error is None


def test_a_feature_extractor_alone_is_a_processor(tmp_path):
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=[8],
        conv_kernel=[4],
        conv_stride=[2],
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=4000).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.processor.sampling_rate == 4000
    assert checkpoint.main_input_name == "input_values"
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert "'preprocessor_config.json'" in str(open_checkpoint(tmp_path).processor_error)


def test_a_local_path_is_not_given_away(tiny_llama_folder):
    assert open_checkpoint(tiny_llama_folder).id == tiny_llama_folder.name


def test_quantized_checkpoints_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        open_checkpoint(copy)


def test_code_in_a_repository_is_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    hostile = config | {"model_type": "hostile", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(hostile))
    (copy / "evil.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("model_type", "architectures", "expected"),
    [
        ("llama", ["LlamaForCausalLM"], "AutoModelForCausalLM"),
        ("bert", ["BertModel"], "AutoModel"),
        ("bert", ["BertForMaskedLM"], "AutoModelForMaskedLM"),
        ("bert", ["BertLMHeadModel"], "AutoModelForCausalLM"),
        ("vit", ["ViTForImageClassification"], "AutoModelForImageClassification"),
        ("t5", ["T5ForConditionalGeneration"], "AutoModelForSeq2SeqLM"),
        ("t5", ["T5EncoderModel"], "AutoModelForTextEncoding"),
        ("whisper", ["WhisperForConditionalGeneration"], "AutoModelForSpeechSeq2Seq"),
        ("wav2vec2", ["Wav2Vec2ForCTC"], "AutoModelForCTC"),
        # no name: a decoder is a causal LM, all else a base model
        ("llama", None, "AutoModelForCausalLM"),
        ("gpt2", [], "AutoModelForCausalLM"),
        ("bert", None, "AutoModel"),
        ("roberta", None, "AutoModel"),
        ("xlm-roberta", [], "AutoModel"),
        ("modernbert", None, "AutoModel"),
        ("t5", None, "AutoModel"),
        ("bart", None, "AutoModel"),
        ("pegasus", None, "AutoModel"),
        ("whisper", None, "AutoModel"),
        ("vit", None, "AutoModel"),
        ("clip", None, "AutoModel"),
    ],
)
def test_the_auto_class_follows_the_architecture(model_type, architectures, expected):
    config = transformers.AutoConfig.for_model(model_type, architectures=architectures)
    assert auto_class(config) is getattr(transformers, expected)


def test_an_encoder_that_says_decoder_and_no_architecture_is_a_base_model():
    config = transformers.BertConfig(is_decoder=True)
    assert auto_class(config) is transformers.AutoModel


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="'LlamaForMischief'"):
        auto_class(transformers.LlamaConfig(architectures=["LlamaForMischief"]))


def test_in_memory_copies_once_and_loads_copies(tiny_llama_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    source = InMemory.of(model, AutoTokenizer.from_pretrained(tiny_llama_folder))
    model.lm_head.weight.data.zero_()
    loaded = source.load()
    assert loaded.lm_head.weight.any()
    loaded.lm_head.weight.data.zero_()
    assert source.load().lm_head.weight.any()
    with pytest.raises(ModelError, match="transformers model"):
        InMemory.of(torch.nn.Linear(2, 2))


# Models in memory, as people have them


def test_what_torch_wraps_around_a_model_is_taken_off(make_model):
    model = make_model("llama")
    expected = model.state_dict()
    in_place = make_model("llama")
    in_place.load_state_dict(expected)
    in_place.compile(backend="eager")
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model), in_place):
        loaded = InMemory.of(wrapped).load()
        assert type(loaded) is type(model)
        assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
        assert loaded(torch.arange(4)[None]).logits.isfinite().all()


def test_weights_that_are_elsewhere_or_computed_are_refused_in_one_line(make_model):
    offloaded = accelerate.cpu_offload(make_model("llama"))
    with pytest.raises(ModelError, match="not in memory"):
        InMemory.of(offloaded)
    adapted = make_model("llama")
    adapted.peft_config = {}
    with pytest.raises(ModelError, match="merge it first"):
        InMemory.of(adapted)
    with pytest.raises(ModelError, match="transformers model is needed"):
        InMemory.of(nn.Linear(2, 2))

    def prune(layer):
        prune_methods.l1_unstructured(layer, "weight", amount=0.5)

    def parametrize(layer):
        parametrizations.weight_norm(layer)

    for change in (prune, parametrize):
        model = make_model("llama")
        change(model.model.layers[0].mlp.up_proj)
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj' is computed"):
            find_units(model)
        assert find_units(model, ignore=["*.up_proj"])


def test_what_transformers_would_not_save_is_found_before_the_work(make_model):
    model = make_model("llama")
    model.generation_config.temperature = 0.7
    with pytest.raises(ModelError, match=r"will not save this LlamaForCausalLM: .*generation"):
        JointCompressor(model).compress("rtn:4", progress=False)


def test_a_folder_with_an_adapter_is_named_as_one(copy, tmp_path):
    (tmp_path / "lora").mkdir()
    for folder in (copy, tmp_path / "lora"):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
        with pytest.raises(ModelError, match="holds an adapter"):
            JointCompressor.from_pretrained(folder)


def test_a_pipe_is_not_waited_for_and_a_long_name_is_no_folder(copy, tmp_path):
    os.mkfifo(copy / "chat_template.jinja")
    with pytest.raises(ModelError, match=r"'chat_template\.jinja' in .* is a pipe"):
        JointCompressor.from_pretrained(copy)
    (copy / "chat_template.jinja").unlink()
    (copy / "added_tokens.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="a device"):
        JointCompressor.from_pretrained(copy)
    for name in ("n" * 300, f"./{'n' * 300}", str(tmp_path.joinpath(*["d" * 200] * 21))):
        with pytest.raises(ModelError):
            JointCompressor.from_pretrained(name)
