"""Which metric a model is measured by."""

import pytest
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_order.errors import ModelError
from optimum_order.evaluation import available, choose


def test_the_usual_metric_of_a_kind(make_image_model, tiny_llama_folder):
    assert choose(LlamaForCausalLM.from_pretrained(tiny_llama_folder)).name == "perplexity"
    for architecture in ("vit", "deit", "resnet", "regnet"):
        assert choose(make_image_model(architecture)).name == "accuracy"


def test_a_metric_by_name(make_image_model):
    model = make_image_model("resnet")
    assert all(choose(model, name) is metric for name, metric in available().items())
    with pytest.raises(
        ModelError, match=r"Unknown metric 'acuracy'\. Did you mean 'accuracy'\? Allowed: .*auto"
    ):
        choose(model, "acuracy")


def test_no_usual_metric():
    small = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    for model in (
        T5ForConditionalGeneration(T5Config(**small)),
        BertModel(BertConfig(**bert, vocab_size=50)),
    ):
        with pytest.raises(
            ModelError,
            match=f"No metric is the usual one for {type(model).__name__}.*accuracy, .*fid",
        ):
            choose(model)


def test_a_classifier_with_code_of_its_own():
    class Own(PreTrainedModel):
        config_class = PreTrainedConfig
        main_input_name = "pixel_values"

    config = PreTrainedConfig(auto_map={"AutoModelForImageClassification": "modeling_own.Own"})
    assert choose(Own(config)).name == "accuracy"
    with pytest.raises(ModelError, match="No metric is the usual one for Own"):
        choose(Own(PreTrainedConfig()))
