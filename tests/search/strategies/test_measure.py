"""Every order in full."""

import pytest

from optimum_order.search.strategies import measure


def test_scores_are_those_of_compressing_both_ways(make_task, search_compressor):
    task = make_task(["magnitude:0.5", "rtn:3"])
    verdict = measure.rank(task)
    metric = task.scoring.metric
    performances = []
    for order, score in verdict.ranking:
        compressed = search_compressor.compress(order, progress=False)
        measured = metric.measure(compressed.model, task.scoring.samples, progress=False)
        assert measured.performance == pytest.approx(score, rel=1e-4)
        performances.append(measured.performances)
    first, second = performances
    assert first.mean() >= second.mean()
    assert verdict.difference.mean == pytest.approx((first - second).mean().item(), rel=1e-3)
    assert verdict.scored_by == "fidelity"


def test_one_draw_decides_nothing_and_says_so(make_task):
    """Another calibration draw may prefer another order."""
    verdict = measure.rank(make_task(["sparsegpt:0.65", "rtn:2"]))
    assert verdict.difference.decisive
    assert verdict.difference.over == "samples"
    assert not verdict.decisive
    assert "covers samples only" in verdict.reason


def test_two_draws_give_an_interval_over_both(make_task):
    task = make_task(["sparsegpt:0.65", "rtn:2"], draws=2)
    verdict = measure.rank(task)
    assert verdict.difference.over == "draws and samples"
    assert verdict.decisive == verdict.difference.decisive
    assert "2 calibration draws" in verdict.reason
    assert task.cost["orders"] == 4


def test_without_calibration_one_draw_is_enough(make_task):
    task = make_task(["magnitude:0.65", "rtn:2"], draws=3)
    verdict = measure.rank(task)
    assert task.cost["orders"] == 2
    assert verdict.decisive
    assert verdict.difference.over == "samples"
    assert "all samples" in verdict.reason
