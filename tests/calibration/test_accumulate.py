"""Sums over parts are those over all tokens, whoever has seen which part."""

import itertools

import pytest
import torch

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.models import precision

CPU = torch.device("cpu")
NEEDS = [{Gram}, {SquaredNorms}, {Gram, SquaredNorms}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_all_tokens_at_once(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 6), (2, 5, 6), (6,)]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    X = torch.cat([part.reshape(-1, 6) for part in parts]).double()
    for needs in NEEDS:
        sums = Accumulation(6, needs, CPU)
        for part in parts:
            sums.add(part)
        result = sums.result()
        assert result.tokens == len(X) == 18
        assert result[SquaredNorms].dtype == torch.float32
        assert torch.allclose(result[SquaredNorms].double(), X.square().sum(0), rtol=1e-5)
        assert (Gram in result) == (Gram in needs)
        if Gram in needs:
            assert torch.allclose(result[Gram].double(), X.T @ X, rtol=1e-5, atol=1e-5)


def test_what_another_statistic_implies_is_not_summed_twice():
    sums = Accumulation(6, {Gram, SquaredNorms}, CPU)
    assert set(sums.result().results) == {Gram}


def test_parts_that_others_have_gathered_are_merged():
    X = torch.randn(20, 700, generator=torch.Generator().manual_seed(0))
    for needs in NEEDS:
        halves = [Accumulation(700, needs, CPU) for _ in range(2)]
        for half, rows in zip(halves, X.split(13), strict=True):
            half.add(rows)
        halves[0].merge(halves[1])
        result = halves[0].result()
        whole = Statistics.of(X, needs)
        assert result.tokens == 20
        for statistic in result.results:
            torch.testing.assert_close(result[statistic], whole[statistic])


def test_half_precision_does_not_saturate():
    """A thousand tokens of 100 sum to far more than float16 holds."""
    sums = Accumulation(2, {Gram}, CPU)
    sums.add(torch.full((1000, 2), 100.0, dtype=torch.float16))
    assert torch.equal(sums.result()[Gram], torch.full((2, 2), 1e7))


def test_no_tokens_add_nothing():
    for needs, rows in itertools.product(NEEDS, ([], [torch.zeros(0, 3)])):
        sums = Accumulation(3, needs, CPU)
        for part in rows:
            sums.add(part)
        assert sums.result().tokens == 0
        assert torch.equal(sums.result()[SquaredNorms], torch.zeros(3))


def test_numbers_below_the_diagonal_are_copied():
    for inputs in (511, 512, 513, 1300):
        X = torch.randn(20, inputs, generator=torch.Generator().manual_seed(0))
        sums = Accumulation(inputs, {Gram}, CPU)
        for part in X.split(9):
            sums.add(part)
        gram = sums.result()[Gram]
        assert torch.allclose(gram.double(), X.double().T @ X.double(), rtol=1e-4, atol=1e-4)
        assert torch.allclose(gram, gram.T, rtol=1e-5, atol=1e-5)
        assert torch.equal(sums.result()[Gram], gram), "asking again changes nothing"


def test_sums_of_inference_mode_are_completed_outside():
    X = torch.randn(20, 600, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sums = Accumulation(600, {Gram}, CPU)
        sums.add(X)
    assert torch.allclose(sums.result()[Gram], X.T @ X, rtol=1e-2, atol=1e-1)


def test_products_round_inputs_as_told(monkeypatch):
    """bfloat16 has 8 digits: 257 is 256 where a processor has units for it, and only if told."""
    monkeypatch.setattr(precision, "has_units", lambda device: True)
    monkeypatch.setattr(precision, "_has_matrix_units", lambda: False)
    for dtype, expected in ((torch.float32, 257.0**2), (torch.bfloat16, 256.0**2)):
        sums = Accumulation(1, {Gram}, CPU, dtype)
        sums.add(torch.full((1, 1), 257.0))
        assert sums.result()[Gram].item() == expected
