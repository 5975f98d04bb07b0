"""`optimum-order plan` prints the order, its gain and the cost."""

import json

import pytest

from optimum_order import Order

SMALL = ["--calibration-samples", "4", "--sequence-length", "64", "--evaluation-samples", "16"]


@pytest.fixture
def arguments(tiny_llama_folder, text_file):
    return ["plan", tiny_llama_folder, "--calibration", text_file, "--evaluate", text_file, *SMALL]


def test_json_is_one_object_with_all_that_is_promised(program, arguments):
    done = program(*arguments, "--stages", "wanda:0.5, gptq(bits=4, group_size=32)", "--json")
    assert done.code == 0
    plan = json.loads(done.out)
    orders = Order.parse("wanda:0.5 > gptq(bits=4, group_size=32)").permutations()
    assert Order.parse(plan["order"]) in orders
    assert {"ranking", "difference", "decisive", "reason", "cost"} <= set(plan)


def test_people_see_the_order_the_gain_and_the_cost(program, arguments):
    done = program(*arguments, "--stages", "magnitude:0.6, rtn:2")
    assert done.code == 0 and " → " in done.out
    assert "log-perplexity gained over the next" in done.out and "seconds" in done.out


def test_stages_that_cannot_be_planned_are_one_line_and_exit_code_2(program, arguments):
    for options, message in [
        (["--stages", "wanda:0.5"], "2 to 5 stages, got 1"),
        (["--stages", ", ".join(f"magnitude:0.{i}" for i in range(1, 7))], "got 6"),
        (["--stages", "wanda:0.5 gptq:4"], "',' and another stage"),
        (["--stages", "wanda:0.5, gptq:4", "--strategy", "autoo"], "Did you mean 'auto'"),
        (["--stages", "wanda:0.5, gptq:4", "--metric", "accuracy"], "image classifiers"),
    ]:
        done = program(*arguments, *options)
        assert done.code == 2 and not done.out
        assert message in done.err.splitlines()[-1]
