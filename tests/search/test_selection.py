"""The answer of a search, ready for JSON."""

import json

import pytest
import torch

from optimum_order.order import Order
from optimum_order.search.menu import Candidate
from optimum_order.search.selection import Attempt, Row, Selection, compared

ORIGINAL = torch.zeros(8, dtype=torch.float64)


def attempt(text, loss):
    noise = 0.001 * torch.arange(8, dtype=torch.float64)
    candidate = Candidate(Order.parse(text), "coded", 10, 3.0, False, 0.1)
    return Attempt(candidate, 10, 3.0, ORIGINAL - loss - noise)


def test_attempts_are_compared_pair_by_pair():
    winner, other = attempt("ecsq:3", 0.1), attempt("gptq:3", 0.3)
    rise, (low, high), difference = compared(winner, other, ORIGINAL)
    assert rise == pytest.approx(0.3035) and low < rise < high
    # the noise is common to both
    assert difference.mean == pytest.approx(0.2) == difference.low == difference.high
    assert compared(winner, winner, ORIGINAL)[2] is None


def test_an_answer_is_json_without_its_model():
    difference = compared(attempt("ecsq:3", 0.1), attempt("gptq:3", 0.3), ORIGINAL)[2]
    rows = [
        Row(Order.parse("ecsq:3"), "coded", 10, 3.0, True, True, 0.1, (0.0, 0.2), None, 0.1),
        Row(Order.parse("gptq:3"), "coded", 9, 2.9, True, True, 0.3, (0.2, 0.4), difference, 0.2),
    ]
    cost = {"compressions": 2}
    answer = Selection(
        tuple(rows), "perplexity", 8, "3 bits", None, True, "why.", cost, model=object()
    )
    assert (str(answer.order), answer.format) == ("ecsq:3", "coded")
    fields = json.loads(json.dumps(answer.as_dict()))
    assert "model" not in fields and fields["order"] == "ecsq:3"
    assert [row["order"] for row in fields["rows"]] == ["ecsq:3", "gptq:3"]
    assert fields["rows"][1]["difference"]["decisive"] is True
