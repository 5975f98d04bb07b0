"""Stock `from_pretrained` on `sparse` checkpoints: exact once this package is imported."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import optimum_order
from optimum_order import formats
from optimum_order.errors import ArtifactError
from optimum_order.formats import transformers_hook
from optimum_order.formats.layout import Layout
from optimum_order.formats.transformers_hook import METHOD
from optimum_order.models.quantizer import OwnConfig, OwnQuantizer
from optimum_order.testing import same_bits

ORDER = "magnitude:0.5 > rtn:4"


@pytest.fixture(scope="session")
def save(compressed):
    """Compress a model in place and save it as "sparse"."""

    def save(model, folder, order=ORDER, shard="5GB"):
        contents = compressed(model, order)
        codec = formats.choose(contents, "sparse")
        folder.mkdir(exist_ok=True)
        container = formats.container("sparse")
        container.write(contents, codec, folder, header={}, max_shard_size=shard)
        return model

    return save


def same(one, other):
    """Whether two models have the same tensors, bit for bit."""
    tensors = one.state_dict()
    others = other.state_dict()
    return tensors.keys() == others.keys() and all(
        same_bits(tensor, others[name]) for name, tensor in tensors.items() if tensor.ndim
    )


@pytest.fixture(scope="module")
def saved(make_model, save, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    return save(make_model("llama").bfloat16(), folder, shard="1KB"), folder


def load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not model.training
    return model


def test_it_loads_as_stock_users_call_it(saved):
    model, folder = saved
    assert len(list(folder.glob("*.safetensors"))) > 5
    for options in [
        {},
        {"dtype": "auto"},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"dtype": torch.bfloat16},
    ]:
        assert same(load(folder, **options), model)
        assert same(transformers.LlamaForCausalLM.from_pretrained(folder, **options), model)


def test_another_dtype_is_cast_to_as_a_dense_checkpoint_would_be(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float16):
        assert same(load(folder, dtype=dtype), load(tmp_path, dtype=dtype))


def test_modules_that_are_kept_in_float32_are(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"up_proj"})
    loaded = load(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "up_proj" in name else torch.bfloat16)
        assert torch.equal(parameter, model.get_parameter(name).to(parameter.dtype))


def test_what_was_offloaded_to_disk_is_decoded_too(saved, tmp_path):
    _, folder = saved
    resident = ["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"]
    device_map = dict.fromkeys(resident, "cpu") | {"model.layers.1": "disk"}
    loaded = load(folder, device_map=device_map, offload_folder=tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, load(folder)(ids).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_loads_onto_a_gpu(saved):
    model, folder = saved
    loaded = load(folder, device_map="cuda")
    assert loaded.device.type == "cuda" and same(loaded.cpu(), model)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe"])
def test_the_model_has_forgotten_how_it_was_stored(make_model, save, architecture, tmp_path):
    """It saves, compresses and loads like one that never was anything but dense."""
    model = save(make_model(architecture), tmp_path / "sparse")
    loaded = load(tmp_path / "sparse")
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    assert not loaded.is_quantized
    model.save_pretrained(tmp_path / "dense")
    assert Layout.of(loaded)._pieces == Layout.of(load(tmp_path / "dense"))._pieces
    loaded.save_pretrained(tmp_path / "again")
    one, other = (
        load_file(tmp_path / name / "model.safetensors").keys() for name in ("again", "dense")
    )
    assert one == other
    assert same(load(tmp_path / "again"), model)
    assert same(save(loaded, tmp_path / "twice", "rtn:3"), load(tmp_path / "twice"))


def test_image_classifiers(make_image_model, save, tmp_path):
    for architecture in ("vit", "resnet"):
        folder = tmp_path / architecture
        order = "magnitude:0.5 > rtn(bits=4, group_size=-1)"
        model = save(make_image_model(architecture), folder, order)
        stored = load_file(folder / "model.safetensors").values()
        assert sum(tensor.dtype == torch.uint8 for tensor in stored) > 4
        assert same(transformers.AutoModelForImageClassification.from_pretrained(folder), model)


def test_a_base_model_loads_from_the_checkpoint_of_one_with_a_head(saved):
    model, folder = saved
    assert same(transformers.AutoModel.from_pretrained(folder), model.model)


@pytest.mark.parametrize("damage", ["bit", "shape"])
def test_a_damaged_layer_does_not_load(make_model, save, tmp_path, damage):
    save(make_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    if damage == "bit":
        # of the mask, the last bit of which lies before half as many codes
        tensors[name][-48 * 32 // 4 - 1] ^= 1
    else:
        tensors[name] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path)


def test_nothing_is_compressed_while_it_loads(saved, tmp_path):
    saved[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(tmp_path, quantization_config=OwnConfig())


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.delattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype")
    with pytest.raises(ImportError, match=r"needs transformers 5\.21 or newer to load, got"):
        OwnQuantizer(OwnConfig()).validate_environment()


WITHOUT = """
import sys, transformers
for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"):
    for options in ({}, {"device_map": "auto"}):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[1], **options)
        except RuntimeError as error:
            print(error)
assert not any(name.startswith("optimum_order") for name in sys.modules)
"""
AFTER = """
import sys, {first}
import optimum_order, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(parameter.double().abs().sum().item() for parameter in model.parameters()))
"""


def run(code, folder):
    command = [sys.executable, "-c", code, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_without_the_import_it_fails_and_loads_nothing_at_random(saved):
    done = run(WITHOUT, saved[1])
    assert len(re.findall("ignore_mismatched_sizes", done.stdout)) == 6
    assert f"Unknown quantization type, got {METHOD}" in done.stderr


@pytest.mark.slow
def test_the_import_may_come_before_or_after_that_of_transformers(saved):
    expected = sum(parameter.double().abs().sum().item() for parameter in saved[0].parameters())
    for first in ("optimum_order", "torch, transformers; transformers.LlamaForCausalLM"):
        assert float(run(AFTER.format(first=first), saved[1]).stdout) == expected


def test_the_package_may_be_imported_again(saved):
    importlib.reload(optimum_order)
    assert same(load(saved[1]), saved[0])


def test_the_config_says_no_more_than_the_method_and_the_encoding(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": METHOD, "encoding": "sparse"}


def test_an_encoding_that_is_not_known_is_named():
    with pytest.raises(ArtifactError, match="Unknown encoding 'spares'. Did you mean 'sparse'"):
        transformers_hook.decode("spares", torch.zeros(28, dtype=torch.uint8))
