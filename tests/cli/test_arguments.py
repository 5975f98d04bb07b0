"""Arguments that commands share: that they reach the compressor, and mean there what they mean in Python."""

import argparse
import inspect
import logging

import pytest
import transformers

from optimum_order import JointCompressor
from optimum_order.cli import arguments

GIVEN = {
    "--revision": ("main", "revision"),
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
    """What `from_pretrained` was asked for."""
    found = {}
    monkeypatch.setattr(
        JointCompressor, "from_pretrained", lambda name, **options: found.update(options, name=name)
    )
    return found


def test_what_is_not_given_is_what_python_takes(parser, asked):
    arguments.compressor(parser.parse_args(["tiny-llama"]))
    signature = inspect.signature(inspect.unwrap(JointCompressor.__init__)).parameters
    known = [name for name in asked if name in signature and name != "calibration"]
    assert {"calibration_samples", "sequence_length", "seed", "calibration_dtype", "device"} <= set(
        known
    )
    assert {name: asked[name] for name in known} == {
        name: signature[name].default for name in known
    }


def test_all_that_is_given_arrives(parser, asked):
    given = [word for flag, (value, _) in GIVEN.items() for word in (flag, value)]
    arguments.compressor(parser.parse_args(["tiny-llama", *given]))
    assert asked.pop("name") == "tiny-llama"
    assert set(asked) == {name for _, name in GIVEN.values()}, "nothing else is asked for"
    for value, name in GIVEN.values():
        arrived = asked[name]
        assert ([str(each) for each in arrived] if isinstance(arrived, list) else str(arrived)) in (
            value,
            [value],
        )


def test_a_command_may_do_without_a_model():
    parser = argparse.ArgumentParser()
    arguments.model(parser, required=False)
    assert parser.parse_args([]).model is None


def test_libraries_are_silent_unless_their_user_asked(monkeypatch):
    before, level = (
        transformers.utils.logging.get_verbosity(),
        logging.getLogger("bitsandbytes").level,
    )
    try:
        transformers.utils.logging.set_verbosity_info()
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
        arguments.hush_libraries()
        assert transformers.utils.logging.get_verbosity() == logging.INFO
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
        arguments.hush_libraries()
        assert transformers.utils.logging.get_verbosity() == logging.ERROR
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity(before)
        transformers.utils.logging.enable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(level)
