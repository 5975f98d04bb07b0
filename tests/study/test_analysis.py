"""The summary of a study, finished or not."""

import math

import pytest

from optimum_order.study.analysis import summarize
from optimum_order.study.trials import Trials

CURVE = {
    f"rtn:{bits}": [m - 0.1, m + 0.1] for bits, m in {2: -6.0, 3: -4.0, 4: -3.5, 8: -3.0}.items()
}


def around(*means, spread=0.001):
    """A row of two samples for each draw, of these means."""
    return [[mean - spread, mean + spread] for mean in means]


def test_orders_say_what_they_cost(make_summary):
    costs = {"seconds": [1.0, 2.5], "cpu_seconds": [0.5, 1], "sparsity": 0.5, "bits": 4.0}
    name = "wanda:0.5 > rtn:4"
    (entry,) = make_summary({name: around(-4, -5)}, more={name: costs})["orders"]
    assert entry["performance"] == pytest.approx(-4.5)
    assert entry["value"] == pytest.approx((math.exp(4) + math.exp(5)) / 2)
    assert (entry["seconds"], entry["cpu_seconds"]) == (3.5, 1.5)
    assert (entry["sparsity"], entry["bits"]) == (0.5, 4.0)
    assert entry["kind"] == "joint"
    assert entry["draws"] == [0, 1]
    assert entry["bytes"] is None


def test_m_has_a_name_by_metric(make_summary):
    for metric, difference, factor in (
        ("perplexity", "log-perplexity", 1),
        ("accuracy", "points of accuracy", 100),
        ("fidelity", "KL", 1),
        ("own", "own", 1),
    ):
        measure = make_summary({}, metric=metric)["measure"]
        assert difference in measure["difference"]
        assert measure["factor"] == factor
        assert measure["say"].format("0.5").startswith("0.5 ")


# Three stages


def test_three_stages_are_ranked(make_summary):
    a, b, c = "wanda:0.4", "gptq:4", "magnitude:0.55"
    means = {(a, b, c): -4.0, (a, c, b): -4.2, (b, a, c): -5.0, (b, c, a): -4.001, (c, a, b): -4.1}
    orders = {
        " > ".join(order): [[m, m - 0.1], [m - 0.2, m - 0.29], [m + 0.1, m]]
        for order, m in means.items()
    }
    others = {"wanda:0.3 > gptq:4 > wanda:0.5": around(-4, -4.1)}
    (group,) = make_summary(orders | others)["rankings"]
    assert group["stages"] == tuple(sorted((a, b, c)))
    assert group["permutations"] == 6
    assert group["draws"] == [0, 1, 2]
    ranked = sorted(means, key=lambda order: -means[order])
    assert [entry["order"] for entry in group["ranking"]] == [" > ".join(order) for order in ranked]
    best, second, *_, last = group["ranking"]
    assert best["difference"] is None
    assert second["difference"]["mean"] == pytest.approx(-0.001)
    assert last["difference"]["mean"] == pytest.approx(-1)
    assert last["difference"]["decisive"]


def test_stages_that_repeat_have_fewer_permutations(make_summary):
    orders = {
        "wanda:0.3 > gptq:4 > wanda:0.3": around(-4, -4.1),
        "gptq:4 > wanda:0.3 > wanda:0.3": around(-4.5, -4.6),
    }
    (group,) = make_summary(orders)["rankings"]
    assert group["permutations"] == 3
    assert len(group["ranking"]) == 2


# Errors of blocks


