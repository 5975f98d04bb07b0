import pytest
import torch

from optimum_order.errors import InvariantError
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.testing import gaussian


def test_a_statistic_that_another_implies_is_there():
    X = gaussian(20, 8)
    statistics = Statistics.of(X, [Gram])
    assert SquaredNorms in statistics and list(statistics.results) == [Gram]
    assert torch.equal(statistics[SquaredNorms], statistics[Gram].diagonal())
    assert statistics[SquaredNorms] is statistics[SquaredNorms], "computed once"


def test_a_statistic_that_was_gathered_is_not_derived():
    norms = torch.ones(8)
    statistics = Statistics(9, {Gram: torch.zeros(8, 8), SquaredNorms: norms})
    assert statistics[SquaredNorms] is norms


def test_a_statistic_that_was_not_gathered_is_named():
    statistics = Statistics.of(gaussian(20, 8), [SquaredNorms])
    assert Gram not in statistics
    message = (
        "The statistic Gram was not gathered; gathered were SquaredNorms. "
        "Add Gram to the backend's 'needs'."
    )
    with pytest.raises(InvariantError, match=message):
        statistics[Gram]
    with pytest.raises(InvariantError, match="gathered were none"):
        Statistics(0, {})[Gram]


def test_tokens_are_rows():
    assert Statistics.of(gaussian(20, 8), []).tokens == 20


def test_derived_values_are_computed_once_for_all_layers_that_share_the_statistics():
    statistics = Statistics.of(gaussian(20, 8), [Gram])
    calls = []
    for _ in range(2):
        assert statistics.derived("key", lambda: calls.append(1) or "value") == "value"
    assert statistics.derived("other", lambda: "else") == "else"
    assert len(calls) == 1


def test_isotropic_statistics_are_those_of_nobody():
    isotropic = Statistics(9, {Gram: torch.full((4, 4), 2.0)}).isotropic()
    assert isotropic.tokens == 0
    assert torch.equal(isotropic[SquaredNorms], torch.ones(4))
    assert torch.equal(isotropic[Gram], torch.eye(4))
    assert Gram not in Statistics(9, {SquaredNorms: torch.ones(4)}).isotropic()
