"""How far `auto` looks, and what it says then."""

import dataclasses

import pytest
import torch

from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.search import intervals
from optimum_order.search.sketch import Sketch
from optimum_order.search.strategies import auto
from optimum_order.search.strategies.base import Scoring

EASY = ["magnitude:0.65", "rtn:2"]
CALIBRATED = ["sparsegpt:0.65", "rtn:2"]


def test_a_few_layers_do_where_any_difference_is_believed(make_task):
    task = make_task(["wanda:0.65", "rtn:2"], confidence=0.0)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 4
    assert task.cost["calibration_samples"] == 4
    assert verdict.scored_by == "layer error"
    assert "4 draws of 1 calibration window" in verdict.reason
    assert verdict.difference.over == "draws, layers and samples"


def test_the_difference_is_extrapolated_from_what_was_measured(make_task, monkeypatch):
    """From M with noise in the other layers, and the errors' ratio over the layers looked at."""
    calls = []

    def extrapolate(measured, ratio):
        calls.append((measured, ratio))
        return intervals.extrapolate(measured, ratio)

    monkeypatch.setattr(auto, "extrapolate", extrapolate)
    task = make_task(EASY, confidence=0.0)
    verdict = auto.rank(task)
    ((measured, ratio),) = calls
    best, second = (order for order, _ in verdict.ranking)
    sketch = Sketch(task.runner, task.orders, task.small_draws())
    sketch.take(4, task.orders)
    expected = intervals.student(sketch.logarithms(second) - sketch.logarithms(best))
    assert ratio == expected
    assert ratio.mean > 0
    gaps = []
    for order in (best, second):
        sketch.imagine(order)
        measurement = task.measure(task.scoring.metric, task.few_samples())
        gaps.append(measurement.performances)
    assert measured == intervals.student(gaps[0] - gaps[1])
    assert verdict.difference == intervals.widened(intervals.extrapolate(measured, ratio))


def test_what_layer_errors_do_not_say_of_performance_is_in_the_interval(make_task, monkeypatch):
    monkeypatch.setattr(intervals, "WIDENING", dict.fromkeys(intervals.WIDENING, 1.0))
    verdict = auto.rank(make_task(EASY, confidence=0.0))
    assert verdict.decisive
    assert verdict.reason.endswith("in the other layers.")
    monkeypatch.undo()
    assert not auto.rank(make_task(EASY, confidence=0.0)).decisive  # the sketch is not the model
    monkeypatch.setattr(intervals, "WIDENING", dict.fromkeys(intervals.WIDENING, 1.0))
    monkeypatch.setattr(intervals, "BIAS", 10.0)
    wide = auto.rank(make_task(EASY, confidence=0.0))
    assert wide.ranking == verdict.ranking
    assert wide.difference.mean == verdict.difference.mean
    assert not wide.decisive
    assert wide.reason.endswith("too little to be sure of.")


def test_whole_models_decide_where_no_difference_of_errors_is_believed(make_task):
    task = make_task(CALIBRATED, confidence=1.0)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 14
    assert task.cost["scored_samples"] == 8
    assert verdict.scored_by == "fidelity"


def test_an_order_that_is_expected_to_lose_is_not_recommended_by_its_errors(make_task, monkeypatch):
    calls = []

    def imagine(self, best, second, whole=auto._Elimination._imagine):
        calls.append((best, second))
        difference = whole(self, best, second)
        return dataclasses.replace(difference, mean=-1.0) if len(calls) <= losing else difference

    monkeypatch.setattr(auto._Elimination, "_imagine", imagine)
    losing = 1
    task = make_task(EASY, confidence=0.0)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 8, "twice as many layers were looked at"
    assert verdict.scored_by == "layer error" and verdict.difference.mean > 0
    losing = 10
    task = make_task(EASY, confidence=0.0)
    assert auto.rank(task).scored_by != "layer error", "whole models decide"
    assert task.cost["layers"] == 14