def test_correlations_are_averaged_over_orders(make_summary):
    more = {
        "rtn:2": {"correlation": [[1, 0.1, None], [0.1, 1, 0.3], [None, 0.3, 1]]},
        "rtn:4": {"correlation": [[1, 0.3, None], [0.3, 1, 0.2], [None, 0.2, 1]]},
        "rtn:3": {"correlation": None},
        "rtn:8": {"correlation": []},
    }
    figures = make_summary(CURVE, more=more)["correlation"]
    assert (figures["units"], figures["orders"]) == (3, 2)
    assert figures["matrix"] == [
        [1, pytest.approx(0.2), None],
        [pytest.approx(0.2), 1, pytest.approx(0.25)],
        [None, pytest.approx(0.25), 1],
    ]
    assert figures["mean"] == pytest.approx(0.225)
    assert (figures["lowest"], figures["highest"]) == pytest.approx((0.2, 0.25))
    assert figures["inflation"] == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("rho", "verdict"), [(0.01, "nearly"), (-0.1, "weakly"), (0.225, "not independent")]
)
def test_the_verdict_follows_the_mean(make_summary, rho, verdict):
    more = {"rtn:2": {"correlation": [[1, rho], [rho, 1]]}}
    assert make_summary(CURVE, more=more)["correlation"]["verdict"].startswith(verdict)


@pytest.mark.parametrize("matrix", [[[1.0]], [], None, [[1, None], [None, 1]]])
def test_less_than_two_blocks_have_no_correlation(make_summary, matrix):
    assert make_summary(CURVE, more={"rtn:2": {"correlation": matrix}})["correlation"] is None


# Studies that are not finished


def test_an_empty_study(make_summary):
    summary = make_summary({})
    for name in ("pairs", "orders", "methods", "rankings", "draws"):
        assert summary[name] == []
    assert summary["all"]["mean_absolute_advantage"] is None
    assert summary["correlation"] is None
    assert summary["trials"]["planned"] is None
    assert summary["original"]["performance"] is None


def test_what_is_missing_is_listed(make_summary):
    orders = {"original": [-3.0, -3.1], "rtn:4": [-3.2, -3.3]}
    missing = [{"order": "rtn:3", "draw": 0}]
    trials = make_summary(orders, planned=[("rtn:4", 0), ("rtn:3", 0)])["trials"]
    assert trials == {"done": 1, "planned": 2, "missing": missing, "failed": []}


def test_a_broken_order_is_left_out_and_named(make_summary):
    broken = {"performance": None, "performances": None, "value": None, "error": "not finite"}
    orders = {
        "wanda:0.5": around(-3.5, -3.6),
        "rtn:2": [-9.0, -9.1],
        "wanda:0.5 > rtn:2": around(-9, -9.1),
        "rtn:2 > wanda:0.5": around(-9, -9.2),
    }
    summary = make_summary(orders, more={"rtn:2": broken, "rtn:2 > wanda:0.5": broken})
    assert summary["pairs"] == []
    assert summary["reference"]["performance"] == {}
    assert summary["trials"]["failed"] == [
        {"order": "rtn:2", "draw": 0, "error": "not finite"},
        {"order": "rtn:2 > wanda:0.5", "draw": 0, "error": "not finite"},
        {"order": "rtn:2 > wanda:0.5", "draw": 1, "error": "not finite"},
    ]
    entry = next(entry for entry in summary["orders"] if entry["order"] == "rtn:2")
    assert entry["performance"] is None
    assert entry["draws"] == []


def test_a_study_cut_after_any_trial_can_be_read(make_trials, tmp_path):
    orders = {
        "original": [-3.0, -3.1],
        "wanda:0.5": around(-3.4, -3.41, -3.42),
        "wanda:0.5 > rtn:4": around(-3.5, -3.51, -3.52, spread=0.05),
        "rtn:4 > wanda:0.5": around(-4.8, -4.81, -4.82, spread=0.05),
        "gptq:4 > wanda:0.4 > magnitude:0.5": around(-4, -5),
    }
    sizes = {order: {"bytes": {"dense": 1000 - 100 * i}} for i, order in enumerate(orders)}
    full = make_trials(CURVE | orders, more=sizes)
    rows = list(full.rows("trials").items())
    for count in range(0, len(rows), 3):
        trials = Trials(tmp_path / f"cut-{count}", full.settings)
        trials.add({("trials", *key): row for key, row in rows[:count]})
        summarize(trials)
