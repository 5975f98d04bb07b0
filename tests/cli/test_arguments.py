"""Arguments that commands share reach the compressor, and mean the same as in Python."""

import argparse
import inspect
import logging

import pytest
import transformers

from optimum_order import JointCompressor
from optimum_order.cli import arguments

OPTIONS = {
    "--revision": ("main", "revision"),
    "--base": ("some/base", "base"),
    "--calibration": ("builtin", "calibration"),
    "--calibration-samples": ("7", "calibration_samples"),
    "--sequence-length": ("96", "sequence_length"),
    "--seed": ("3", "seed"),
    "--calibration-dtype": ("float32", "calibration_dtype"),
    "--device": ("cpu", "device"),
    "--dtype": ("float16", "dtype"),
    "--targets": ("*.q_proj", "targets"),
    "--ignore": ("*.0.*", "ignore"),
}


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    for add in (arguments.model, arguments.calibration, arguments.loading):
        add(parser)
    return parser


@pytest.fixture
def asked(monkeypatch):
    """The arguments of `from_pretrained`."""
    record = {}

    def from_pretrained(name, **options):
        record.update(options, name=name)

    monkeypatch.setattr(JointCompressor, "from_pretrained", from_pretrained)
    return record


def test_defaults_are_those_of_python(parser, asked):
    arguments.compressor(parser.parse_args(["tiny-llama"]))
    signature = inspect.signature(inspect.unwrap(JointCompressor.__init__)).parameters
    defaults = {
        name: value for name, value in asked.items() if name in signature and name != "calibration"
    }
    assert {"calibration_samples", "sequence_length", "seed", "calibration_dtype"} <= set(defaults)
    assert defaults == {name: signature[name].default for name in defaults}


def test_every_option_arrives(parser, asked):
    words = [word for flag, (value, _) in OPTIONS.items() for word in (flag, value)]
    arguments.compressor(parser.parse_args(["tiny-llama", "--merge-adapter", *words]))
    assert (asked.pop("name"), asked.pop("merge_adapter")) == ("tiny-llama", True)
    assert set(asked) == {name for _, name in OPTIONS.values()}, "nothing else is asked for"
    for value, name in OPTIONS.values():
        arrived = asked[name]
        if isinstance(arrived, list):
            (arrived,) = arrived
        assert str(arrived) == value


def test_measuring_arrives_as_plan_and_study_take_it():
    parser = argparse.ArgumentParser()
    arguments.measuring(parser, draws=3, draws_help="why")
    words = ["--evaluate", "text.txt", "--evaluation-samples", "9", "--metric", "fidelity"]
    options = arguments.measurement(parser.parse_args(words))
    assert options == {
        "evaluation": "text.txt",
        "evaluation_samples": 9,
        "metric": "fidelity",
        "draws": 3,
    }
    for function in (JointCompressor.plan, JointCompressor.study):
        assert set(options) <= set(inspect.signature(function).parameters)


def test_a_command_may_do_without_a_model():
    parser = argparse.ArgumentParser()
    arguments.model(parser, required=False)
    assert parser.parse_args([]).model is None


def test_libraries_are_silent_unless_their_user_asked(monkeypatch):
    verbosity = transformers.utils.logging.get_verbosity()
    level = logging.getLogger("bitsandbytes").level
    try:
        transformers.utils.logging.set_verbosity_info()
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
        arguments.quiet_libraries()
        assert transformers.utils.logging.get_verbosity() == logging.INFO
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
        arguments.quiet_libraries()
        assert transformers.utils.logging.get_verbosity() == logging.ERROR
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(level)
