"""Samples and the models that read them: refused before the work, or completed."""

import pytest
import torch
import transformers

from optimum_order.data.fit import decoder_start, fitted, usable_length
from optimum_order.data.samples import Windows
from optimum_order.errors import DataError
from optimum_order.models.rehearsal import outline
from optimum_order.models.source import InMemory

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 48,
}
CLIP = {
    "text_config": SMALL | {"max_position_embeddings": 40},
    "vision_config": SMALL | {"image_size": 16, "patch_size": 8},
    "projection_dim": 16,
}


def make(name, **settings):
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings)).eval()


def empty(model):
    return outline(InMemory.of(model))


@pytest.fixture
def windows():
    return Windows(
        torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(0)), "prose"
    )


def test_a_decoder_reads_the_window_one_token_later(windows):
    for name, settings in (
        ("T5Model", T5 | {"decoder_start_token_id": 0}),
        ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
        ("BartModel", BART | {"decoder_start_token_id": 2}),
        ("BartForConditionalGeneration", BART | {"decoder_start_token_id": 2}),
    ):
        model = make(name, **settings)
        batch = fitted(windows, empty(model)).inputs()[0]
        assert set(batch) == {"input_ids", "decoder_input_ids"}
        assert (batch["decoder_input_ids"][:, 0] == settings["decoder_start_token_id"]).all()
        assert torch.equal(batch["decoder_input_ids"][:, 1:], windows.ids[:, :-1])
        model(**batch)
    assert usable_length(empty(make("BartModel", **BART)), 512) == 48
    # an encoder alone has no decoder to feed, whatever its config says
    for name, settings in (("T5EncoderModel", T5), ("BertModel", SMALL)):
        encoder = make(name, **settings)
        assert decoder_start(encoder) is None
        assert set(fitted(windows, empty(encoder)).inputs()[0]) == {"input_ids"}


def test_the_digest_covers_what_a_decoder_reads(windows):
    plain = Windows(windows.ids, "prose")
    with_decoder = Windows(windows.ids, "prose", decoder_start=0)
    assert (
        len({plain.digest, with_decoder.digest, Windows(windows.ids, "x", decoder_start=1).digest})
        == 3
    )
    assert with_decoder.take(torch.tensor([1])).tensors["decoder_input_ids"].shape == (1, 16)


def test_a_head_that_takes_one_window_at_a_time_gets_one(windows):
    for name, settings, largest in (
        ("LlamaForSequenceClassification", SMALL | {"pad_token_id": None}, 1),
        ("LlamaForSequenceClassification", SMALL | {"pad_token_id": 0}, None),
        (
            "GPT2ForSequenceClassification",
            {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 1, "pad_token_id": None},
            1,
        ),
        ("BertForSequenceClassification", SMALL, None),
    ):
        samples = fitted(windows, empty(make(name, **settings)))
        assert samples.largest_batch == largest
        sizes = {len(batch["input_ids"]) for batch in samples.inputs()}
        assert sizes == ({1} if largest else {3}), name
        assert {len(batch["input_ids"]) for batch in samples.batches(8)} == sizes
        assert samples.digest == windows.digest, "the same windows"


def test_what_a_model_cannot_read_is_one_line_that_says_what_to_give(windows):
    ids = windows.ids
    for name, settings, samples, message in (
        ("CLIPModel", CLIP, windows, r"CLIPModel cannot read 'input_ids' of prose alone.*takes input_ids, pixel_values.*inputs\.safetensors"),
        ("BertModel", SMALL, Windows(ids + 9, "prose"), "BertModel knows tokens 0 to 63, got token 7.*resize_token_embeddings"),
        ("BertModel", SMALL | {"max_position_embeddings": 12}, windows, "at most 12 tokens at once, got windows of 16"),
        ("RobertaModel", SMALL | {"max_position_embeddings": 17}, windows, "at most 15 tokens at once, got windows of 16"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            fitted(samples, empty(make(name, **settings)))
        assert "\n" not in str(error.value)