def test_no_difference_is_said_where_there_is_none(make_task):
    verdict = auto.rank(make_task(["rtn:8", "magnitude:0.0"]))
    assert not verdict.decisive
    assert "no difference" in verdict.reason
    assert verdict.difference.low <= 0 <= verdict.difference.high


def test_three_stages_have_six_orders_and_those_that_fell_behind_no_score(make_task):
    task = make_task(["magnitude:0.6", "rtn:2", "rtn:8"])
    verdict = auto.rank(task)
    assert task.cost["orders"] == len({order for order, _ in verdict.ranking}) == 6
    scores = [score for _, score in verdict.ranking]
    assert None in scores
    scored = [score for score in scores if score is not None]
    assert scored == sorted(scored, reverse=verdict.scored_by == "fidelity")
    assert scores == scored + [None] * scores.count(None)


def test_no_order_is_dropped_that_the_partly_compressed_model_prefers(make_task, monkeypatch):
    """The layers' errors alone would do here, if the model did not say otherwise."""

    def score(self, orders):
        return {
            order: torch.tensor([order[0].method == "rtn"] * 4, dtype=torch.float64)
            for order in orders
        }

    monkeypatch.setattr(auto._Elimination, "_score", score)
    task = make_task(EASY)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 14
    assert verdict.scored_by == "fidelity"
    assert verdict.ranking[0][0][0].method == "rtn"


# Whole models


@pytest.fixture
def elimination(make_task):
    """`elimination(stages)`: all layers are taken in both orders."""

    def make(stages, **options):
        task = make_task(stages, **options)
        sketch = Sketch(task.runner, task.orders, task.small_draws())
        sketch.take(14, task.orders)
        return auto._Elimination(task, sketch)

    return make


def test_the_gap_of_whole_models_is_jackknifed_over_draws(elimination):
    """Against models with one draw's layers taken back, measured here."""
    state = elimination(["wanda:0.7", "rtn:2"])
    task, sketch = state.task, state.sketch
    metric = task.scoring.metric
    best, second = task.orders

    def performances(order, without=None):
        task.runner.reset()
        for unit in task.runner.units:
            for target in unit.targets:
                if sketch.layers.index(target.name) % 4 != without:
                    target.write(sketch.states[order][target.name].weight)
        return task.measure(metric, task.few_samples()).performances

    whole = performances(best) - performances(second)
    reduced = [performances(best, draw) - performances(second, draw) for draw in range(4)]
    difference = state._gap(best, second, metric)
    pseudo = torch.stack([4 * whole - 3 * gap for gap in reduced])
    spread = intervals.interval(metric, pseudo)
    half = (spread.high - spread.low) / 2
    assert intervals.student(whole).decisive
    assert difference.over == "draws, layers and samples"
    assert difference.mean == pytest.approx(whole.mean().item())
    assert difference.high - difference.mean == pytest.approx(half)
    assert difference == state._gap(best, second, metric, whole)


def test_without_calibration_or_a_difference_there_is_nothing_to_jackknife(elimination):
    for stages in (EASY, ["sparsegpt:0.0", "rtn:8"]):
        state = elimination(stages)
        difference = state._gap(*state.task.orders, state.task.scoring.metric)
        assert difference.over == "samples"


def test_where_m_is_coarse_a_finer_metric_ranks(make_task, search_compressor, scoring):
    finer = Fidelity(search_compressor.source.load())
    coarse = dataclasses.replace(scoring, metric=Perplexity(), scorer=finer)
    assert isinstance(coarse, Scoring)
    task = make_task(EASY, scoring=coarse, confidence=1.0)
    verdict = auto.rank(task)
    assert verdict.scored_by == "fidelity"
    assert ", by fidelity" in verdict.reason
    best, second = (order for order, _ in verdict.ranking[:2])
    gaps = []
    for order in (best, second):
        task.runner.run(order)
        gaps.append(task.measure(coarse.metric, task.few_samples()).performances)
    assert verdict.difference.mean == pytest.approx((gaps[0] - gaps[1]).mean().item(), rel=0.2)
