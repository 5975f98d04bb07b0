"""Tokenizers that llama.cpp has a name for, in its fields; all others are refused."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from optimum_order import JointCompressor
from optimum_order.formats.gguf_vocabulary import fields, why_not

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXT = ["the cat sat on the mat, and then the cat sat again 123"] * 5


def split_by(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def of_bytes(splitter, normalizer=None, ignore_merges=False, **special):
    """A tokenizer that merges bytes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def of_characters(normalizer=None, splitter=None, **special):
    """A tokenizer that merges characters, and falls back to bytes."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    characters = sorted(set("".join(TEXT).replace(" ", "▁")))
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *characters])
    }
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("▁t", "he")][:4]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    if splitter:
        tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
REPLACE = normalizers.Replace(" ", "▁")
BOS = {"bos_token": "<s>"}
AT_SPACES = pre_tokenizers.Split(" ", "merged_with_previous")
FIRST = pre_tokenizers.Metaspace("▁", "first", split=False)
NEVER = pre_tokenizers.Metaspace("▁", "never", split=False)
LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])


@pytest.mark.parametrize(
    ("splitter", "options", "name"),
    [
        (BYTE_LEVEL, {}, "gpt-2"),
        (DIGITS, {}, "smollm"),
        (split_by(QWEN), {"normalizer": normalizers.NFC()}, "qwen2"),
        (split_by(LLAMA3), {}, "dbrx"),
        (split_by(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
    ],
)
def test_the_way_that_text_is_split_has_a_name(splitter, options, name):
    tokenizer = of_bytes(splitter, **options)
    values = fields(tokenizer, len(tokenizer) + 2)
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == name
    tokens = values["tokenizer.ggml.tokens"]
    assert tokens[:2] == ["<s>", "</s>"] and tokens[-1] == f"[PAD{len(tokenizer) + 1}]"
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert values["tokenizer.ggml.token_type"][-1] == 5
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize(
    ("tokenizer", "prefixed"),
    [
        (of_characters(LLAMA2, **BOS), True),
        (of_characters(REPLACE, **BOS), False),
        (of_characters(REPLACE, AT_SPACES, **BOS), False),
        (of_characters(None, FIRST, **BOS), True),
        (of_characters(None, NEVER, **BOS), False),
    ],
)
def test_a_merge_of_characters_has_a_score_in_place_of_a_rank(tokenizer, prefixed):
    values = fields(tokenizer, len(tokenizer))
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is prefixed
    tokens = values["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
    assert [scores[token] for token in ("th", "the", "▁the", "at")] == [0.0, -1.0, -2.0, -3.0]
    assert scores["<s>"] < -1000
    kinds = dict(zip(tokens, values["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<unk>"] == 2 and kinds["<s>"] == 3 and kinds["<tool>"] == 4
    assert kinds["<0x0A>"] == 6 and kinds["th"] == 1


def test_special_tokens_and_the_chat_template():
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = of_characters(LLAMA2, **names)
    tokenizer.chat_template = "{{ messages }}"
    values = fields(tokenizer, len(tokenizer))
    assert values["tokenizer.ggml.bos_token_id"] == 1
    assert values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.add_eos_token"] is False
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    assert fields(tokenizer, len(tokenizer))["tokenizer.chat_template"] == "{{ messages }}"


def test_a_model_without_a_tokenizer_reads_ids():
    assert fields(None, 10) == {"tokenizer.ggml.model": "no_vocab"}


def test_the_embedded_model_has_a_name():
    tokenizer = JointCompressor.from_pretrained("tiny-llama").source.processor
    assert fields(tokenizer, 4096)["tokenizer.ggml.pre"] == "gpt-2"


def framed():
    tokenizer = of_bytes(BYTE_LEVEL)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram([("a", 0.0), ("<unk>", -1.0)], unk_id=1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


REFUSED = [
    (unigram, "of the kind Unigram"),
    (lambda: object(), "no tokenizer that a tokenizer.json describes"),
    (lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for the way"),
    (lambda: of_bytes(split_by(r"\p{L}+")), r"no name for the way .*Split, ByteLevel"),
    (lambda: of_bytes(pre_tokenizers.Whitespace()), "no name for the way"),
    (lambda: of_bytes(BYTE_LEVEL, normalizers.Lowercase()), "changes text before"),
    (lambda: of_bytes(BYTE_LEVEL, ignore_merges=True), "merges whole words with the rule 'gpt-2'"),
    (lambda: of_characters(normalizers.Lowercase()), "does not prepare text"),
    (lambda: of_characters(None, pre_tokenizers.Metaspace("▁", "always")), "does not prepare"),
    (framed, "adds other tokens"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED)
def test_what_llama_cpp_has_no_name_for_is_refused(make, match):
    import re

    reason = why_not(make(), 1000)
    assert reason and re.search(match, reason), reason


def test_more_ids_than_embeddings_are_refused():
    assert "has the id" in why_not(of_bytes(BYTE_LEVEL), 5)
