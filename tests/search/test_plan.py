"""A plan as JSON, and the orders that it ranks."""

import json

import pytest

from optimum_order.errors import OrderError
from optimum_order.evaluation.comparison import Difference
from optimum_order.order import Order
from optimum_order.search.plan import Plan, permutations, runnable

RANKING = ((Order.parse("wanda:0.5 > rtn:4"), -3.5), (Order.parse("rtn:4 > wanda:0.5"), None))


@pytest.mark.parametrize("difference", [None, Difference(0.5, 0.25, 0.75, "samples", 0.95)])
def test_a_plan_is_json(difference):
    plan = Plan(
        *(RANKING, "perplexity", "auto", "perplexity", difference, True, "why.", {"orders": 2}),
        left_out={"wanda:0.5 > rotate": "no"},
    )
    fields = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert fields["order"] == str(plan.order) == fields["ranking"][0]["order"]
    assert fields["ranking"][1]["score"] is None
    assert {"difference", "decisive", "reason", "cost"} <= set(fields)
    assert Plan.from_dict(fields) == plan


def test_a_plan_of_an_older_version_left_no_order_out():
    plan = Plan(RANKING, "perplexity", "auto", "perplexity", None, True, "why.")
    fields = plan.as_dict()
    del fields["left_out"]
    assert Plan.from_dict(fields) == plan


def test_every_permutation_is_listed_once():
    assert len(set(permutations(["rtn:4", "magnitude:0.5", "wanda:0.5"]))) == 6
    assert len(permutations(["rtn:4", "rtn:4", "wanda:0.5"])) == 3


def test_stages_without_a_choice_of_orders_are_refused():
    for stages, message in (
        (["rtn:4"], "2 to 5 stages, got 1. Add a stage"),
        ([f"magnitude:0.{i}" for i in range(1, 7)], "2 to 5 stages, got 6. Plan the most"),
        (["rtn:4", "rtn:4"], "nothing to order"),
    ):
        with pytest.raises(OrderError, match=message):
            permutations(stages)


def test_orders_that_cannot_be_run_are_left_out_with_the_reason():
    def check(order):
        if str(order).startswith("wanda"):
            raise OrderError(f"no {order}")
        return order

    orders, left_out = runnable(["rtn:4", "magnitude:0.5", "wanda:0.5"], check)
    assert len(orders) == 4 and len(left_out) == 2
    for order, reason in left_out.items():
        assert reason == f"no {order}"
        assert order.startswith("wanda")


def test_one_order_alone_is_no_choice_and_none_is_an_error():
    def only(first):
        def check(order):
            if str(order[0]) != first:
                raise OrderError(f"{order[0]} cannot be first")
            return order

        return check

    with pytest.raises(OrderError, match=r"only 'rtn:4 > wanda:0.5' can be run.* wanda:0.5 cannot"):
        runnable(["wanda:0.5", "rtn:4"], only("rtn:4"))
    with pytest.raises(OrderError, match=r"^wanda:0.5 cannot be first$"):
        runnable(["wanda:0.5", "rtn:4"], only("gptq:4"))
