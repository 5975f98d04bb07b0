"""The census decides what `auto` may take, and what must be insisted on."""

import logging

import pytest
import transformers

from optimum_order import formats
from optimum_order.errors import FormatError
from optimum_order.formats import proven
from optimum_order.formats.compressed_tensors import CompressedTensors

SEVERAL = "compressed-tensors, several widths"


@pytest.fixture
def verdicts(monkeypatch):
    """`verdicts(LlamaForCausalLM={...})`: a census of these classes alone."""

    def verdicts(**classes):
        content = {"transformers": "1.2.3", "classes": classes, "not_built": {}}
        monkeypatch.setattr(proven, "census", lambda: content)
        monkeypatch.setattr(proven, "_cases", lambda: frozenset(ALL))
        formats._say.cache_clear()

    return verdicts


ALL = {
    "dense": "ok",
    "compressed-tensors": "ok",
    SEVERAL: "ok",
    "compressed-tensors, inputs": "ok",
    "compressed-tensors, float8": "ok",
    "bitsandbytes": "ok",
    "sparse": "ok",
}


def test_the_data_is_of_the_names_that_codecs_have():
    census = proven.census()
    public = set(dir(transformers))
    assert census["transformers"].startswith("5.")
    assert len(census["classes"]) > 100
    for name, answers in census["classes"].items():
        assert set(answers) == set(ALL), name
        assert all(isinstance(answer, str) and answer for answer in answers.values())
        assert name in public
    proved = [name for name, answers in census["classes"].items() if answers["dense"] == "ok"]
    assert len(proved) > 0.9 * len(census["classes"])


def test_auto_takes_only_what_is_proven_and_says_why_in_one_line(
    make_model, compressed, verdicts, caplog
):
    contents = compressed(make_model("llama"), "rtn:4")
    caplog.set_level(logging.WARNING, "optimum_order")
    verdicts(LlamaForCausalLM=ALL)
    assert formats.choose(contents).name == "compressed-tensors"
    assert not caplog.messages
    verdicts(LlamaForCausalLM=ALL | {"compressed-tensors": "ValueError: it wants a weight."})
    for _ in range(2):
        assert formats.choose(contents).name == "dense"
    (line,) = caplog.messages
    assert (
        "Stored as 'dense', not as 'compressed-tensors': With transformers 1.2.3, a Llama" in line
    )
    assert line.endswith("did not load (ValueError: it wants a weight).")
    assert len(line.splitlines()) == 1


def test_an_unproven_choice_must_be_insisted_on(make_model, compressed, verdicts):
    contents = compressed(make_model("llama"), ["rtn:4", "rtn:8"])
    verdicts(LlamaForCausalLM=ALL | {SEVERAL: "no"})
    with pytest.raises(FormatError, match=r"not proven .*insist with unproven=True \(--unproven\)"):
        formats.choose(contents, "compressed-tensors")
    assert (
        formats.choose(contents, "compressed-tensors", unproven=True).name == "compressed-tensors"
    )
    assert formats.choose(contents, "sparse").name == "sparse"
    one = compressed(make_model("llama"), "rtn:4")
    assert formats.choose(one, "compressed-tensors").name == "compressed-tensors"


def test_a_class_that_was_not_tried_gets_what_loads_as_a_dense_model(
    make_model, compressed, verdicts
):
    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        """Custom code, with the name of a class that is proven."""

    model = make_model("llama")
    model.__class__ = LlamaForCausalLM
    verdicts(LlamaForCausalLM=ALL)
    for orders, format in [("rtn:4", "compressed-tensors"), ("magnitude:0.5 > rtn:4", "sparse")]:
        assert formats.choose(compressed(model, orders), format).name == format
    for orders, format in [
        (["rtn:4", "rtn:8"], "compressed-tensors"),
        ("bitsandbytes:int8", "bitsandbytes"),
    ]:
        contents = compressed(model, orders)
        with pytest.raises(FormatError, match="none of the architectures with which"):
            formats.choose(contents, format)
        assert formats.choose(contents).name == "dense"
    plain = compressed(model, "magnitude:0.5")
    assert formats.choose(plain).name == "dense"
    # One of transformers' own, with conversions that nobody has tried.
    verdicts(OPTForCausalLM=ALL)
    contents = compressed(make_model("llama"), "rtn:4")
    assert formats.choose(contents).name == "dense"
    assert formats.choose(contents, "sparse").name == "sparse"
    with pytest.raises(FormatError, match="LlamaForCausalLM is none of the architectures"):
        formats.choose(contents, "compressed-tensors")


def test_a_format_that_no_census_tried_is_its_authors_affair(make_model, compressed, verdicts):
    class Own(CompressedTensors):
        name = "own"

    contents = compressed(make_model("llama"), ["rtn:4", "rtn:8"])
    verdicts()
    assert proven.why_unproven(contents.model, CompressedTensors(), contents.layers)
    own = Own()
    own.variant = lambda layers: own.name
    assert proven.why_unproven(contents.model, own, contents.layers) is None
