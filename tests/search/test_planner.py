"""What a plan recommends, what it claims, and what it refuses."""

import json

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.errors import DataError, ModelError, OrderError
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.search import planner
from optimum_order.search.planner import STRATEGIES, Plan, _student, permutations

PAIR = ["magnitude:0.5", "rtn:3"]
CALIBRATED = ["wanda:0.5", "gptq:3"]
EASY = ["sparsegpt:0.65", "rtn:2"]


@pytest.fixture(scope="module")
def compressor():
    """The real embedded model: orders differ there as they do for users."""
    return JointCompressor.from_pretrained(
        "tiny-llama", calibration="builtin", calibration_samples=8, sequence_length=64, device="cpu"
    )


@pytest.fixture(scope="module")
def plans(compressor):
    return {
        name: compressor.plan(CALIBRATED, name, evaluation_samples=32, progress=False)
        for name in STRATEGIES
    }


def test_every_strategy_ranks_every_order_once(plans):
    for name, plan in plans.items():
        assert plan.strategy == name and plan.metric == "perplexity"
        assert {str(order) for order, _ in plan.ranking} == {
            "wanda:0.5 > gptq:3",
            "gptq:3 > wanda:0.5",
        }
        assert plan.order == plan.ranking[0][0]
        assert plan.reason.endswith(".") and plan.cost["seconds"] > 0


def test_a_plan_is_json(plans):
    for plan in plans.values():
        found = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
        assert found["order"] == str(plan.order) == found["ranking"][0]["order"]
        assert {"difference", "decisive", "reason", "cost"} <= set(found)
        assert Plan.from_dict(found) == plan


def test_rules_of_thumb_claim_nothing_about_performance(plans):
    for name in ("pih", "proxy"):
        assert plans[name].difference is None and not plans[name].decisive


def test_measure_finds_what_compressing_both_ways_finds(compressor):
    plan = compressor.plan(PAIR, "measure", evaluation_samples=32, progress=False)
    samples = compressor._evaluation("builtin", 32)
    measured = {}
    for order, score in plan.ranking:
        compressed = compressor.compress(order, progress=False)
        found = compressor._metric(compressed.model, "auto").measure(
            compressed.model, samples, progress=False
        )
        assert found.performance == pytest.approx(score, rel=1e-6)
        measured[order] = found.performances
    first, second = (measured[order] for order, _ in plan.ranking)
    assert first.mean() >= second.mean()
    assert plan.difference.mean == pytest.approx((first - second).mean().item())
    assert plan.decisive == plan.difference.decisive


def test_a_large_difference_is_found_by_auto_and_called_decisive(compressor):
    auto = compressor.plan(["magnitude:0.65", "rtn:2"], evaluation_samples=64, progress=False)
    full = compressor.plan(
        ["magnitude:0.65", "rtn:2"], "measure", evaluation_samples=64, progress=False
    )
    assert auto.order == full.order and auto.decisive and full.decisive
    assert auto.cost["scored_samples"] < full.cost["scored_samples"]
    assert auto.difference.low > 0


def test_no_difference_is_said_where_there_is_none(compressor):
    plan = compressor.plan(["rtn:8", "magnitude:0.0"], evaluation_samples=16, progress=False)
    assert not plan.decisive and "no difference" in plan.reason
    assert plan.difference.low <= 0 <= plan.difference.high


def test_pih_puts_the_weaker_stage_first(compressor):
    plan = compressor.plan(["magnitude:0.6", "rtn:8"], "pih", evaluation_samples=16, progress=False)
    assert str(plan.order) == "rtn:8 > magnitude:0.6"
    assert [score for _, score in plan.ranking] == [0, 1]


def test_three_stages_have_six_orders(compressor):
    plan = compressor.plan(
        ["magnitude:0.3", "rtn:4", "magnitude:0.5"], evaluation_samples=16, progress=False
    )
    assert len({order for order, _ in plan.ranking}) == 6 and plan.cost["orders"] == 6


