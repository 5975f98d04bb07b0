"""What transformers does where nobody promises it: each test names the version it was seen in.

A test that fails under another version of transformers says which function of `hf.py` needs work.
"""

import copy
import inspect
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_order.models import hf


def test_auto_classes_list_what_each_auto_class_loads():
    """`modeling_auto.MODEL_FOR_..._MAPPING_NAMES`, names or tuples of names.

    Seen in transformers 5.24.0.
    """
    classes = hf.auto_classes()
    assert list(classes) == [
        "AutoModelForCausalLM",
        "AutoModelForImageClassification",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
        "AutoModelForMaskedLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForCTC",
        "AutoModelForAudioClassification",
        "AutoModelForImageTextToText",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForMaskedImageModeling",
        "AutoModelForPreTraining",
        "AutoModel",
        "AutoModelForTextEncoding",
    ]
    assert classes["AutoModelForCausalLM"]["llama"] == ("LlamaForCausalLM",)
    assert "DeiTForImageClassification" in classes["AutoModelForImageClassification"]["deit"]
    for auto, by_type in classes.items():
        for model_type in {"bert", "gpt2", "vit"} & by_type.keys():
            config = transformers.AutoConfig.for_model(model_type)
            with torch.device("meta"):
                model = getattr(transformers, auto).from_config(config)
            assert type(model).__name__ in by_type[model_type]


def test_a_file_that_is_not_required_may_be_missing(tmp_path):
    """`cached_file(..., _raise_exceptions_for_missing_entries=False)`.

    Seen in transformers 5.24.0.
    """
    options = {"revision": None, "token": None}
    (tmp_path / "vocab.txt").write_text("a")
    assert hf.cached_file(str(tmp_path), "vocab.txt", **options) == str(tmp_path / "vocab.txt")
    assert hf.cached_file(str(tmp_path), "vocab.json", required=False, **options) is None
    assert hf.cached_file("nobody/nothing", "vocab.json", required=False, **options) is None
    with pytest.raises(OSError, match=r"vocab\.json"):
        hf.cached_file(str(tmp_path), "vocab.json", **options)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        hf.cached_file("nobody/nothing", "config.json", **options)


def test_conv1d_multiplies_with_its_weight_as_in_out():
    """`pytorch_utils.Conv1D(out, in)`.

    Seen in transformers 5.24.0.
    """
    layer = hf.Conv1D(3, 4)
    x = torch.randn(2, 4)
    assert layer.weight.shape == (4, 3)
    assert torch.allclose(layer(x), x @ layer.weight + layer.bias)


def test_fused_experts_say_how_their_matrices_lie(make_model):
    """`is_transposed` on every module of fused experts, and on no other.

    Seen in transformers 5.24.0.
    """
    for architecture, transposed in [("mixtral", False), ("qwen3_moe", False), ("gpt_oss", True)]:
        model = make_model(architecture)
        for name, module in model.named_modules():
            expected = transposed if name.endswith(".experts") else None
            assert hf.experts_transposed(module) is expected
        down = model.model.layers[0].mlp.experts.down_proj
        sizes = model.config.hidden_size, down.shape[1 if transposed else 2]
        assert down.shape[1:] == (sizes[::-1] if transposed else sizes)
    assert hf.experts_transposed(nn.Linear(2, 2)) is None


