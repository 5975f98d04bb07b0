"""Conversations through a chat template."""

import traceback

import pytest
from transformers import AutoTokenizer

from optimum_order.data.chat import Conversations
from optimum_order.data.text import load
from optimum_order.errors import DataError

SECRET = "Zanzibar"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(m.content) }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TURNS = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a tree"}]
EXPECTED = "[user] what is it\n[assistant] a tree\n"


@pytest.fixture
def tokenizer(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_spelling_of_a_conversation_becomes_the_same_text(tokenizer):
    chats = Conversations("a", tokenizer)
    parts = [{"type": "text", "text": "what is"}, {"type": "text", "text": " it"}]
    for turns in (
        TURNS,
        [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a tree"}],
        [{"from": "user", "value": "what is it"}, {"from": "GPT", "value": "a tree"}],
        [{"role": "human", "content": "what is it"}, {"role": "bot", "content": "a tree"}],
        [{"role": "user", "content": parts, "weight": None}, TURNS[1]],
        tuple(TURNS),
    ):
        assert chats.render("row 1", turns) == EXPECTED
    assert chats.render("row 1", None) is None and chats.render("row 1", []) is None
    assert chats.note() == ""


def test_begin_of_text_is_not_there_twice(tokenizer):
    windows = load([TURNS, TURNS], tokenizer, samples=1, length=20)
    assert windows.ids[0].tolist().count(tokenizer.bos_token_id) <= 2, (
        "the window's, and a separator"
    )
    whole = tokenizer.decode(
        load([TURNS] * 9, tokenizer, samples=None, length=40, purpose="evaluation").ids[0]
    )
    assert whole.startswith("<s>[user] what is it") and whole.count("<s>") == 1
    assert load([TURNS], tokenizer, samples=1, length=8).source == "1 conversations in memory"


def test_conversations_that_the_template_refuses_are_left_out_and_counted(tokenizer):
    twice = [{"role": "user", "content": SECRET}, {"role": "user", "content": SECRET}]
    windows = load([TURNS, twice, TURNS], tokenizer, samples=None, length=8)
    assert windows.note.startswith("the chat template refuses 1 of 3 conversations of 3 conv")
    assert windows.digest == load([TURNS, TURNS], tokenizer, samples=None, length=8).digest
    with pytest.raises(DataError, match="refuses all 2 conversations") as error:
        load([twice, twice], tokenizer, samples=None, length=8)
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_without_a_template_is_one_line(tiny_llama_folder):
    plain = AutoTokenizer.from_pretrained(tiny_llama_folder)
    with pytest.raises(DataError, match=r"need a chat template, and the tokenizer has none\. Give"):
        load([{"messages": TURNS}], plain, samples=1, length=8)

    class Processor:
        tokenizer = plain
        chat_template = {"default": TEMPLATE}

    assert Conversations("a", plain, Processor.chat_template).render("row 1", TURNS) == EXPECTED
    load([{"messages": TURNS}], Processor(), samples=1, length=8)


def test_what_is_no_conversation_is_one_line_without_its_text(tokenizer):
    chats = Conversations("a", tokenizer)
    image = [{"type": "image", "url": SECRET}]
    for conversation, message in (
        (SECRET, "'a', row 7: a conversation must be a list of turns, got str"),
        ([SECRET], "'a', row 7: a turn must have 'role' and 'content', or"),
        ([{"speaker": SECRET}], "a turn must have 'role'"),
        ([{"role": "user", "content": image}], "the content of a turn must be text, got list"),
        ([{"role": "user", "content": {"text": SECRET}}], "must be text, got dict"),
    ):
        with pytest.raises(DataError, match=message) as error:
            chats.render("row 7", conversation)
        assert SECRET not in str(error.value) and "\n" not in str(error.value)