def test_the_same_plan_twice_is_the_same(compressor, plans):
    again = compressor.plan(CALIBRATED, evaluation_samples=32, progress=False)
    assert again.ranking == plans["auto"].ranking and again.difference == plans["auto"].difference


def test_compress_auto_records_the_plan(compressor):
    compressed = compressor.compress("auto", stages=PAIR, progress=False)
    assert compressed.order == compressed.plan.order
    assert (
        compressed.manifest["plan"]["order"]
        == str(compressed.order)
        == compressed.manifest["order"]
    )
    explicit = compressor.compress(compressed.order, progress=False)
    assert "plan" not in explicit.manifest
    for name, state in compressed.layers.items():
        assert torch.equal(state.weight, explicit.layers[name].weight)


class TestRefused:
    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            (["rtn:4"], "2 to 5 stages, got 1"),
            ([f"magnitude:0.{i}" for i in range(1, 7)], "2 to 5 stages, got 6"),
            (["rtn:4", "rtn:4"], "nothing to order"),
            (["rtn:4", "wandaa:0.5"], "Did you mean 'wanda'"),
        ],
    )
    def test_stages_that_cannot_be_planned(self, compressor, stages, message):
        with pytest.raises(OrderError, match=message):
            compressor.plan(stages, progress=False)

    def test_a_strategy_that_does_not_exist(self, compressor):
        with pytest.raises(OrderError, match="Did you mean 'proxy'"):
            compressor.plan(PAIR, "proxi", progress=False)

    def test_proxy_cannot_rank_what_decides_across_layers(self, compressor):
        with pytest.raises(OrderError, match="use strategy 'auto'"):
            compressor.plan(
                ["magnitude:0.5", "mixed_precision:4"],
                "proxy",
                evaluation_samples=16,
                progress=False,
            )

    def test_stages_with_an_order_that_is_not_auto(self, compressor):
        for order, stages in (("rtn:4", PAIR), ("auto", None)):
            with pytest.raises(OrderError, match="order='auto'"):
                compressor.compress(order, stages=stages, progress=False)

    def test_too_few_samples_or_draws(self, compressor):
        for options in ({"evaluation_samples": 3}, {"draws": 0}):
            with pytest.raises(DataError):
                compressor.plan(PAIR, **options, progress=False)

    def test_calibration_that_is_missing(self, tiny_llama_folder):
        bare = JointCompressor.from_pretrained(tiny_llama_folder)
        with pytest.raises(DataError, match="needs calibration data"):
            bare.plan(CALIBRATED, progress=False)

    def test_a_metric_that_says_nothing_about_the_model(self, compressor):
        with pytest.raises((ModelError, DataError)):
            compressor.plan(PAIR, metric="accuracy", progress=False)


def test_every_permutation_is_there_once():
    assert len(permutations(["rtn:4", "magnitude:0.5", "wanda:0.5"])) == 6
    assert len(permutations(["rtn:4", "rtn:4", "wanda:0.5"])) == 3


def test_the_interval_is_students():
    found = _student(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 0.95)
    assert found.mean == 2.5 and found.high - found.mean == pytest.approx(3.1824463 * 1.2909944 / 2)
    assert isinstance(found.decisive, bool)


class TestDraws:
    """Another calibration draw may prefer another order: what is called decisive must say something about them."""

    def test_one_full_draw_decides_nothing_and_says_so(self, compressor):
        plan = compressor.plan(
            ["wanda:0.65", "gptq:2"], "measure", evaluation_samples=32, progress=False
        )
        assert plan.difference.decisive and plan.difference.over == "samples"
        assert not plan.decisive and "covers samples only" in plan.reason

    def test_two_draws_give_an_interval_over_both(self, compressor):
        plan = compressor.plan(
            CALIBRATED, "measure", draws=2, evaluation_samples=16, progress=False
        )
        assert (
            plan.difference.over == "draws and samples"
            and plan.decisive == plan.difference.decisive
        )
        assert "2 calibration draws" in plan.reason and plan.cost["orders"] == 4

    def test_without_calibration_there_is_nothing_to_draw(self, compressor):
        plan = compressor.plan(
            ["magnitude:0.65", "rtn:2"], "measure", draws=3, evaluation_samples=16, progress=False
        )
        assert plan.cost["orders"] == 2 and plan.decisive and plan.difference.over == "samples"