def test_eager_experts_multiply_one_expert_at_a_time(make_model, batches):
    """`config._experts_implementation`, "eager" among its values.

    Seen in transformers 5.24.0.
    """

    class Products(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.weights = set()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.linear or function is torch.Tensor.matmul:
                self.weights.add(args[1].data_ptr())
            return function(*args, **(kwargs or {}))

    for architecture in ("mixtral", "qwen3_moe"):
        model = make_model(architecture)
        implementation = model.config._experts_implementation
        assert implementation != "eager"
        experts = model.model.layers[0].mlp.experts
        matrices = {matrix.data_ptr() for matrix in experts.gate_up_proj}
        with torch.no_grad():
            with Products() as ordinary:
                expected = model(**batches[0]).logits
            with pytest.raises(RuntimeError), hf.eager_experts(model), Products() as eager:
                logits = model(**batches[0]).logits
                raise RuntimeError
        assert not matrices <= ordinary.weights and matrices <= eager.weights
        assert model.config._experts_implementation == implementation
        assert torch.allclose(logits, expected, atol=1e-5)
    with hf.eager_experts(make_model("llama")):
        pass


def test_ties_are_a_record_that_can_be_changed(make_model):
    """`all_tied_weights_keys` maps a duplicate to the weight it repeats.

    Seen in transformers 5.24.0.
    """
    model = make_model("qwen3", tie_word_embeddings=True)
    assert hf.ties(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    hf.ties(model).pop("lm_head.weight")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights(recompute_mapping=False)  # as `from_pretrained` calls it
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert hf.ties(make_model("qwen3", tie_word_embeddings=False)) == {}


def test_loading_of_weights_can_be_replaced(make_model, tmp_path):
    """`PreTrainedModel._load_pretrained_model(model, state_dict, files, config)`.

    Seen in transformers 5.24.0.
    """
    before = transformers.PreTrainedModel._load_pretrained_model
    make_model("llama").save_pretrained(tmp_path)
    calls = []

    def load(model, files, config, adapter):
        calls.append((type(model), [*files], adapter))
        assert all(parameter.is_meta for parameter in model.parameters())
        stored = {key: torch.empty(0, device="meta") for key in ["not.in.the.model"]}
        stored |= {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
        info = hf.load_without_values(model, stored, config)
        assert not info.missing_keys and not info.mismatched_keys and not info.conversion_errors
        assert info.unexpected_keys == {"not.in.the.model"}
        return info

    with hf.weight_loader(load):
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert calls == [(transformers.LlamaForCausalLM, [str(tmp_path / "model.safetensors")], False)]
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"not.in.the.model"}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert inspect.signature(before).parameters.keys() >= {
        "model",
        "state_dict",
        "checkpoint_files",
        "load_config",
    }
    assert transformers.PreTrainedModel._load_pretrained_model is before
    with pytest.raises(RuntimeError), hf.weight_loader(load):
        raise RuntimeError
    assert transformers.PreTrainedModel._load_pretrained_model is before
    assert not any(
        parameter.is_meta
        for parameter in transformers.LlamaForCausalLM.from_pretrained(tmp_path).parameters()
    )


def test_missing_and_misshapen_tensors_are_noticed_without_values(make_model, tmp_path):
    """`convert_and_load_state_dict_in_model` with `device_map={"": "meta"}`.

    Seen in transformers 5.24.0.
    """
    make_model("llama").save_pretrained(tmp_path)
    norm, head = "model.norm.weight", "lm_head.weight"

    def load(model, files, config, adapter):
        stored = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
        del stored[norm]
        stored[head] = stored[head][:-1]
        info = hf.load_without_values(model, stored, config)
        assert norm in info.missing_keys
        assert head in str(info.mismatched_keys)
        return info

    with hf.weight_loader(load), pytest.raises(RuntimeError):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_stored_tensors_become_the_models(make_model, tmp_path):
    """`rename_source_key`, `WeightConverter.add_tensor` and `convert`.

    Seen in transformers 5.24.0.
    """
    for architecture, fused in [("mixtral", True), ("gpt2", False)]:
        model = make_model(architecture)
        folder = tmp_path / architecture
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        sources = {}

        def load(empty, files, config, adapter, stored=stored, sources=sources):
            names = hf.CheckpointNames(empty, config)
            assert names.destination("not.in.the.model") is None
            for key in hf.sorted_keys(stored):
                name, pattern, converter = names.destination(key)
                sources.setdefault(name, (converter, []))[1].append((key, pattern))
            tensors = {key: tensor.to("meta") for key, tensor in stored.items()}
            return hf.load_without_values(empty, tensors, config)

        with hf.weight_loader(load):
            type(model).from_pretrained(folder)
        made = {}
        for name, (converter, keys) in sources.items():
            if converter is None:
                assert len(keys) == 1
                made[name] = stored[keys[0][0]]
                continue
            tensors = [(key, pattern, partial(stored.get, key)) for key, pattern in keys]
            made |= hf.convert(converter, name, tensors, model)
            again = hf.convert(converter, name, tensors, model)
            assert all(torch.equal(again[other], made[other]) for other in again)
        assert any(converter is not None for converter, _ in sources.values()) == fused
        state = model.state_dict()
        assert made.keys() == state.keys() - hf.ties(model).keys()
        assert all(torch.equal(made[name], state[name]) for name in made)


def test_names_are_found_with_and_without_the_models_prefix(make_model, tmp_path):
    """`rename_source_key` adds `base_model_prefix` or takes it away.

    Seen in transformers 5.24.0.
    """
    make_model("gpt2").save_pretrained(tmp_path)
    destinations = []

    def load(model, files, config, adapter):
        names = hf.CheckpointNames(model, config)
        destinations.extend(
            names.destination(key) for key in ("wte.weight", "transformer.wte.weight")
        )
        stored = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
        return hf.load_without_values(model, stored, config)

    for cls in (transformers.GPT2LMHeadModel, transformers.GPT2Model):
        with hf.weight_loader(load):
            cls.from_pretrained(tmp_path)
    names = ["transformer.wte.weight"] * 2 + ["wte.weight"] * 2
    assert [name for name, _, _ in destinations] == names
    assert [converter for _, _, converter in destinations] == [None] * 4


def test_stored_names_are_sorted_by_number():
    """`core_model_loading.dot_natural_key`.

    Seen in transformers 5.24.0.
    """
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed"]
    assert hf.sorted_keys(names) == ["embed", "layers.2.a", "layers.2.b", "layers.10.a"]


def test_every_dtype_that_safetensors_writes_is_read(tmp_path):
    """`modeling_utils.str_to_torch_dtype`.

    Seen in transformers 5.24.0.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8):
        file = tmp_path / "one.safetensors"
        save_file({"x": torch.zeros(1, dtype=dtype)}, file)
        with safe_open(file, framework="pt") as opened:
            assert hf.stored_dtype(opened.get_slice("x").get_dtype()) is dtype
    assert hf.stored_dtype("F4") is None


def test_what_is_saved_is_what_save_pretrained_saves(make_model, tmp_path):
    """`remove_tied_weights_from_state_dict`, `revert_weight_conversion`, `_keys_to_ignore_on_save`.

    Seen in transformers 5.24.0.
    """
    cases = [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("mixtral", {}), ("gpt2", {})]
    for architecture, options in cases:
        model = make_model(architecture, **options)
        if architecture == "llama":
            model._keys_to_ignore_on_save = {"model.norm.weight"}
        model.save_pretrained(tmp_path)
        tensors = hf.tensors_to_save(model)
        assert ("model.norm.weight" in tensors) == (architecture in ("qwen3", "mixtral"))
        stored = load_file(tmp_path / "model.safetensors")
        converted = hf.to_checkpoint(model, tensors)
        assert converted.keys() == stored.keys()
        assert all(torch.equal(converted[key], stored[key]) for key in stored)
        renamed = {id(tensor) for tensor in tensors.values()} & set(map(id, converted.values()))
        assert (len(renamed) == len(converted)) == (architecture != "mixtral")


def test_conversions_are_remembered_and_undone(make_model):
    """`_weight_conversions` of a model decides how it is saved.

    Seen in transformers 5.24.0.
    """
    model = make_model("mixtral")
    tensors = hf.tensors_to_save(model)
    assert hf.to_checkpoint(model, tensors).keys() != tensors.keys()
    hf.remember_conversions(model, [])
    assert hf.to_checkpoint(model, tensors).keys() == tensors.keys()


def test_modules_that_transformers_replaces_on_load_are_named(make_model):
    """`quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION`.

    Seen in transformers 5.24.0.
    """
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "intermediate_size_mlp": 8}
    config = transformers.Llama4TextConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        moe_layers=[1],
    )
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    experts = "'model.layers.1.feed_forward.experts' (Llama4TextExperts)"
    for method in ("compressed-tensors", "bitsandbytes"):
        assert hf.replaced_on_load(model, method) == experts
        assert hf.replaced_on_load(make_model("llama"), method) is None
    assert hf.replaced_on_load(model, "gptq") is None


def test_modules_left_dense_are_those_that_a_quantizer_leaves_dense(make_model, tmp_path):
    """`get_modules_to_not_convert`, `should_convert_module`, `_keep_in_fp32_modules`.

    Seen in transformers 5.24.0.
    """
    model = make_model("llama")
    model._keep_in_fp32_modules = {"up_proj"}
    patterns = hf.modules_left_dense(model, ["model.layers.1.mlp", "lm_head"])
    assert sorted(patterns) == ["lm_head", "model.layers.1.mlp", "up_proj"]
    for name, dense in [
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.11.mlp.down_proj", False),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.down_proj", False),
        ("lm_head", True),
    ]:
        assert hf.is_left_dense(name, patterns) == dense, name


def test_a_quantizer_of_our_own_is_used_to_load(make_model, tmp_path):
    """`register_quantization`, and the hooks of `HfQuantizer` that loading calls.

    Seen in transformers 5.24.0.
    """
    called = []

    class Config(hf.QuantizationConfigMixin):
        dequantize = True

        def __init__(self, quant_method="test-hf"):
            self.quant_method = quant_method

    class Negate(hf.ConversionOps):
        def convert(self, input_dict, *args, full_layer_name="", model=None, **kwargs):
            called.append(full_layer_name)
            assert isinstance(model, transformers.LlamaForCausalLM)
            return {key: [-tensor for tensor in tensors] for key, tensors in input_dict.items()}

    class Quantizer(hf.HfQuantizer):
        requires_calibration = True
        is_trainable = True

        def is_serializable(self):
            return True

        def validate_environment(self, *args, **kwargs):
            called.append("validate_environment")

        def get_new_dtype(self, converter, parameter, dtype):
            called.append("get_new_dtype")
            return super().get_new_dtype(converter, parameter, dtype)

        def update_weight_conversions(self, conversions, *args):
            self.converter = hf.WeightConverter("weight", "weight", [Negate()])
            return [*conversions, self.converter]

        def _process_model_after_weight_loading(self, model, **kwargs):
            assert self.converter.was_used()
            assert not copy.deepcopy(hf.WeightConverter("a", "b", [Negate()])).was_used()
            called.append("_process_model_after_weight_loading")
            return model

    hf.register_quantization("test-hf", Config, Quantizer)
    hf.register_quantization("test-hf", Config, hf.HfQuantizer)  # the first is its owner
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "test-hf"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[k], -v) for k, v in model.state_dict().items())
    assert {*model.state_dict(), "validate_environment", "get_new_dtype"} <= {*called}
    assert called[-1] == "_process_model_after_weight_loading"
    assert not hasattr(loaded.config, "quantization_config")


def test_a_quantization_is_read_as_another_while_nobody_owns_its_method(monkeypatch):
    """`AutoQuantizationConfig.from_dict` and `AutoHfQuantizer.supports_quant_method`.

    Seen in transformers 5.24.0.
    """
    from transformers.quantizers import auto

    for owner, name in [
        (auto.AutoQuantizationConfig, "from_dict"),
        (auto.AutoHfQuantizer, "supports_quant_method"),
    ]:
        monkeypatch.setattr(owner, name, staticmethod(getattr(owner, name)))
    for _ in range(2):
        hf.translate_quantization("test-old", lambda entry: {"quant_method": "optimum_order"})
    read = auto.AutoQuantizationConfig.from_dict
    assert read({"quant_method": "test-old"}).quant_method == "optimum_order"
    assert auto.AutoHfQuantizer.supports_quant_method({"quant_method": "test-old"})
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "test-old", transformers.AwqConfig)
    assert isinstance(read({"quant_method": "test-old"}), transformers.AwqConfig)


@pytest.mark.slow
def test_this_module_and_our_hook_can_be_imported_in_any_order():
    """What `hf` imports does not import `transformers.quantizers`.

    Seen in transformers 5.24.0.
    """
    code = """
import sys
import optimum_order.models.hf
assert "transformers.quantizers" not in sys.modules
assert "optimum_order.models.quantizer" not in sys.modules
from transformers.quantizers import auto
assert "optimum_order.models.quantizer" in sys.modules
assert "transformers.modeling_utils" not in sys.modules
assert "optimum_order" in auto.AUTO_QUANTIZER_MAPPING
from transformers import PreTrainedModel
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    first = "from transformers import AutoModelForCausalLM\nimport optimum_order.models.quantizer"
    direct = "import optimum_order.models.quantizer\nfrom transformers import PreTrainedModel"
    subprocess.run([sys.executable, "-c", direct], check=True)
    subprocess.run([sys.executable, "-c", f"import optimum_order\n{first}"], check=True)
    subprocess.run([sys.executable, "-c", first], check=True)


def test_nobody_else_reaches_into_transformers():
    """Imports from its submodules, and its private attributes, are in `hf` alone."""
    package = Path(inspect.getfile(hf)).parent.parent
    private = "|".join(
        [
            r"(from|import) transformers\.\w",
            r"\b(all_tied_weights_keys|is_transposed|MODEL_\w+_MAPPING_NAMES)\b",
            r"\b_(experts_implementation|keep_in_fp32_modules|keys_to_ignore_on_save)\b",
            r"\b_(load_pretrained_model|raise_exceptions_for_\w+|weight_conversions)\b",
        ]
    )
    reaching = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(private, file.read_text(encoding="utf-8"))
    }
    assert reaching == {"models/hf.py"}


def test_a_quantizer_is_forgotten_and_what_was_loaded_is_remembered(make_model):
    """A model that was compressed while it was loaded is saved as an ordinary one."""

    class Quantizer:
        def remove_quantization_config(self, model):
            del model.config.quantization_config
            model._weight_conversions = None

    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "optimum_order"}
    model._weight_conversions = conversions = ["as it was loaded"]
    hf.forget_quantization(Quantizer(), model)
    assert not hasattr(model.config, "quantization_config")
    assert model._weight_conversions == conversions


def test_every_name_has_a_test():
    """Each function of `hf` is used in this file."""
    source = inspect.getsource(inspect.getmodule(test_every_name_has_a_test))
    assert [name for name in hf.__all__ if f"hf.{name}" not in source] == []
