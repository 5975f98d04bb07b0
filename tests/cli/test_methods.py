"""The methods and formats that `optimum-order methods` lists."""

import json

import pytest

from optimum_order import formats
from optimum_order.engine.recipe import available as available_methods


@pytest.fixture
def listed(program):
    done = program("methods", "--json")
    assert done.code == 0
    return json.loads(done.out)


def test_json_lists_every_method_and_format(listed):
    assert [method["name"] for method in listed["methods"]] == list(available_methods())
    assert [entry["name"] for entry in listed["formats"]] == list(formats.available())
    assert all(entry["summary"] for entry in listed["methods"] + listed["formats"])


def test_json_says_what_an_order_may_contain(listed):
    methods = {method["name"]: method for method in listed["methods"]}
    assert methods["gptq"]["calibration"] and methods["mixed_precision"]["calibration"]
    assert not methods["rtn"]["calibration"] and not methods["magnitude"]["calibration"]
    assert methods["depth"]["calibration"] and methods["width"]["calibration"]
    kinds = [methods[name]["kind"] for name in ("wanda", "gptq", "mixed_precision", "depth")]
    assert kinds == ["prune", "quantize", "allocate", "reshape"]
    bits, *others = methods["gptq"]["options"]
    assert bits == {
        "name": "bits",
        "help": "width of a weight, fp8 for float8 numbers, or a K-quant of llama.cpp",
        "allowed": "fp8, q2_k, q3_k, q4_k, q5_k, q6_k or an integer in 2..8",
        "required": True,
        "default": None,
    }
    defaults = {option["name"]: option["default"] for option in others if not option["required"]}
    assert (defaults["group_size"], defaults["damping"]) == ("auto", 0.01)
    assert defaults["symmetric"] is True
    options = [option for method in methods.values() for option in method["options"]]
    assert all(option["allowed"] and option["help"] for option in options)


def test_people_see_the_same(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    text = program("methods").out
    for name in [*available_methods(), *formats.available()]:
        assert name in text
    assert "fp8 for float8 numbers" in text and "required" in text and "a number in [0, 1)" in text
