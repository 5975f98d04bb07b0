"""Stock `from_pretrained` on `sparse` checkpoints: exact once this package is imported, an error before."""

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
from optimum_order import backends, formats
from optimum_order.formats import safetensors as checkpoint
from optimum_order.formats.base import Layout
from optimum_order.formats.transformers_hook import METHOD, SparseConfig, SparseQuantizer
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_units
from optimum_order.order import Order

ORDER = "magnitude:0.5 > rtn:4"


def save(model, folder, order=ORDER, targets=None, shard="5GB"):
    """Compress a model in place and save it as "sparse"."""
    layers = {}
    for target in [target for unit in find_units(model, targets) for target in unit.targets]:
        state = LayerState(target.read())
        for stage in Order.parse(order):
            state = backends.method(stage).apply(state)
        target.write(state.weight)
        layers[target.name] = (target, state)
    format = formats.choose(model, layers, "sparse")
    checkpoint.write(model, layers, format, folder, header={}, max_shard_size=shard)
    return model


def same(one, other):
    """Whether two models have the same tensors, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(
            one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)
        )
        for name in one
        if one[name].ndim
    )


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    return save(make_model("llama").bfloat16(), folder, shard="1KB"), folder


def load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not model.training
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "auto"},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"dtype": torch.bfloat16},
    ],
)
def test_it_loads_as_stock_users_call_it(saved, options):
    model, folder = saved
    assert len(list(folder.glob("*.safetensors"))) > 5
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
    device_map = {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
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
def test_the_model_has_forgotten_how_it_was_stored(make_model, architecture, tmp_path):
    """It saves, compresses and loads like one that never was anything but dense."""
    model = save(make_model(architecture), tmp_path / "sparse")
    loaded = load(tmp_path / "sparse")
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    assert not loaded.is_quantized
    model.save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert Layout.of(loaded)._pieces == Layout.of(dense)._pieces
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == (
        load_file(tmp_path / "dense" / "model.safetensors").keys()
    )
    assert same(load(tmp_path / "again"), model)
    assert same(save(loaded, tmp_path / "twice", "rtn:3"), load(tmp_path / "twice"))


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_image_classifiers(make_image_model, architecture, tmp_path):
    model = save(
        make_image_model(architecture), tmp_path, "magnitude:0.5 > rtn(bits=4, group_size=-1)"
    )
    stored = load_file(tmp_path / "model.safetensors").values()
    assert sum(tensor.dtype == torch.uint8 for tensor in stored) > 4
    assert same(transformers.AutoModelForImageClassification.from_pretrained(tmp_path), model)


def test_a_base_model_loads_from_the_checkpoint_of_one_with_a_head(saved):
    model, folder = saved
    assert same(transformers.AutoModel.from_pretrained(folder), model.model)


@pytest.mark.parametrize("damage", ["bit", "shape"])
def test_a_damaged_layer_does_not_load(make_model, tmp_path, damage):
    save(make_model("llama"), tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    if damage == "bit":
        tensors[name][-48 * 32 // 4 - 1] ^= (
            1  # of the mask, the last bit of which lies before half as many codes
        )
    else:
        tensors[name] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path)


def test_nothing_is_compressed_while_it_loads(saved, tmp_path):
    saved[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(tmp_path, quantization_config=SparseConfig())


def test_a_transformers_that_is_too_old_is_told(monkeypatch):
    monkeypatch.delattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype")
    with pytest.raises(ImportError, match=r"needs transformers 5\.21 or newer to load, got"):
        SparseQuantizer(SparseConfig()).validate_environment()


WITHOUT = """
import sys, transformers
for auto in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoModel):
    for options in ({}, {"device_map": "auto"}):
        try:
            auto.from_pretrained(sys.argv[1], **options)
        except RuntimeError as error:
            print(error)
assert not any(name.startswith("optimum_order") for name in sys.modules)
"""


def test_without_the_import_it_fails_and_loads_nothing_at_random(saved):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, saved[1]], capture_output=True, text=True, check=True
    )
    assert len(re.findall("ignore_mismatched_sizes", ran.stdout)) == 6
    assert f"Unknown quantization type, got {METHOD}" in ran.stderr


@pytest.mark.parametrize(
    "first", ["optimum_order", "torch, transformers; transformers.LlamaForCausalLM"]
)
def test_the_import_may_come_before_or_after_that_of_transformers(saved, first):
    code = f"""
import sys, {first}
import optimum_order, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(parameter.double().abs().sum().item() for parameter in model.parameters()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, saved[1]], capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) == sum(
        parameter.double().abs().sum().item() for parameter in saved[0].parameters()
    )


def test_the_package_may_be_imported_again(saved):
    importlib.reload(optimum_order)
    assert same(load(saved[1]), saved[0])


def test_the_config_says_no_more_than_the_method(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": METHOD}
