"""Figures of hand-made trials whose answers are known."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.study.analysis import _front, summarize

CURVE = {
    f"rtn:{bits}": [m - 0.1, m + 0.1] for bits, m in {2: -6.0, 3: -4.0, 4: -3.5, 8: -3.0}.items()
}


def around(*means, spread=0.001):
    """A row of two samples for each draw, of these means."""
    return [[mean - spread, mean + spread] for mean in means]


def analysed(trials):
    summary = summarize(trials)
    assert json.loads(json.dumps(summary, allow_nan=False))
    return summary


# One pair


def test_an_advantage_is_that_of_quantising_first(make_trials):
    trials = make_trials(
        {
            "wanda:0.5": around(-3.5, -3.6, -3.4),
            "gptq:4": around(-3.2, -3.3, -3.1),
            "gptq:4 > wanda:0.5": [[-4.0, -4.2], [-4.1, -4.3], [-3.9, -4.1]],
            "wanda:0.5 > gptq:4": [[-3.9, -4.0], [-4.0, -4.1], [-3.7, -4.0]],
        }
    )
    (pair,) = analysed(trials)["pairs"]
    assert (pair["first"], pair["second"], pair["methods"]) == (
        "wanda:0.5",
        "gptq:4",
        ["wanda", "gptq"],
    )
    assert pair["orders"] == ["wanda:0.5 > gptq:4", "gptq:4 > wanda:0.5"]
    differences = torch.tensor([[-0.1, -0.2], [-0.1, -0.2], [-0.2, -0.1]], dtype=torch.float64)
    expected = difference_over_draws(differences).as_dict()
    assert {key: pair["advantage"][key] for key in expected} == pytest.approx(expected)
    assert pair["advantage"]["mean"] == pytest.approx(-0.15) and pair["advantage"]["draws"] == [
        0,
        1,
        2,
    ]
    assert pair["better"] == "wanda:0.5 > gptq:4"
    assert pair["performance"] == pytest.approx([-11.85 / 3, -12.3 / 3])
    assert pair["gap"]["mean"] == pytest.approx(-0.3) and pair["gap"]["decisive"]
    assert pair["prunes_and_quantizes"] and not pair["simulated"]


def test_only_draws_that_both_orders_have_are_compared(make_trials):
    trials = make_trials(
        {
            "gptq:4 > wanda:0.5": around(-4, -5, -6),
            "wanda:0.5 > gptq:4": [None, *around(-4.5, -5.25)],
        }
    )
    (pair,) = analysed(trials)["pairs"]
    assert pair["advantage"]["draws"] == [1, 2]
    assert pair["advantage"]["mean"] == pytest.approx(-0.625)
    assert pair["gap"] is None and pair["intensity"] is None and pair["split"] is None


def test_what_no_draw_changes_is_compared_with_every_draw(make_trials):
    # neither magnitude nor rtn calibrates: they have draw 0 only, and stand for themselves in the others
    trials = make_trials({"magnitude:0.5": [-3.0, -3.1], "gptq:4": around(-3.3, -3.2, -3.1)})
    trials.add(
        {
            ("trials", order, draw): {"performance": m, "performances": [m, m - 0.1]}
            for order, values in {
                "magnitude:0.5 > gptq:4": (-4.0, -4.1, -4.2),
                "gptq:4 > magnitude:0.5": (-4.1, -4.3, -4.5),
            }.items()
            for draw, m in enumerate(values)
        }
    )
    (pair,) = analysed(trials)["pairs"]
    assert pair["gap"]["mean"] == pytest.approx(-3.05 + 3.2) and pair["gap"]["draws"] == [0, 1, 2]
    assert pair["advantage"]["mean"] == pytest.approx(-0.2)


def test_a_pair_that_does_not_calibrate_has_no_draws_to_be_sure_of(make_trials):
    trials = make_trials(
        {"magnitude:0.5 > rtn:4": [-4.0, -4.1], "rtn:4 > magnitude:0.5": [-4.5, -4.6]}
    )
    summary = analysed(trials)
    (pair,) = summary["pairs"]
    assert pair["advantage"]["over"] == "samples" and pair["advantage"]["decisive"]
    assert not pair["advantage"]["calibrated"] and summary["all"]["samples_only"] == 0


def test_one_draw_of_what_calibrates_is_counted_as_unsure(make_trials):
    trials = make_trials({"wanda:0.5 > rtn:4": [-4.0, -4.1], "rtn:4 > wanda:0.5": [-4.5, -4.6]})
    assert analysed(trials)["all"]["samples_only"] == 1


# Ratios and intensity


@pytest.mark.parametrize(
    ("alone", "ratio", "bound"),
    [
        (-5.0, 1 - 2.5 / 16, "exact"),
        (-3.5, 1 - 4 / 16, "exact"),
        (-7.0, 1 - 2 / 16, "at least"),
        (-2.0, 0.5, "at most"),
    ],
)
def test_intensity_is_read_from_the_reference(make_trials, alone, ratio, bound):
    orders = {
        "magnitude:0.5": [alone] * 2,
        "magnitude:0.5 > rtn:3": [-8.0, -8.1],
        "rtn:3 > magnitude:0.5": [-9.0, -9.1],
    }
    summary = analysed(make_trials(CURVE | orders))
    (pair,) = summary["pairs"]
    assert pair["equivalent"][0] == {"value": pytest.approx(ratio), "bound": bound}
    assert pair["equivalent"][1] == {"value": pytest.approx(1 - 3 / 16), "bound": "exact"}
    assert pair["intensity"] == {"value": pytest.approx(ratio - 1 + 3 / 16), "bound": bound}
    assert summary["reference"]["performance"] == pytest.approx(
        {"2": -6.0, "3": -4.0, "4": -3.5, "8": -3.0}
    )


def study_of_pairs(advantages, alone):
    """Performances of magnitude at several sparsities with rtn:4, of these advantages of quantising first."""
    found = dict(CURVE)
    for at, (advantage, m) in enumerate(zip(advantages, alone, strict=True), 1):
        p = f"magnitude:0.{at}"
        found[p] = [m - 0.01, m + 0.01]
        found[f"{p} > rtn:4"] = [-5.1, -5.0]
        found[f"rtn:4 > {p}"] = [-5.1 + advantage, -5.0 + advantage]
    return found


def test_a_hypothesis_that_holds(make_trials):
    # rtn:4 alone has -3.5: what is below is stronger than it
    summary = analysed(
        make_trials(
            study_of_pairs([-0.3, -0.2, -0.1, 0.1, 0.2, 0.4], [-3.1, -3.2, -3.3, -3.7, -3.9, -4.2])
        )
    )
    found = summary["all"]
    assert (found["pairs"], found["decisive"], found["quantize_first"]) == (6, 6, 3)
    assert found["mean_absolute_advantage"] == pytest.approx(1.3 / 6)
    assert found["largest_advantage"] == pytest.approx(0.4)
    rules = found["rules"]
    assert rules["weaker_first"] == {
        "pairs": 6,
        "decisive": 6,
        "right": 1.0,
        "regret": 0.0,
        "relative_regret": 0.0,
    }
    assert rules["prune_first"]["right"] == 0.5
    assert rules["prune_first"]["regret"] == pytest.approx(0.7 / 6)
    assert rules["prune_first"]["relative_regret"] == pytest.approx(0.7 / 1.3)
    assert rules["layer_errors"] == {
        "pairs": 0,
        "decisive": 0,
        "right": None,
        "regret": None,
        "relative_regret": None,
    }
    rho = found["spearman"]
    assert rho["rho"] == pytest.approx(1) and rho["pairs"] == 6 and rho["bounds"] == 0
    assert [group["methods"] for group in summary["methods"]] == [("magnitude", "rtn")]


def test_a_hypothesis_that_does_not(make_trials):
    summary = analysed(
        make_trials(
            study_of_pairs([0.3, 0.2, 0.1, -0.1, -0.2, -0.4], [-3.1, -3.2, -3.3, -3.7, -3.9, -4.2])
        )
    )
    found = summary["all"]
    assert (
        found["rules"]["weaker_first"]["right"] == 0
        and found["rules"]["weaker_first"]["relative_regret"] == 1
    )
    assert found["spearman"]["rho"] == pytest.approx(-1)


def test_where_a_rule_sees_no_difference_it_is_right_half_of_the_time(make_trials):
    summary = analysed(make_trials(study_of_pairs([0.2], [-3.5])))
    assert summary["pairs"][0]["gap"]["mean"] == pytest.approx(0, abs=1e-12)
    (pair,) = summary["pairs"]
    pair["gap"]["mean"] = 0.0
    from optimum_order.study.analysis import _judge

    assert _judge("weaker_first", [pair], 0.2) == {
        "pairs": 1,
        "decisive": 1,
        "right": 0.5,
        "regret": pytest.approx(0.1),
        "relative_regret": pytest.approx(0.5),
    }


def test_bounds_beyond_the_reference_still_say_which_is_the_stronger(make_trials):
    orders = {
        "magnitude:0.5": [-9.0, -9.1],
        "rtn(bits=2, group_size=16)": [
            -7.0,
            -7.1,
        ],  # both below rtn:2, where ratios are bounds of the same value
        "magnitude:0.5 > rtn(bits=2, group_size=16)": [-10.0, -10.1],
        "rtn(bits=2, group_size=16) > magnitude:0.5": [-9.5, -9.6],
    }
    summary = analysed(make_trials(CURVE | orders))
    (pair,) = summary["pairs"]
    assert pair["intensity"]["bound"] == "unknown" and pair["methods"] == [
        "magnitude",
        "rtn(group_size=16)",
    ]
    assert summary["all"]["rules"]["weaker_first"]["right"] == 1
    assert summary["all"]["spearman"]["pairs"] == 0 and summary["all"]["spearman"]["rho"] is None


def test_a_few_pairs_have_no_interval_of_rho(make_trials):
    rho = analysed(make_trials(study_of_pairs([-0.3, 0.1, 0.2], [-3.1, -3.7, -3.9])))["all"][
        "spearman"
    ]
    assert (
        rho["rho"] == pytest.approx(1)
        and rho["low"] is None
        and rho["reason"] == "there are only 3 pairs"
    )


# Where the advantage comes from


@pytest.mark.parametrize("turned", [False, True])
def test_a_split_is_positive_where_quantising_first_has_less_error(make_trials, turned):
    orders = {"wanda:0.5 > rtn:4": around(-4, -4.1), "rtn:4 > wanda:0.5": around(-3.8, -3.9)}
    key = (
        "wanda:0.5 > rtn:4 | rtn:4 > wanda:0.5"
        if turned
        else "rtn:4 > wanda:0.5 | wanda:0.5 > rtn:4"
    )
    sign = -1 if turned else 1
    layers = [
        {"a": (0.3, 0.2, 0.1), "b": (-0.1, 0.1, -0.2)},
        {"a": (0.5, 0.2, 0.3), "b": (-0.3, -0.1, -0.2)},
    ]
    pairs = {
        (key, draw): {name: [sign * x for x in split] for name, split in each.items()}
        for draw, each in enumerate(layers)
    }
    summary = analysed(make_trials(orders, pairs=pairs))
    split = summary["pairs"][0]["split"]
    assert split["layers"]["a"] == pytest.approx({"whole": 0.4, "owner": 0.2, "interference": 0.2})
    assert split["layers"]["b"] == pytest.approx(
        {"whole": -0.2, "owner": 0.0, "interference": -0.2}
    )
    assert (split["whole"], split["owner"], split["interference"]) == pytest.approx((0.2, 0.2, 0.0))
    assert summary["all"]["rules"]["layer_errors"]["right"] == 1
    assert summary["all"]["split"]["owner_share"] == pytest.approx(1)


# Other orders


def test_groups_are_by_methods_their_options_and_the_grid(make_trials):
    orders = {}
    for p in ("wanda:0.5", "wanda(off_grid=true, sparsity=0.5)", "wanda(pattern=2:4)"):
        for q in ("rtn:4", "rtn(bits=4, group_size=16)"):
            orders |= {f"{p} > {q}": around(-4, -4.1), f"{q} > {p}": around(-4, -4.2)}
    found = [
        (*group["methods"], group["simulated"], group["pairs"])
        for group in analysed(make_trials(orders))["methods"]
    ]
    assert found == [
        ("wanda", "rtn", False, 1),
        ("wanda", "rtn", True, 1),
        ("wanda", "rtn(group_size=16)", False, 1),
        ("wanda", "rtn(group_size=16)", True, 1),
        ("wanda(pattern=2:4)", "rtn", False, 1),
        ("wanda(pattern=2:4)", "rtn(group_size=16)", False, 1),
    ]


def test_two_pruners_are_a_pair_but_neither_prunes_first(make_trials):
    trials = make_trials(
        {
            "wanda:0.5 > magnitude:0.7": around(-4, -4.1),
            "magnitude:0.7 > wanda:0.5": around(-3.8, -3.9),
        }
    )
    summary = analysed(trials)
    (pair,) = summary["pairs"]
    assert pair["first"] == "wanda:0.5" and pair["advantage"]["mean"] == pytest.approx(0.2)
    assert not pair["prunes_and_quantizes"] and summary["all"]["rules"]["prune_first"]["pairs"] == 0


def test_mixed_precision_quantises(make_trials):
    orders = {
        "mixed_precision:3 > wanda:0.5": around(-4, -4.1),
        "wanda:0.5 > mixed_precision:3": around(-3.8, -3.9),
    }
    (pair,) = analysed(make_trials(orders))["pairs"]
    assert pair["first"] == "wanda:0.5" and pair["prunes_and_quantizes"]


def test_an_order_that_is_its_own_reverse_is_no_pair(make_trials):
    assert analysed(make_trials({"rtn:4 > rtn:4": [-4.0, -4.1]}))["pairs"] == []


def test_three_stages_are_ranked(make_trials):
    a, b, c = "wanda:0.4", "gptq:4", "magnitude:0.55"
    means = {(a, b, c): -4.0, (a, c, b): -4.2, (b, a, c): -5.0, (b, c, a): -4.001, (c, a, b): -4.1}
    trials = make_trials(
        {
            " > ".join(order): [[m, m - 0.1], [m - 0.2, m - 0.29], [m + 0.1, m]]
            for order, m in means.items()
        }
        | {"wanda:0.3 > gptq:4 > wanda:0.5": around(-4, -4.1)}
    )
    (group,) = analysed(trials)["rankings"]
    assert (
        group["stages"] == tuple(sorted((a, b, c)))
        and group["permutations"] == 6
        and group["draws"] == [0, 1, 2]
    )
    ranked = sorted(means, key=lambda order: -means[order])
    assert [each["order"] for each in group["ranking"]] == [" > ".join(order) for order in ranked]
    best, second, *_, last = group["ranking"]
    assert best["difference"] is None and last["difference"]["mean"] == pytest.approx(-1)
    assert last["difference"]["decisive"] and second["difference"]["mean"] == pytest.approx(-0.001)


def test_stages_that_repeat_have_fewer_permutations(make_trials):
    trials = make_trials(
        {
            "wanda:0.3 > gptq:4 > wanda:0.3": around(-4, -4.1),
            "gptq:4 > wanda:0.3 > wanda:0.3": around(-4.5, -4.6),
        }
    )
    (group,) = analysed(trials)["rankings"]
    assert group["permutations"] == 3 and len(group["ranking"]) == 2


# Bytes


points = st.dictionaries(
    st.text(max_size=3), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12
)


@given(points)
def test_a_front_is_what_nothing_beats(points):
    front = _front(points)

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    best = {
        name
        for name, point in points.items()
        if not any(beats(other, point) for other in points.values())
    }
    assert set(front) <= best and {points[name] for name in front} == {
        points[name] for name in best
    }
    sizes = [points[name] for name in front]
    assert sizes == sorted(set(sizes))


def sized(**changes):
    bytes_ = {
        "original": {"dense": 1000},
        "rtn:2": {"compressed-tensors": 200},
        "rtn:4": {"compressed-tensors": 400},
        "wanda:0.5": {"dense": 1000, "sparse": 500},
        "wanda:0.5 > rtn:4": {"compressed-tensors": 400, "sparse": 300},
        "rtn:4 > wanda:0.5": {"compressed-tensors": 400, "sparse": 310},
    }
    return {order: {"bytes": each} for order, each in (bytes_ | changes).items()}


JOINT = {
    "original": [-3.0, -3.1],
    "rtn:2": [-5.1, -5.0],
    "rtn:4": [-3.3, -3.2],
    "wanda:0.5": around(-3.4, -3.41, -3.42),
    "wanda:0.5 > rtn:4": around(-3.5, -3.51, -3.52, spread=0.05),
    "rtn:4 > wanda:0.5": around(-4.8, -4.81, -4.82, spread=0.05),
}


def test_combining_pays_only_if_it_beats_what_lies_between_models_that_were_not(make_trials):
    summary = analysed(make_trials(JOINT, more=sized()))
    stock, every = summary["combining"]["stock"], summary["combining"]["any"]
    # 400 bytes in a stock format, as rtn:4 alone, and worse
    assert (stock["joint"], stock["comparable"], stock["decisively_worse"], stock["better"]) == (
        2,
        2,
        2,
        0,
    )
    assert stock["on_front"] == 0 and stock["front"] == ["rtn:2", "rtn:4", "original"]
    # 300 bytes in ours: half-way from rtn:2 to rtn:4, whose mean M there is -4.15
    assert every["comparable"] == 2 and every["better"] == every["decisively_better"] == 1
    best = every["best"]
    assert (
        best["order"] == "wanda:0.5 > rtn:4"
        and best["bytes"] == 300
        and best["alone"] == ["rtn:2", "rtn:4"]
    )
    assert best["gain"]["mean"] == pytest.approx(-3.51 + 4.15)
    assert best["gain"]["over"] == "draws and samples"
    assert every["front"] == ["rtn:2", "wanda:0.5 > rtn:4", "rtn:4", "original"]
    fronts = {entry["order"]: entry["pareto"] for entry in summary["orders"]}
    assert fronts["wanda:0.5 > rtn:4"] == {"stock": False, "any": True}
    assert fronts["rtn:4"] == {"stock": True, "any": True} and fronts["wanda:0.5"] == {
        "stock": False,
        "any": False,
    }


def test_a_joint_model_smaller_than_all_others_is_compared_with_none(make_trials):
    small = {"wanda:0.5 > rtn:4": {"sparse": 100}}
    found = analysed(make_trials(JOINT, more=sized(**small)))["combining"]["any"]
    assert found["comparable"] == 1 and found["front"][0] == "wanda:0.5 > rtn:4"


# Errors of blocks


def test_correlations_are_averaged_over_orders(make_trials):
    more = {
        "rtn:2": {"correlation": [[1, 0.1, None], [0.1, 1, 0.3], [None, 0.3, 1]]},
        "rtn:4": {"correlation": [[1, 0.3, None], [0.3, 1, 0.2], [None, 0.2, 1]]},
        "rtn:3": {"correlation": None},
        "rtn:8": {"correlation": []},
    }
    found = analysed(make_trials(CURVE, more=more))["correlation"]
    assert found["units"] == 3 and found["orders"] == 2
    assert found["matrix"] == [
        [1, pytest.approx(0.2), None],
        [pytest.approx(0.2), 1, pytest.approx(0.25)],
        [None, pytest.approx(0.25), 1],
    ]
    assert found["mean"] == pytest.approx(0.225)
    assert (found["lowest"], found["highest"]) == pytest.approx((0.2, 0.25))
    assert found["inflation"] == pytest.approx(1.45) and found["verdict"] == "not independent"


@pytest.mark.parametrize(
    ("rho", "verdict"), [(0.01, "nearly"), (-0.1, "weakly"), (0.5, "not independent")]
)
def test_the_verdict_follows_the_mean(make_trials, rho, verdict):
    more = {"rtn:2": {"correlation": [[1, rho], [rho, 1]]}}
    assert analysed(make_trials(CURVE, more=more))["correlation"]["verdict"].startswith(verdict)


@pytest.mark.parametrize("matrix", [[[1.0]], [], None, [[1, None], [None, 1]]])
def test_no_two_units_have_no_correlation(make_trials, matrix):
    assert (
        analysed(make_trials(CURVE, more={"rtn:2": {"correlation": matrix}}))["correlation"] is None
    )


# Studies that are not finished


def test_an_empty_study(make_trials):
    summary = analysed(make_trials({}))
    assert (
        summary["pairs"]
        == summary["orders"]
        == summary["methods"]
        == summary["rankings"]
        == summary["draws"]
        == []
    )
    assert summary["all"]["mean_absolute_advantage"] is None and summary["correlation"] is None
    assert summary["trials"]["planned"] is None and summary["original"]["performance"] is None


def test_what_is_missing_is_listed(make_trials):
    trials = make_trials(
        {"original": [-3.0, -3.1], "rtn:4": [-3.2, -3.3]}, planned=[("rtn:4", 0), ("rtn:3", 0)]
    )
    found = analysed(trials)["trials"]
    assert found == {
        "done": 1,
        "planned": 2,
        "missing": [{"order": "rtn:3", "draw": 0}],
        "failed": [],
    }


def test_a_broken_order_is_left_out_and_named(make_trials):
    broken = {"performance": None, "performances": None, "value": None, "error": "not finite"}
    orders = {
        "wanda:0.5": around(-3.5, -3.6),
        "rtn:2": [-9.0, -9.1],
        "wanda:0.5 > rtn:2": around(-9, -9.1),
        "rtn:2 > wanda:0.5": around(-9, -9.2),
    }
    summary = analysed(make_trials(orders, more={"rtn:2": broken, "rtn:2 > wanda:0.5": broken}))
    assert summary["pairs"] == [] and summary["reference"]["performance"] == {}
    assert summary["trials"]["failed"] == [
        {"order": "rtn:2", "draw": 0, "error": "not finite"},
        {"order": "rtn:2 > wanda:0.5", "draw": 0, "error": "not finite"},
        {"order": "rtn:2 > wanda:0.5", "draw": 1, "error": "not finite"},
    ]
    entry = next(entry for entry in summary["orders"] if entry["order"] == "rtn:2")
    assert entry["performance"] is None and entry["draws"] == []


def test_a_study_cut_after_any_trial_can_be_read(make_trials, tmp_path):
    full = make_trials(
        CURVE | JOINT | {"gptq:4 > wanda:0.4 > magnitude:0.5": around(-4, -5)}, more=sized()
    )
    rows = list(full.rows("trials").items())
    for count in range(0, len(rows), 3):
        trials = type(full)(tmp_path / f"cut-{count}", full.settings)
        trials.add({("trials", *key): row for key, row in rows[:count]})
        analysed(trials)


@pytest.mark.parametrize(
    ("metric", "difference", "factor"),
    [
        ("perplexity", "log-perplexity", 1),
        ("accuracy", "points of accuracy", 100),
        ("fidelity", "KL", 1),
        ("own", "own", 1),
    ],
)
def test_m_has_a_name_by_metric(make_trials, metric, difference, factor):
    found = analysed(make_trials({"rtn:4": [-1.0, -2.0]}, metric=metric))["measure"]
    assert difference in found["difference"] and found["factor"] == factor
    assert found["say"].format("0.5").startswith("0.5 ")


def test_orders_say_what_they_cost(make_trials):
    more = {
        "wanda:0.5 > rtn:4": {
            "seconds": [1.0, 2.5],
            "cpu_seconds": [0.5, 1],
            "sparsity": 0.5,
            "bits": 4.0,
        }
    }
    (entry,) = analysed(make_trials({"wanda:0.5 > rtn:4": around(-4, -5)}, more=more))["orders"]
    assert entry["performance"] == pytest.approx(-4.5) and entry["value"] == pytest.approx(
        (math.exp(4) + math.exp(5)) / 2
    )
    assert (entry["seconds"], entry["cpu_seconds"], entry["sparsity"], entry["bits"]) == (
        3.5,
        1.5,
        0.5,
        4.0,
    )
    assert entry["kind"] == "joint" and entry["draws"] == [0, 1] and entry["bytes"] is None
