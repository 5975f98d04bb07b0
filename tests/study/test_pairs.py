"""Figures of pairs of stages on hand-made trials whose answers are known."""

import pytest

from optimum_order.order import Stage
from optimum_order.study.pairs import judge, role

CURVE = {
    f"rtn:{bits}": [m - 0.1, m + 0.1] for bits, m in {2: -6.0, 3: -4.0, 4: -3.5, 8: -3.0}.items()
}


def around(*means, spread=0.001):
    """A row of two samples for each draw, of these means."""
    return [[mean - spread, mean + spread] for mean in means]


# One pair


def test_an_advantage_is_that_of_quantizing_first(make_summary):
    orders = {
        "wanda:0.5": around(-3.5, -3.6, -3.4),
        "gptq:4": around(-3.2, -3.3, -3.1),
        "gptq:4 > wanda:0.5": [[-4.0, -4.2], [-4.1, -4.3], [-3.9, -4.1]],
        "wanda:0.5 > gptq:4": [[-3.9, -4.0], [-4.0, -4.1], [-3.7, -4.0]],
    }
    (pair,) = make_summary(orders)["pairs"]
    assert (pair["first"], pair["second"]) == ("wanda:0.5", "gptq:4")
    assert pair["methods"] == ["wanda", "gptq"]
    assert pair["orders"] == ["wanda:0.5 > gptq:4", "gptq:4 > wanda:0.5"]
    assert pair["advantage"]["mean"] == pytest.approx(-0.15)
    assert pair["advantage"]["draws"] == [0, 1, 2]
    assert pair["better"] == "wanda:0.5 > gptq:4"
    assert pair["performance"] == pytest.approx([-11.85 / 3, -12.3 / 3])
    # G(P, Q) is negative where P is the stronger
    assert pair["gap"]["mean"] == pytest.approx(-0.3)
    assert pair["gap"]["decisive"]
    assert pair["prunes_and_quantizes"]
    assert not pair["simulated"]


def test_a_pair_alone_has_an_advantage_and_nothing_else(make_summary):
    orders = {"gptq:4 > wanda:0.5": around(-4), "wanda:0.5 > gptq:4": around(-4.5)}
    (pair,) = make_summary(orders)["pairs"]
    assert pair["advantage"]["mean"] == pytest.approx(0.5)
    assert pair["gap"] is pair["intensity"] is pair["split"] is None


def test_one_draw_of_what_calibrates_is_counted_as_unsure(make_summary):
    for pruner, count in (("magnitude:0.5", 0), ("wanda:0.5", 1)):
        orders = {f"{pruner} > rtn:4": [-4.0, -4.1], f"rtn:4 > {pruner}": [-4.5, -4.6]}
        assert make_summary(orders)["all"]["samples_only"] == count


def test_two_pruners_are_a_pair_but_neither_prunes_first(make_summary):
    orders = {
        "wanda:0.5 > magnitude:0.7": around(-4, -4.1),
        "magnitude:0.7 > wanda:0.5": around(-3.8, -3.9),
    }
    summary = make_summary(orders)
    (pair,) = summary["pairs"]
    assert pair["first"] == "wanda:0.5"
    assert pair["advantage"]["mean"] == pytest.approx(0.2)
    assert not pair["prunes_and_quantizes"]
    assert summary["all"]["rules"]["prune_first"]["pairs"] == 0


def test_mixed_precision_quantizes(make_summary):
    orders = {
        "mixed_precision:3 > wanda:0.5": around(-4, -4.1),
        "wanda:0.5 > mixed_precision:3": around(-3.8, -3.9),
    }
    (pair,) = make_summary(orders)["pairs"]
    assert pair["first"] == "wanda:0.5"
    assert pair["prunes_and_quantizes"]
    stages = ["mixed_precision:3", "gptq:4", "bitsandbytes:nf4", "sparsegpt:0.5", "magnitude:0.5"]
    assert [role(Stage.parse(stage)) for stage in stages] == ["quantize"] * 3 + ["prune"] * 2


