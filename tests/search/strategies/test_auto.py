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
    """From M with noise in the other layers, what that costs, and the errors' ratio."""
    calls = []

    def extrapolate(measured, ratio, loss):
        calls.append((measured, ratio, loss))
        return intervals.extrapolate(measured, ratio, loss)

    monkeypatch.setattr(auto, "extrapolate", extrapolate)
    task = make_task(EASY, confidence=0.0)
    verdict = auto.rank(task)
    ((measured, ratio, loss),) = calls
    best, second = (order for order, _ in verdict.ranking)
    sketch = Sketch(task.runner, task.orders, task.small_draws())
    sketch.take(4, task.orders)
    expected = intervals.student(sketch.logarithms(second) - sketch.logarithms(best))
    assert ratio == expected
    assert ratio.mean > 0
    performances = []
    for order in (best, second):
        sketch.imagine(order)
        measurement = task.measure(task.scoring.metric, task.few_samples())
        performances.append(measurement.performances)
    assert measured == intervals.student(performances[0] - performances[1])
    # the original agrees with itself, so all that is lost is what the two orders lose
    assert loss == pytest.approx(-torch.cat(performances).mean().item(), rel=1e-4)
    assert verdict.difference == intervals.widened(intervals.extrapolate(measured, ratio, loss))


def test_what_layer_errors_do_not_say_of_performance_is_in_the_interval(make_task, monkeypatch):
    monkeypatch.setattr(intervals, "WIDENING", dict.fromkeys(intervals.WIDENING, 1.0))
    verdict = auto.rank(make_task(EASY, confidence=0.0))
    assert verdict.decisive
    assert verdict.reason.endswith("in fidelity.")
    monkeypatch.setattr(intervals, "BIAS", 10.0)
    wide = auto.rank(make_task(EASY, confidence=0.0))
    assert wide.ranking == verdict.ranking
    assert wide.difference.mean == verdict.difference.mean
    assert not wide.decisive
    assert wide.reason.endswith("too little to be sure of.")


def test_whole_models_decide_where_the_witnesses_are_never_sure(make_task):
    task = make_task(CALIBRATED, confidence=1.0)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 14
    assert task.cost["scored_samples"] == 16
    assert verdict.scored_by == "fidelity"


# Two witnesses


def lie(monkeypatch, *, errors=None, scores=None):
    """Let a witness say that one order is better in every layer or sample, by the stage in front.

    Args:
        errors: What layers say: the method of the first stage of the better order.
        scores: What the imagined model says.
    """

    def logarithms(self, order):
        return torch.linspace(0.9, 1.1, len(self.states[order])).double() * (
            -1 if order[0].method == errors else 1
        )

    def imagined(self, order, metric):
        return torch.linspace(0.9, 1.1, 16).double() * (1 if order[0].method == scores else -1)

    if errors:
        monkeypatch.setattr(Sketch, "logarithms", logarithms)
    if scores:
        monkeypatch.setattr(auto._Elimination, "_imagined", imagined)


@pytest.mark.parametrize("first", ["rtn", "magnitude"])
def test_witnesses_that_agree_decide_at_once(make_task, monkeypatch, first):
    lie(monkeypatch, errors=first, scores=first)
    task = make_task(EASY)
    verdict = auto.rank(task)
    assert verdict.ranking[0][0][0].method == first
    assert task.cost["layers"] == 4


def test_witnesses_that_contradict_each_other_go_on_to_the_whole_model(make_task, monkeypatch):
    lie(monkeypatch, errors="magnitude", scores="rtn")
    monkeypatch.setattr(auto, "sureness", lambda values, bias=0.0: 3.0 if values.mean() > 0 else -3)
    task = make_task(EASY)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 14
    assert verdict.scored_by == "fidelity"
    assert verdict.ranking[0][0][0].method == "rtn", "the model decides, not the errors"


def test_one_that_is_sure_decides_where_the_other_is_not(make_task, monkeypatch):
    lie(monkeypatch, errors="magnitude", scores="rtn")
    monkeypatch.setattr(
        auto,
        "sureness",
        lambda values, bias=0.0: (0.5 if bias else 3.0) * values.mean().sign().item(),
    )
    task = make_task(EASY)
    verdict = auto.rank(task)
    assert task.cost["layers"] == 4
    assert verdict.ranking[0][0][0].method == "rtn"
    assert "more output error" in verdict.reason


def test_errors_are_taken_to_be_off_by_a_bias(make_task, monkeypatch):
    biases = []

    def sureness(values, bias=0.0):
        biases.append(bias)
        return intervals.sureness(values, bias)

    monkeypatch.setattr(auto, "sureness", sureness)
    auto.rank(make_task(EASY))
    assert set(biases) == {0.0, intervals.BIAS}


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


# Whole models


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


def test_a_coarse_metric_is_widened_more(make_task, search_compressor, scoring, monkeypatch):
    kinds = []

    def widened(difference, ranked_by):
        kinds.append(ranked_by)
        return intervals.widened(difference, ranked_by)

    monkeypatch.setattr(auto, "widened", widened)
    finer = Fidelity(search_compressor.source.load())
    coarse = dataclasses.replace(scoring, metric=Perplexity(), scorer=finer)
    for one in (scoring, coarse):
        auto.rank(make_task(EASY, scoring=one, confidence=0.0))
    assert kinds == ["M", "M by a finer metric"]
