"""`optimum-order plan` as its users run it."""

import json

import pytest

from optimum_order import Order

SMALL = ["--calibration-samples", "4", "--sequence-length", "64", "--evaluation-samples", "16"]


@pytest.fixture
def arguments(tiny_llama_folder, text_file):
    return ["plan", tiny_llama_folder, "--calibration", text_file, "--evaluate", text_file, *SMALL]


def test_json_is_one_object_with_all_that_is_promised(program, arguments):
    found = program(*arguments, "--stages", "wanda:0.5, gptq(bits=4, group_size=32)", "--json")
    assert found.code == 0
    plan = json.loads(found.out)
    assert (
        Order.parse(plan["order"])
        in Order.parse("wanda:0.5 > gptq(bits=4, group_size=32)").permutations()
    )
    assert {"ranking", "difference", "decisive", "reason", "cost"} <= set(plan)


def test_people_are_told_the_order_the_gain_and_the_cost(program, arguments):
    found = program(*arguments, "--stages", "magnitude:0.6, rtn:2")
    assert found.code == 0 and " → " in found.out
    assert "log-perplexity gained over the next" in found.out and "seconds" in found.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "wanda:0.5"], "2 to 5 stages, got 1"),
        (["--stages", ", ".join(f"magnitude:0.{i}" for i in range(1, 7))], "got 6"),
        (["--stages", "wanda:0.5 gptq:4"], "',' and another stage"),
        (["--stages", "wanda:0.5, gptq:4", "--strategy", "autoo"], "Did you mean 'auto'"),
        (["--stages", "wanda:0.5, gptq:4", "--metric", "accuracy"], "image classifiers"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(program, arguments, options, message):
    found = program(*arguments, *options)
    assert found.code == 2 and not found.out
    assert message in found.err.splitlines()[-1]