def test_an_order_that_is_its_own_reverse_is_no_pair(make_summary):
    assert make_summary({"rtn:4 > rtn:4": [-4.0, -4.1]})["pairs"] == []


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
def test_intensity_is_read_from_the_reference(make_summary, alone, ratio, bound):
    orders = {
        "magnitude:0.5": [alone] * 2,
        "magnitude:0.5 > rtn:3": [-8.0, -8.1],
        "rtn:3 > magnitude:0.5": [-9.0, -9.1],
    }
    summary = make_summary(CURVE | orders)
    (pair,) = summary["pairs"]
    assert pair["equivalent"][0] == {"value": pytest.approx(ratio), "bound": bound}
    # of the reference quantizer at a measured width, it is the paper's C_Q = 1 - b/16
    assert pair["equivalent"][1] == {"value": pytest.approx(1 - 3 / 16), "bound": "exact"}
    assert pair["intensity"] == {"value": pytest.approx(ratio - 1 + 3 / 16), "bound": bound}
    reference = {"2": -6.0, "3": -4.0, "4": -3.5, "8": -3.0}
    assert summary["reference"]["performance"] == pytest.approx(reference)


# Groups of pairs


def study_of_pairs(advantages, alone):
    """Return performances of magnitude with rtn:4 for these advantages of quantizing first."""
    orders = dict(CURVE)
    for number, (advantage, m) in enumerate(zip(advantages, alone, strict=True), 1):
        pruner = f"magnitude:0.{number}"
        orders[pruner] = [m - 0.01, m + 0.01]
        orders[f"{pruner} > rtn:4"] = [-5.1, -5.0]
        orders[f"rtn:4 > {pruner}"] = [-5.1 + advantage, -5.0 + advantage]
    return orders


ALONE = [-3.1, -3.2, -3.3, -3.7, -3.9, -4.2]
"""M of each pruner alone: rtn:4 alone has -3.5, and what is below is stronger."""


def test_a_hypothesis_that_holds(make_summary):
    summary = make_summary(study_of_pairs([-0.3, -0.2, -0.1, 0.1, 0.2, 0.4], ALONE))
    figures = summary["all"]
    assert (figures["pairs"], figures["decisive"], figures["quantize_first"]) == (6, 6, 3)
    assert figures["mean_absolute_advantage"] == pytest.approx(1.3 / 6)
    assert figures["largest_advantage"] == pytest.approx(0.4)
    rules = figures["rules"]
    counts = {"pairs": 6, "decisive": 6}
    assert rules["weaker_first"] == counts | {"right": 1.0, "regret": 0.0, "relative_regret": 0.0}
    assert rules["prune_first"]["right"] == 0.5
    assert rules["prune_first"]["regret"] == pytest.approx(0.7 / 6)
    assert rules["prune_first"]["relative_regret"] == pytest.approx(0.7 / 1.3)
    silent = {"right": None, "regret": None, "relative_regret": None}
    assert rules["layer_errors"] == {"pairs": 0, "decisive": 0} | silent
    rho = figures["spearman"]
    assert rho["rho"] == pytest.approx(1)
    assert (rho["pairs"], rho["bounds"]) == (6, 0)
    assert [group["methods"] for group in summary["methods"]] == [("magnitude", "rtn")]


def test_a_hypothesis_that_does_not(make_summary):
    figures = make_summary(study_of_pairs([0.3, 0.2, 0.1, -0.1, -0.2, -0.4], ALONE))["all"]
    assert figures["rules"]["weaker_first"]["right"] == 0
    assert figures["rules"]["weaker_first"]["relative_regret"] == 1
    assert figures["spearman"]["rho"] == pytest.approx(-1)


def test_where_a_rule_sees_no_difference_it_is_right_half_of_the_time(make_summary):
    (pair,) = make_summary(study_of_pairs([0.2], [-3.5]))["pairs"]
    assert pair["gap"]["mean"] == pytest.approx(0, abs=1e-12)
    pair["gap"]["mean"] = 0.0
    assert judge("weaker_first", [pair], 0.2) == {
        "pairs": 1,
        "decisive": 1,
        "right": 0.5,
        "regret": pytest.approx(0.1),
        "relative_regret": pytest.approx(0.5),
    }


