import pytest
import torch

from optimum_order.layers.error import added_loss, relative_error, squared_error
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.testing import gaussian


def test_squared_error_is_that_of_the_outputs():
    X = gaussian(50, 32)
    delta = gaussian(4, 32, seed=1)
    statistics = Statistics.of(X, [Gram])
    expected = (X @ delta.T).square().sum().item()
    assert squared_error(delta, statistics) == pytest.approx(expected, rel=1e-5)
    assert squared_error(delta.double(), statistics) == pytest.approx(expected, rel=1e-5)


def test_squared_error_is_its_diagonal_part_without_a_gram_matrix():
    X = torch.diag(torch.arange(1.0, 5.0))
    delta = gaussian(3, 4)
    statistics = Statistics.of(X, [SquaredNorms])
    expected = (X @ delta.T).square().sum().item()
    assert squared_error(delta, statistics) == pytest.approx(expected, rel=1e-5)


def test_relative_error_is_measured_where_statistics_allow():
    X = gaussian(50, 32)
    before = gaussian(4, 32, seed=1)
    after = (before * 1.1).bfloat16()
    delta = after.float() - before
    cases = {
        "outputs": (X, Statistics.of(X, [Gram])),
        "inputs": (torch.diag(X.square().sum(0).sqrt()), Statistics.of(X, [SquaredNorms])),
        "weights": (torch.eye(32), None),
    }
    for name, (seen, statistics) in cases.items():
        error, measured_on = relative_error(before, after, statistics)
        assert measured_on == name
        ratio = (seen @ delta.T).square().sum() / (seen @ before.T).square().sum()
        assert error == pytest.approx(ratio.item(), rel=1e-4)


def test_inputs_that_no_token_reached_say_nothing():
    idle = Statistics(0, {Gram: torch.zeros(32, 32)})
    before, after = gaussian(4, 32), gaussian(4, 32, seed=1)
    assert relative_error(before, after, idle) == relative_error(before, after, None)
    assert relative_error(before, after, Statistics(9, {}))[1] == "weights"


def test_a_layer_of_zeros_has_no_relative_error():
    zeros = torch.zeros(4, 32)
    assert relative_error(zeros, zeros, None) == (0.0, "weights")


def test_an_added_loss_weighs_the_errors_of_outputs():
    X = gaussian(50, 32)
    delta = gaussian(4, 32, seed=1)
    sensitivity = torch.tensor([0.0, 1.0, 2.0, 0.5])
    expected = ((X @ delta.T).square().sum(0) * sensitivity).sum() / 2
    gram = Statistics.of(X, [Gram])[Gram]
    assert added_loss(delta, gram, sensitivity) == pytest.approx(expected.item(), rel=1e-5)
