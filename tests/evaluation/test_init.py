"""The metric that a model is measured by."""

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
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
    bert = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    message = "No metric is the usual one for BertForMaskedLM. Name one .*accuracy, .*fidelity"
    with pytest.raises(ModelError, match=message):
        choose(BertForMaskedLM(bert))


def test_a_metric_says_itself_for_which_models_it_is_usual(monkeypatch):
    """So that a metric of another package can be; two that are usual for a model are ambiguous."""
    model = BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    metrics = available()
    monkeypatch.setattr(metrics["fidelity"], "is_usual", lambda model: True)
    assert choose(model) is metrics["fidelity"]
    monkeypatch.setattr(metrics["accuracy"], "is_usual", lambda model: True)
    with pytest.raises(ModelError, match=r"Several metrics are the usual one .*: accuracy, fidel"):
        choose(model)


def test_a_classifier_with_code_of_its_own():
    class Own(PreTrainedModel):
        config_class = PreTrainedConfig
        main_input_name = "pixel_values"

    config = PreTrainedConfig(auto_map={"AutoModelForImageClassification": "modeling_own.Own"})
    assert choose(Own(config)).name == "accuracy"
    with pytest.raises(ModelError, match="No metric is the usual one for Own"):
        choose(Own(PreTrainedConfig()))
