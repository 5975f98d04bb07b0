"""Which column of a table is read."""

import pytest

from optimum_order.data.rows import Rows, choose_column
from optimum_order.errors import DataError

TURNS = [{"role": "user", "content": "a question"}]
SHARE_GPT = [{"from": "human", "value": "a question"}]


def choose(*rows, wanted=None):
    return choose_column(Rows.of("a", rows, wanted))


def test_ids_are_never_text():
    for row, expected in (
        ({"id": "a7f3", "conversations": SHARE_GPT}, ("conversations", "chat")),
        ({"id": "a question of ids", "messages": TURNS}, ("messages", "chat")),
        ({"prompt": "two words", "prompt_id": "f0", "messages": TURNS}, ("messages", "chat")),
        ({"conversationId": "one two", "dialog": TURNS}, ("dialog", "chat")),
        ({"id": "a7f3", "body": "two words"}, ("body", "text")),
        ({"uuid": "x y", "source_url": "x y", "talk": SHARE_GPT}, ("talk", "chat")),
        ({"label": "good", "split": "train", "body": "two words"}, ("body", "text")),
        ({"text": "two words", "messages": TURNS}, ("text", "text")),
        ({"text": "word", "other": "two words"}, ("text", "text")),
        ({"id": "a7f3", "sentence": "日本語の文章"}, ("sentence", "text")),
    ):
        assert choose(row) == expected, row
    for row in ({"id": "a7f3"}, {"uid": "a b"}, {"label": "good"}, {"link": "https://a.b/c"}):
        with pytest.raises(DataError, match="no column of text but '.*look like ids or names"):
            choose(row)


def test_a_column_that_is_named_is_read_whatever_it_holds():
    row = {"id": "a7f3", "text": "two words", "messages": TURNS, "year": 1}
    assert choose(row, wanted="id") == ("id", "text")
    assert choose(row, wanted="messages") == ("messages", "chat")
    for wanted in ("year", "nope"):
        message = f"no column '{wanted}' of text.*text are: id, text; of conversations: messages; others: year"
        with pytest.raises(DataError, match=message):
            choose(row, wanted=wanted)


def test_several_columns_are_ambiguous():
    for row in (
        {"question": "two words", "answer": "two words"},
        {"one": TURNS, "other": SHARE_GPT},
        {"body": "two words", "other": TURNS},
    ):
        with pytest.raises(DataError, match="several columns of text"):
            choose(row)


def test_what_is_no_conversation():
    for value in ([], ["text"], [{"speaker": "a"}], {"role": "user", "content": "x"}, None):
        with pytest.raises(
            DataError, match=r"no column 'text' of text.*are: none; others: messages"
        ):
            choose({"messages": value})
    assert choose({"messages": None}, {"messages": TURNS}) == ("messages", "chat")


def test_a_stream_is_read_once_and_no_further_than_needed():
    pulled = []

    def stream():
        for number in range(1000):
            pulled.append(number)
            yield {"text": f"document {number}"}

    kind, values = Rows.streamed("a", stream()).values()
    assert kind == "text" and len(pulled) == 64
    taken = [next(values) for _ in range(70)]
    assert taken[0] == ("row 1", "document 0") and taken[69] == ("row 70", "document 69")
    assert pulled == list(range(70))


def test_no_rows_hold_no_text():
    assert list(Rows.of("a", []).values()[1]) == []
