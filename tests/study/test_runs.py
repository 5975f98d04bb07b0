"""Contrasts of the performances of orders."""

import pytest
import torch

from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.study.runs import Runs

FORWARD = "wanda:0.5 > gptq:4"
REVERSE = "gptq:4 > wanda:0.5"


def around(*means, spread=0.001):
    """A row of two samples for each draw, of these means."""
    return [[mean - spread, mean + spread] for mean in means]


def test_a_contrast_is_over_draws_and_samples(make_trials):
    runs = Runs(
        make_trials(
            {
                REVERSE: [[-4.0, -4.2], [-4.1, -4.3], [-3.9, -4.1]],
                FORWARD: [[-3.9, -4.0], [-4.0, -4.1], [-3.7, -4.0]],
            }
        )
    )
    contrast = runs.contrast({REVERSE: 1, FORWARD: -1})
    differences = torch.tensor([[-0.1, -0.2], [-0.1, -0.2], [-0.2, -0.1]], dtype=torch.float64)
    expected = difference_over_draws(differences).as_dict()
    assert {key: contrast[key] for key in expected} == pytest.approx(expected)
    assert contrast["over"] == "draws and samples"
    assert contrast["draws"] == [0, 1, 2]
    assert contrast["calibrated"]
    weighted = runs.contrast({REVERSE: 0.5, FORWARD: -2})
    assert weighted["mean"] == pytest.approx(0.5 * -4.1 + 2 * 11.85 / 3)


def test_an_interval_over_draws_is_careful_where_single_draws_are_not(make_trials):
    """Each draw alone would claim a difference, and not the same one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 40, generator=generator, dtype=torch.float64) / 10
    forward = [(noise[0] + shift).tolist() for shift in (-0.5, 0.1, 0.4)]
    reverse = noise[1:].tolist()
    together = Runs(make_trials({FORWARD: forward, REVERSE: reverse}))
    contrast = together.contrast({FORWARD: 1, REVERSE: -1})
    alone = [
        difference_over_draws(torch.tensor([a], dtype=torch.float64) - torch.tensor([b]))
        for a, b in zip(forward, reverse, strict=True)
    ]
    assert {one.mean > 0 for one in alone if one.decisive} == {True, False}
    assert not contrast["decisive"]


def test_only_draws_that_all_orders_have_are_compared(make_trials):
    runs = Runs(make_trials({REVERSE: around(-4, -5, -6), FORWARD: [None, *around(-4.5, -5.25)]}))
    contrast = runs.contrast({REVERSE: 1, FORWARD: -1})
    assert contrast["draws"] == [1, 2]
    assert contrast["mean"] == pytest.approx(-0.625)
    assert runs.contrast({REVERSE: 1, "rtn:4": -1}) is None


def test_an_order_without_calibration_counts_in_every_draw(make_trials):
    runs = Runs(make_trials({"magnitude:0.5": [-3.0, -3.1], "gptq:4": around(-3.3, -3.2, -3.1)}))
    contrast = runs.contrast({"magnitude:0.5": 1, "gptq:4": -1})
    assert contrast["mean"] == pytest.approx(-3.05 + 3.2)
    assert contrast["draws"] == [0, 1, 2]
    assert runs.draws("magnitude:0.5") == [0]


def test_one_draw_is_decisive_about_samples_only(make_trials):
    plain = {"magnitude:0.5 > rtn:4": [-4.0, -4.1], "rtn:4 > magnitude:0.5": [-4.5, -4.6]}
    calibrated = {FORWARD: [-4.0, -4.1], REVERSE: [-4.5, -4.6]}
    runs = Runs(make_trials(plain | calibrated))
    for orders, calibrates in ((plain, False), (calibrated, True)):
        forward, reverse = orders
        contrast = runs.contrast({forward: 1, reverse: -1})
        assert contrast["over"] == "samples"
        assert contrast["decisive"]
        assert contrast["calibrated"] == calibrates


def test_a_broken_trial_has_no_draw(make_trials):
    broken = {"performance": None, "performances": None, "value": None}
    runs = Runs(make_trials({"rtn:2": [-9.0, -9.1]}, more={"rtn:2": broken}))
    assert runs.draws("rtn:2") == []
    assert runs.overall("rtn:2") is None
    assert runs.finished("rtn:2") == []


def test_an_interval_holds_only_what_can_be(store_trials, tmp_path):
    """Two draws and a t interval reach far beyond 100 points of accuracy."""
    scores = {
        "wanda:0.5": [[1.0, 0.0], [0.0, 0.0]],
        "gptq:4": [[0.0, 0.0], [1.0, 1.0]],
        "wanda:0.3": [[0.5, 0.0], [0.0, 0.5]],
    }
    ends = {}
    for metric in ("fidelity", "accuracy"):
        runs = Runs(store_trials(tmp_path / metric, scores, metric=metric))
        for weights in (
            {"wanda:0.5": 1, "gptq:4": -1},
            {"wanda:0.5": 1, "gptq:4": -0.5, "wanda:0.3": -0.5},
        ):
            contrast = runs.contrast(weights)
            ends[metric, len(weights)] = (contrast["low"], contrast["high"])
            assert contrast["low"] <= contrast["mean"] <= contrast["high"]
    assert all(
        low < -1.5 and high > 1.5 for low, high in (ends["fidelity", 2], ends["fidelity", 3])
    )
    assert ends["accuracy", 2] == ends["accuracy", 3] == (-1, 1)