def test_bounds_beyond_the_reference_still_say_which_is_the_stronger(make_summary):
    """Both are below rtn:2, where ratios are bounds of the same value."""
    quantizer = "rtn(bits=2, group_size=16)"
    orders = {
        "magnitude:0.5": [-9.0, -9.1],
        quantizer: [-7.0, -7.1],
        f"magnitude:0.5 > {quantizer}": [-10.0, -10.1],
        f"{quantizer} > magnitude:0.5": [-9.5, -9.6],
    }
    summary = make_summary(CURVE | orders)
    (pair,) = summary["pairs"]
    assert pair["intensity"]["bound"] == "unknown"
    assert pair["methods"] == ["magnitude", "rtn(group_size=16)"]
    assert summary["all"]["rules"]["weaker_first"]["right"] == 1
    assert summary["all"]["spearman"]["pairs"] == 0
    assert summary["all"]["spearman"]["rho"] is None


def test_a_few_pairs_have_no_interval_of_rho(make_summary):
    rho = make_summary(study_of_pairs([-0.3, 0.1, 0.2], [-3.1, -3.7, -3.9]))["all"]["spearman"]
    assert rho["rho"] == pytest.approx(1)
    assert rho["low"] is None
    assert rho["reason"] == "there are only 3 pairs"


def test_groups_are_by_methods_their_options_and_the_grid(make_summary):
    orders = {}
    for pruner in ("wanda:0.5", "wanda(off_grid=true, sparsity=0.5)", "wanda(pattern=2:4)"):
        for quantizer in ("rtn:4", "rtn(bits=4, group_size=16)"):
            orders[f"{pruner} > {quantizer}"] = around(-4, -4.1)
            orders[f"{quantizer} > {pruner}"] = around(-4, -4.2)
    groups = [
        (*group["methods"], group["simulated"], group["pairs"])
        for group in make_summary(orders)["methods"]
    ]
    assert groups == [
        ("wanda", "rtn", False, 1),
        ("wanda", "rtn", True, 1),
        ("wanda", "rtn(group_size=16)", False, 1),
        ("wanda", "rtn(group_size=16)", True, 1),
        ("wanda(pattern=2:4)", "rtn", False, 1),
        ("wanda(pattern=2:4)", "rtn(group_size=16)", False, 1),
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_a_split_is_positive_where_quantizing_first_has_less_error(make_summary, turned):
    """Whichever of the two orders was run first."""
    forward = "wanda:0.5 > rtn:4"
    reverse = "rtn:4 > wanda:0.5"
    key = f"{forward} | {reverse}" if turned else f"{reverse} | {forward}"
    sign = -1 if turned else 1
    draws = [
        {"a": (0.3, 0.2, 0.1), "b": (-0.1, 0.1, -0.2)},
        {"a": (0.5, 0.2, 0.3), "b": (-0.3, -0.1, -0.2)},
    ]
    pairs = {
        (key, draw): {name: [sign * x for x in split] for name, split in layers.items()}
        for draw, layers in enumerate(draws)
    }
    orders = {forward: around(-4, -4.1), reverse: around(-3.8, -3.9)}
    summary = make_summary(orders, pairs=pairs)
    split = summary["pairs"][0]["split"]
    a = {"whole": 0.4, "owner": 0.2, "interference": 0.2}
    b = {"whole": -0.2, "owner": 0.0, "interference": -0.2}
    assert split["layers"]["a"] == pytest.approx(a)
    assert split["layers"]["b"] == pytest.approx(b)
    assert (split["whole"], split["owner"], split["interference"]) == pytest.approx((0.2, 0.2, 0.0))
    assert summary["all"]["rules"]["layer_errors"]["right"] == 1
    assert summary["all"]["split"]["owner_share"] == pytest.approx(1)
