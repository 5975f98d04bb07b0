"""One method of ours in transformers, that clashes with nobody's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.quantizers import auto

from optimum_order.errors import ArtifactError
from optimum_order.models import quantizer
from optimum_order.models.quantizer import BytesConfig, OwnConfig, OwnQuantizer

OLD = Path(__file__).parents[1] / "fixtures" / "artifact-0.1.0" / "sparse"


def test_one_method_is_registered():
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["optimum_order"] is OwnConfig
    assert auto.AUTO_QUANTIZER_MAPPING["optimum_order"] is OwnQuantizer
    assert (
        "sparse" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.keys() | auto.AUTO_QUANTIZER_MAPPING
    )


CLASH = """
import transformers, sys
from transformers.quantizers import auto

class Theirs(auto.QuantizationConfigMixin):
    def __init__(self, quant_method):
        self.quant_method = quant_method

def register():
    for method in ("sparse", "optimum_order"):
        auto.register_quantization_config(method)(Theirs)
        auto.register_quantizer(method)(auto.HfQuantizer)
"""


def test_a_package_that_owns_a_name_keeps_it_and_nothing_raises():
    code = f"{CLASH}\nregister()\nimport optimum_order\nfrom transformers import PreTrainedModel\n"
    code += "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['optimum_order'] is Theirs\n"
    code += (
        "assert type(auto.AutoQuantizationConfig.from_dict({'quant_method': 'sparse'})) is Theirs"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_transformers_that_is_too_old_is_imported_with_a_warning():
    code = """
import sys, warnings, optimum_order
sys.modules["optimum_order.models.hf"] = None  # which imports what older ones do not have
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import transformers.quantizers.auto
assert any("optimum_order cannot register" in str(one.message) for one in seen), seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_of_the_first_version_is_free_for_others(monkeypatch):
    old = {"quant_method": "sparse"}
    assert isinstance(auto.AutoQuantizationConfig.from_dict(old), OwnConfig)
    assert auto.AutoHfQuantizer.supports_quant_method(old)
    assert not auto.AutoHfQuantizer.supports_quant_method({"quant_method": "sparse", "bits": 2})
    theirs = type("Theirs", (BytesConfig,), {"method": "sparse"})
    mapping = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", mapping)
    auto.register_quantization_config("sparse")(theirs)
    assert type(auto.AutoQuantizationConfig.from_dict(old)) is theirs


def test_folders_of_the_first_version_load_by_any_class():
    model = transformers.AutoModelForCausalLM.from_pretrained(OLD)
    base = transformers.AutoModel.from_pretrained(OLD)
    assert all(
        torch.equal(tensor, model.model.state_dict()[name])
        for name, tensor in base.state_dict().items()
    )


def test_a_registered_format_has_classes_of_its_own():
    config, decoder = quantizer.register("test-quantizer", lambda payload: payload)
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["test-quantizer"] is config
    assert auto.AUTO_QUANTIZER_MAPPING["test-quantizer"] is decoder
    assert config().quant_method == "test-quantizer"
    assert decoder.decode(1) == 1
    again, _ = quantizer.register("test-quantizer", lambda payload: payload)
    assert again is not config
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["test-quantizer"] is config


def test_a_key_of_a_later_version_is_named():
    with pytest.raises(ArtifactError, match="keys checksum, which this version .* upgrade"):
        OwnConfig("sparse", checksum=3)


def test_the_encoding_is_the_name_of_the_format():
    assert quantizer.encoding({"quant_method": "gptq", "encoding": "x"}) == "gptq"
    assert quantizer.encoding({"quant_method": "optimum_order", "encoding": "x"}) == "x"
    assert quantizer.encoding({"quant_method": "sparse"}) == "sparse"
    assert quantizer.encoding({"quant_method": "optimum_order"}) is None
