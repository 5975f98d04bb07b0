"""Forwards without weights: what they look up, what they refuse, and how long a text may be."""

import shutil

import pytest
import torch
import transformers
from torch import nn

from optimum_order.models import rehearsal as module
from optimum_order.models.rehearsal import (
    outline,
    rehearse,
    stated_positions,
    table_positions,
    takes,
    usable_length,
)
from optimum_order.models.source import Checkpoint, InMemory

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make(name, **settings):
    """A tiny model in memory, of the class `name`."""
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings)).eval()


def empty(name, **settings):
    return outline(InMemory.of(make(name, **settings)))


def plain(ids):
    return {"input_ids": ids}


POSITIONS = [
    # absolute, with an offset of padding + 1 that counts only tokens that are no padding
    ("RobertaForMaskedLM", SMALL | {"max_position_embeddings": 66, "type_vocab_size": 1}, 64),
    ("RobertaModel", SMALL | {"max_position_embeddings": 70, "pad_token_id": 0}, 69),
    ("MPNetModel", SMALL | {"max_position_embeddings": 66}, 64),
    ("LongformerModel", SMALL | {"max_position_embeddings": 66, "attention_window": [8, 8]}, 64),
    # absolute, with positions in a buffer
    ("BertModel", SMALL | {"max_position_embeddings": 64}, 64),
    ("ElectraModel", SMALL | {"max_position_embeddings": 64, "embedding_size": 32}, 64),
    ("DebertaV2Model", SMALL | {"max_position_embeddings": 64}, 64),
    ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, 64),
    (
        "OPTForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
        64,
    ),
    # a limit that only the config states, and none at all: a config says -1, another nothing
    ("LlamaForCausalLM", SMALL | {"max_position_embeddings": 96}, 96),
    ("XLNetLMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, 200),
    ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 200),
    ("LlamaForCausalLM", SMALL | {"max_position_embeddings": -1}, 200),
    # several tokens end a text, as in Llama 3
    ("LlamaForCausalLM", SMALL | {"max_position_embeddings": 96, "eos_token_id": [0, 1, 3]}, 96),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "expected"), POSITIONS)
def test_the_longest_window_is_one_that_the_model_can_read(name, settings, expected):
    model = make(name, **settings)
    length = usable_length(outline(InMemory.of(model)), 200, plain)
    assert length == expected
    ids = torch.full((1, length), 5)
    with torch.inference_mode():
        model(input_ids=ids)
        if length < 200 and name != "LlamaForCausalLM":  # whose limit is that of its training
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, length + 1), 5))


def test_a_table_that_is_shorter_than_the_config_says():
    model = make("BertModel", **SMALL, max_position_embeddings=64)
    model.config.max_position_embeddings = 512
    assert usable_length(outline(InMemory.of(model)), 512, plain) == 64
    gpt2 = make("GPT2LMHeadModel", vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=64)
    gpt2.transformer.wpe = nn.Embedding(40, 32)
    assert usable_length(outline(InMemory.of(gpt2)), 512, plain) == 40


def test_a_table_under_any_name(monkeypatch):
    """The rehearsal sees what the names and the config do not tell."""
    monkeypatch.setattr(module, "table_positions", lambda model: None)
    monkeypatch.setattr(module, "stated_positions", lambda model: None)
    for name, settings, expected in POSITIONS[:-5]:
        assert usable_length(empty(name, **settings), 200, plain) == expected, name


def test_the_names_of_tables_tell_where_no_forward_can_be_rehearsed():
    for name, settings, expected in POSITIONS[:9]:
        model = make(name, **settings)
        assert table_positions(model) == expected, name
    assert table_positions(make("LlamaForCausalLM", **SMALL)) is None
    clip = make(
        "CLIPModel",
        text_config=SMALL | {"max_position_embeddings": 40},
        vision_config=SMALL | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    assert table_positions(clip) == 40 == stated_positions(clip), "of text, not of patches"


def test_indices_beyond_a_table_are_named_with_it():
    model = empty("GPT2LMHeadModel", vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=32)
    run = rehearse(model, plain(torch.full((1, 40), 70)))
    tables = {overrun.table: (overrun.rows, overrun.index) for overrun in run.overruns}
    assert tables == {"transformer.wte.weight": (64, 70), "transformer.wpe.weight": (32, 39)}
    assert [overrun.is_vocabulary for overrun in run.overruns] == [True, False]
    assert not run.passed
    negative = rehearse(model, plain(torch.tensor([[3, -1, 70]])))
    assert [overrun.index for overrun in negative.overruns] == [-1]


def test_what_a_forward_refuses_is_told_from_what_cannot_be_rehearsed():
    classifier = empty("LlamaForSequenceClassification", **SMALL, pad_token_id=None)
    assert "no padding token" in rehearse(classifier, plain(torch.full((2, 8), 5))).refusal
    assert rehearse(classifier, plain(torch.full((1, 8), 5))).passed
    t5 = empty("T5Model", d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=64)
    assert "decoder_input_ids" in takes(t5)
    assert rehearse(t5, plain(torch.full((1, 8), 5))).refusal is not None
    # reads numbers in Python that are not there without weights
    longformer = empty("LongformerModel", **SMALL, attention_window=[8, 8])
    run = rehearse(longformer, plain(torch.full((1, 8), 5)))
    assert run.refusal is None and run.failure is not None


def test_a_recurrent_model_is_not_rehearsed_for_minutes():
    rwkv = empty("RwkvForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=12)
    assert usable_length(rwkv, 512, plain) == 512


def test_an_outline_has_no_weights_and_leaves_the_model_alone(tiny_llama_folder, tmp_path):
    model = make("GPT2LMHeadModel", vocab_size=64, n_embd=32, n_head=4, n_layer=2)
    source = InMemory.of(model)
    for parameter in outline(source).parameters():
        assert parameter.device.type == "meta"
    assert all(parameter.device.type == "cpu" for parameter in source.model.parameters())
    options = {"revision": None, "token": None, "dtype": "auto", "trust_remote_code": False}
    checkpoint = Checkpoint(tiny_llama_folder, **options)
    empty = outline(checkpoint)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in empty.buffers()} == {"cpu"}
    copied = shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    damaged = Checkpoint(copied, **options)
    (copied / "model.safetensors").unlink()
    assert outline(damaged) is not None  # a config says all that an outline needs
