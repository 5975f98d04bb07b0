"""transformers compresses what it loads, as `JointCompressor` would."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor, OptimumOrderConfig
from optimum_order.errors import ModelError, OrderError

SETTINGS = {"calibration_samples": 2, "sequence_length": 32, "device": "cpu"}


def load(folder, *arguments, device_map=None, **options):
    config = OptimumOrderConfig(*arguments, **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device_map
    )


def test_a_model_is_compressed_while_it_loads(tiny_llama_folder, text_file, tmp_path):
    order = "wanda:0.5 > gptq:4"
    data = str(text_file)
    model = load(tiny_llama_folder, order, data, device_map="auto", pause="block", **SETTINGS)
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, calibration=data, **SETTINGS)
    expected = compressor.compress(order, pause="block", progress=False).model.state_dict()
    values = model.state_dict()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in values)
    # an ordinary model for transformers
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    model.train()
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in again)
    # and small where it is saved by us
    assert model.optimum_order.save_pretrained(tmp_path / "small") == "compressed-tensors"


def test_without_data_no_tokenizer_is_needed(tiny_llama_folder):
    model = load(tiny_llama_folder, "rtn:4")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight[0].unique().numel() <= 16


def test_what_cannot_be_done_is_refused_before_weights_are_read(tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(OptimumOrderConfig, "compress", lambda *_: pytest.fail("too late"))
    for order, options, error in [
        ("width:0.2", {}, "makes another model"),
        ("rtn:8 > activations:8", {}, "makes another model"),
        ("rtn:", {}, "rtn"),
        ("rtn:4", {"pause": "now"}, "pause"),
        ("rtn:4", {"schedule": "never"}, "schedule"),
    ]:
        with pytest.raises(OrderError, match=error):
            OptimumOrderConfig(order, **options)
    spread = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ModelError, match="compressed on one device"):
        load(tiny_llama_folder, "rtn:4", device_map=spread)


def test_a_map_of_devices_is_one_device_or_refused(tiny_llama_folder):
    for device_map in (
        "auto",
        "cpu",
        {"": "cpu"},
        {"model": "cpu", "lm_head": torch.device("cpu")},
    ):
        compressor = JointCompressor.from_pretrained(tiny_llama_folder, device_map=device_map)
        assert compressor.device.type == (
            "cuda" if torch.cuda.is_available() and device_map == "auto" else "cpu"
        )
    for device_map in ("balanced", {"a": "cpu", "b": "disk"}, {}, 3.5):
        with pytest.raises(ModelError, match="compressed on one device"):
            JointCompressor.from_pretrained(tiny_llama_folder, device_map=device_map)


def test_the_config_can_be_written_and_holds_no_data(text_file):
    config = OptimumOrderConfig("gptq:4", str(text_file), processor=object(), seed=3)
    facts = config.to_dict()
    assert facts == {
        "quant_method": "optimum_order_on_load",
        "order": config.order,
        "schedule": "stage",
        "pause": "auto",
        "seed": 3,
    }
    assert OptimumOrderConfig.from_dict(facts).order == config.order
    assert str(text_file) not in config.to_json_string(use_diff=False)
