"""Rates are measured in a moment here: what is tested is what is done with them."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.estimate import rates


@pytest.fixture(scope="session")
def ids():
    """Six windows of 24 tokens."""
    return torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def compressor(tiny_llama_folder, ids):
    return JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=ids, sequence_length=24, device="cpu"
    )


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.005)
    monkeypatch.setattr(rates, "_SIZE", 64)
