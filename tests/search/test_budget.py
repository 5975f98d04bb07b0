"""Budgets as text, and what limits a search."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.errors import OrderError
from optimum_order.search.budget import Budget, limits

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(1, 999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_bytes_are_read_in_every_unit(amount, unit, space):
    for text in (f"{amount}{space}{unit}", f" {amount}{unit.lower()} "):
        assert Budget.parse(text) == Budget(amount * UNITS[unit])


@given(st.integers(1, 10_000))
def test_bits_are_read(thousandths):
    assert Budget.parse(f"{thousandths / 1000:.3f} bits") == Budget(thousandths / 1000, bits=True)


def test_parts_of_a_unit_are_read():
    assert Budget.parse("1.5 kB") == Budget(1500.0)
    assert Budget.parse(".5kB") == Budget(500.0)
    assert Budget.parse("3bit") == Budget(3.0, bits=True)


@given(st.text())
def test_other_text_is_refused_in_one_line(text):
    try:
        budget = Budget.parse(text)
    except OrderError as error:
        assert "60MB" in str(error) and "\n" not in str(error)
    else:
        assert budget.amount > 0


@pytest.mark.parametrize(
    "text", ["60", "60 m", "MB", "-3MB", "0 bits", "0.1 B", "1e3MB", "nan bits", "3 MB MB", "", 60]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(OrderError, match="A budget is bytes"):
        Budget.parse(text)


def test_a_budget_is_shown_in_the_words_of_sizes():
    assert (str(Budget(60e6)), str(Budget(2.5, bits=True))) == ("60 MB", "2.5 bits")


def test_limits_are_read_once():
    assert limits("60MB", None) == (Budget(60e6), None)
    assert limits(Budget(3.0, bits=True), 0.1) == (Budget(3.0, bits=True), 0.1)
    with pytest.raises(OrderError, match="--budget"):
        limits(None, None)
    for loss in (0, -1.0, math.nan, math.inf):
        with pytest.raises(OrderError, match="must be above 0"):
            limits(None, loss)