class TestHowFarAutoLooks:
    def planned(self, compressor, confidence, stages=CALIBRATED):
        runner, samples = compressor._runner(progress=False), compressor._evaluation("builtin", 64)
        return planner.plan(
            runner, stages, Perplexity(), samples, calibration_samples=8, confidence=confidence
        )

    def test_a_few_layers_do_where_any_difference_is_believed(self, compressor):
        plan = self.planned(compressor, 0.0, EASY)
        assert plan.cost["layers"] == 4 and plan.scored_by == "layer error"
        assert (
            "4 draws of 1 calibration window" in plan.reason
            and plan.cost["calibration_samples"] == 4
        )
        assert plan.difference.over == "draws, layers and samples"

    def test_what_layer_errors_do_not_say_of_performance_is_in_the_interval(
        self, compressor, monkeypatch
    ):
        plan = self.planned(compressor, 0.0, EASY)
        assert plan.decisive and plan.reason.endswith("in the other layers.")
        monkeypatch.setattr(planner, "_BIAS", 10.0)
        wide = self.planned(compressor, 0.0, EASY)
        assert wide.order == plan.order and wide.difference.mean == plan.difference.mean
        assert not wide.decisive and wide.reason.endswith("too little to be sure of.")

    def test_all_layers_and_whole_models_where_none_is(self, compressor):
        plan = self.planned(compressor, 1.0, EASY)
        assert plan.cost["layers"] == 28 and plan.scored_by == "perplexity"
        assert plan.cost["scored_samples"] == 4

    def test_an_order_that_fell_behind_is_not_scored(self, compressor):
        plan = self.planned(compressor, 0.9, ["magnitude:0.6", "rtn:2", "rtn:8"])
        scores = [score for _, score in plan.ranking]
        assert len(scores) == 6 and None in scores
        known = sorted(
            (score for score in scores if score is not None), reverse=plan.scored_by == "perplexity"
        )
        assert scores == known + [None] * scores.count(None)

    def test_no_order_is_dropped_that_the_partly_compressed_model_prefers(
        self, compressor, monkeypatch
    ):
        """The layers' errors alone would do here, if the model did not say otherwise."""
        monkeypatch.setattr(
            planner._Planner,
            "_scores",
            lambda self, sketch, orders, *_: {
                o: torch.tensor([o[0].method == "rtn"] * 4, dtype=float) for o in orders
            },
        )
        plan = self.planned(compressor, 0.9, EASY)
        assert (
            plan.cost["layers"] == 28
            and plan.scored_by == "perplexity"
            and plan.order[0].method == "rtn"
        )

    def test_stages_that_look_at_all_layers_run_in_small(self, compressor):
        plan = self.planned(
            compressor, 0.9, ["magnitude:0.5", "mixed_precision(bits=3, quantizer=rtn)"]
        )
        assert plan.cost["orders"] == 8 and plan.difference.over == "draws and samples"


def test_accuracy_that_did_not_change_is_not_known_exactly(compressor):
    runner, samples = compressor._runner(progress=False), compressor._evaluation("builtin", 4)
    found = planner._Planner(runner, permutations(PAIR), Perplexity(), samples, 8, False)._interval(
        Accuracy(), torch.zeros(1, 59)
    )
    assert (found.low, found.high) == pytest.approx(
        (-0.0495, 0.0495), abs=1e-4
    )  # 0.95 ** 59 is 5 % left
    assert not found.decisive
