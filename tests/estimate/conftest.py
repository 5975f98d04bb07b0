"""Rates are measured in a moment here: what is tested is what is done with them."""

import pytest

from optimum_order.estimate import rates


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.005)
    monkeypatch.setattr(rates, "_SIZE", 64)
