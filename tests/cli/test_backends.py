import json

from optimum_order import backends, formats


def test_json_lists_every_method_and_format(program):
    done = program("backends", "--json")
    assert done.code == 0
    listed = json.loads(done.out)
    assert [method["name"] for method in listed["methods"]] == list(backends.available())
    assert [each["name"] for each in listed["formats"]] == list(formats.available())
    assert all(each["summary"] for each in listed["methods"] + listed["formats"])


def test_json_says_what_may_be_written(program):
    methods = {
        method["name"]: method
        for method in json.loads(program("backends", "--json").out)["methods"]
    }
    assert methods["gptq"]["calibration"] and methods["mixed_precision"]["calibration"]
    assert not methods["rtn"]["calibration"] and not methods["magnitude"]["calibration"]
    assert (methods["wanda"]["kind"], methods["gptq"]["kind"]) == ("prune", "quantize")
    bits, *others = methods["gptq"]["options"]
    assert bits == {
        "name": "bits",
        "help": "width of a weight",
        "allowed": "an integer in 2..8",
        "required": True,
        "default": None,
    }
    defaults = {option["name"]: option["default"] for option in others if not option["required"]}
    assert (
        defaults["group_size"] == "auto"
        and defaults["symmetric"] is True
        and defaults["damping"] == 0.01
    )
    assert all(
        option["allowed"] and option["help"]
        for method in methods.values()
        for option in method["options"]
    )


def test_people_see_the_same(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    text = program("backends").out
    for name in [*backends.available(), *formats.available()]:
        assert name in text
    assert "an integer in 2..8" in text and "required" in text and "a number in [0, 1)" in text
