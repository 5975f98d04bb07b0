"""What a plan recommends, what it claims, and what it refuses."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.errors import DataError, ModelError, OrderError
from optimum_order.search.planner import STRATEGIES

PAIR = ["magnitude:0.5", "rtn:3"]
CALIBRATED = ["wanda:0.5", "gptq:3"]


@pytest.fixture(scope="module")
def plan(search_compressor, text_file):
    """`plan(stages, strategy)`: a plan for fidelity on 32 windows."""

    def make(stages, strategy="auto", **changes):
        options = {"metric": "fidelity", "evaluation_samples": 32, "progress": False}
        options |= {"evaluation": str(text_file)}
        return search_compressor.plan(stages, strategy, **options | changes)

    return make


@pytest.fixture(scope="module")
def plans(plan):
    return {name: plan(CALIBRATED, name) for name in STRATEGIES}


def test_every_strategy_ranks_every_order_once(plans):
    names = {"wanda:0.5 > gptq:3", "gptq:3 > wanda:0.5"}
    assert set(plans) == {"auto", "measure", "pih", "proxy"}
    for name, plan in plans.items():
        assert plan.strategy == name
        assert plan.metric == "fidelity"
        assert {str(order) for order, _ in plan.ranking} == names
        assert plan.order == plan.ranking[0][0]
        assert plan.reason.endswith(".")
        assert plan.cost["seconds"] > 0


def test_rules_of_thumb_claim_nothing_about_performance(plans):
    for name in ("pih", "proxy"):
        assert plans[name].difference is None
        assert not plans[name].decisive


def test_the_same_plan_twice_is_the_same(plan, plans):
    again = plan(CALIBRATED)
    assert again.ranking == plans["auto"].ranking
    assert again.difference == plans["auto"].difference


def test_a_large_difference_is_seen_by_auto():
    """On the real embedded model, where orders differ as they do for users."""
    unused = torch.zeros(8, 32, dtype=torch.int64)
    settings = {"calibration": unused, "sequence_length": 32, "device": "cpu"}
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration_samples=8, **settings)
    stages = ["magnitude:0.65", "rtn:2"]
    auto = compressor.plan(stages, evaluation_samples=64, progress=False)
    full = compressor.plan(stages, "measure", evaluation_samples=64, progress=False)
    assert auto.order == full.order
    assert full.decisive
    assert auto.cost["scored_samples"] < full.cost["scored_samples"]
    assert auto.difference.mean > 0


def test_a_rotation_is_planned_in_the_places_that_it_may_have(plan):
    result = plan(["magnitude:0.5", "rtn:3", "rotate"], "measure")
    orders = {str(order) for order, _ in result.ranking}
    assert orders == {
        "rotate:auto > magnitude:0.5 > rtn:3",
        "rotate:auto > rtn:3 > magnitude:0.5",
    }
    assert len(result.left_out) == 4
    assert all("rotate" in reason for reason in result.left_out.values())


def test_the_model_is_left_as_it_was(search_compressor, scoring):
    from optimum_order.search.planner import plan
    from optimum_order.search.strategies.base import Effort

    runner = search_compressor.runner(progress=False)
    plan(runner, PAIR, scoring, "pih", Effort(8))
    for unit in runner.units:
        for target in unit.targets:
            assert torch.equal(target.read(), runner.original.states[target.name].weight)


def test_compress_auto_records_the_plan(make_compressor):
    compressor = make_compressor()
    compressed = compressor.compress("auto", stages=PAIR, progress=False)
    order = compressed.order
    assert order == compressed.plan.order
    assert compressed.manifest["plan"]["order"] == str(order) == compressed.manifest["order"]
    explicit = compressor.compress(order, progress=False)
    assert "plan" not in explicit.manifest
    for name, state in compressed.layers.items():
        assert torch.equal(state.weight, explicit.layers[name].weight)


class TestRefused:
    def test_stages_that_cannot_be_planned(self, plan):
        for stages, message in (
            (["rtn:4"], "2 to 5 stages, got 1"),
            (["rtn:4", "wandaa:0.5"], "Did you mean 'wanda'"),
            (["rotate", "rtn:4"], "only 'rotate:auto > rtn:4' can be run"),
        ):
            with pytest.raises(OrderError, match=message):
                plan(stages)

    def test_a_strategy_that_does_not_exist(self, plan):
        with pytest.raises(OrderError, match="Did you mean 'proxy'"):
            plan(PAIR, "proxi")

    def test_proxy_cannot_rank_what_decides_across_layers(self, plan):
        with pytest.raises(OrderError, match="use strategy 'auto'"):
            plan(["magnitude:0.5", "mixed_precision:4"], "proxy")

    def test_stages_with_an_order_that_is_not_auto(self, search_compressor):
        for order, stages in (("rtn:4", PAIR), ("auto", None)):
            with pytest.raises(OrderError, match="order='auto'"):
                search_compressor.compress(order, stages=stages, progress=False)

    def test_too_few_samples_or_draws(self, plan):
        for options in ({"evaluation_samples": 3}, {"draws": 0}):
            with pytest.raises(DataError):
                plan(PAIR, **options)

    def test_calibration_that_is_missing(self, make_compressor):
        with pytest.raises(DataError, match="needs calibration data"):
            make_compressor(calibration=None).plan(CALIBRATED, progress=False)

    def test_a_metric_that_says_nothing_about_the_model(self, plan):
        with pytest.raises((ModelError, DataError)):
            plan(PAIR, metric="accuracy")


def test_runs_in_full_pause_where_they_are_told(make_compressor):
    """Later layers of a block read what earlier ones have become, if the walk pauses between."""
    scores = [
        dict(make_compressor().plan(CALIBRATED, "measure", pause=pause, progress=False).ranking)
        for pause in ("block", "group")
    ]
    assert scores[0].keys() == scores[1].keys()
    assert scores[0] != scores[1]
