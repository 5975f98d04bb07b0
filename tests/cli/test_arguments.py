"""Arguments that commands share reach the compressor, and mean the same as in Python."""

import argparse
import ast
import inspect
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from optimum_order import JointCompressor, backends, evaluation, formats
from optimum_order.calibration.execution import PAUSES
from optimum_order.cli import arguments
from optimum_order.cli.base import in_options
from optimum_order.engine.recipe import EMBEDDINGS, SCHEDULES
from optimum_order.errors import DataError, ModelError, OrderError
from optimum_order.formats import engines
from optimum_order.models import precision
from optimum_order.registry import discover
from optimum_order.search import planner

OPTIONS = {
    "--revision": ("main", "revision"),
    "--base": ("some/base", "base"),
    "--token": ("hf_token", "token"),
    "--cache-dir": ("cache", "cache_dir"),
    "--attn-implementation": ("eager", "attn_implementation"),
    "--calibration": ("builtin", "calibration"),
    "--calibration-samples": ("7", "calibration_samples"),
    "--sequence-length": ("96", "sequence_length"),
    "--seed": ("3", "seed"),
    "--calibration-dtype": ("float32", "calibration_dtype"),
    "--device": ("cpu", "device"),
    "--dtype": ("float16", "dtype"),
    "--targets": ("*.q_proj", "targets"),
    "--ignore": ("*.0.*", "ignore"),
    "--embeddings": ("8", "embeddings"),
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


def test_every_option_arrives(parser, asked, tmp_path):
    words = [word for flag, (value, _) in OPTIONS.items() for word in (flag, value)]
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    words += [
        "--merge-adapter",
        "--trust-remote-code",
        "--num-threads",
        str(torch.get_num_threads()),
    ]
    words += ["--chat-template", str(tmp_path / "chat.jinja")]
    arguments.compressor(parser.parse_args(["tiny-llama", *words]))
    assert (asked.pop("name"), asked.pop("merge_adapter")) == ("tiny-llama", True)
    assert asked.pop("trust_remote_code") is True
    assert asked.pop("chat_template") == "{{ messages }}"
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


def ours(package, base) -> set[str]:
    """What comes with the package itself."""
    return set(discover(package, base, "none"))


def test_what_help_texts_list_is_all_there_is():
    """Plug-ins are named as such; whoever adds one of ours adds it to the help."""
    assert set(arguments.SCHEDULES) == set(SCHEDULES)
    assert set(arguments.EMBEDDINGS) == set(EMBEDDINGS)
    assert set(arguments.PAUSES) == {"auto", *PAUSES}
    assert set(arguments.STRATEGIES) == set(planner.STRATEGIES)
    assert set(arguments.CALIBRATION_DTYPES) == {"auto", *precision.DTYPES}
    assert set(arguments.ENGINES) == set(engines.names())
    assert set(arguments.FORMATS) == {"auto", *ours(formats, formats.Codec)}
    assert set(arguments.METRICS) == {"auto", *ours(evaluation, evaluation.Metric)}


def test_a_template_that_cannot_be_read_is_one_line(parser, asked, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for file, reason in (("missing", "No such file"), ("bytes", "no UTF-8 text")):
        args = parser.parse_args(["tiny-llama", "--chat-template", str(tmp_path / file)])
        with pytest.raises(DataError, match=reason):
            arguments.compressor(args)


def test_threads_are_set_for_the_whole_process(parser, asked):
    before = torch.get_num_threads()
    try:
        arguments.compressor(parser.parse_args(["tiny-llama", "--num-threads", "2"]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ModelError, match="'--num-threads' must be 1 or more"):
        arguments.compressor(parser.parse_args(["tiny-llama", "--num-threads", "-1"]))


def test_a_command_that_makes_it_again_holds_no_token(parser):
    args = parser.parse_args(["tiny-llama", "--token", "hf_secret", "--seed", "3"])
    args.engine = None
    command = arguments.reproducing(args, "wanda:0.5 > gptq:4", "auto")
    assert (
        command == "optimum-order compress tiny-llama OUTPUT --order 'wanda:0.5 > gptq:4' --seed 3"
    )


def test_an_order_that_the_shell_cut_off_names_its_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gptq:4").touch()
    with pytest.raises(OrderError, match='Quote the order, --stages "wanda:0.5 > gptq:4"'):
        arguments.refuse_redirection("wanda:0.5", "--stages")
    for whole in ("wanda:0.5 > gptq:4", "wanda:0.5, rtn:4", "wanda:0.5 -> rtn:4", "rtn(bits=4)"):
        arguments.refuse_redirection(whole)  # quoted, beside what is left of a mistake
    (tmp_path / "gptq:4").write_text("a file of somebody else")
    arguments.refuse_redirection("wanda:0.5")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("or pass overwrite=True (--overwrite).", "or pass --overwrite."),
        ("Use device='cpu' (--device cpu).", "Use --device cpu."),
        ("with base=... (--base).", "with --base."),
        ("give some (calibration=..., --calibration).", "give some (--calibration)."),
        ("Name one as 'metric' (--metric): a", "Name one as --metric: a"),
        ("without 'work_dir' (--work-dir, --low-memory).", "without --work-dir, --low-memory."),
        ("with ignore=['a.b'] (--ignore), or", "with --ignore, or"),
        ("Ask for 512 or fewer (--sequence-length)", "Ask for 512 or fewer (--sequence-length)"),
        ("use gptq(bits=4, group_size=64)", "use gptq(bits=4, group_size=64)"),
    ],
)
def test_a_message_is_in_options_on_the_command_line(message, expected):
    assert in_options(message) == expected


def test_no_message_names_a_keyword_without_its_option():
    """What a user types is named in every message beside what a programmer types."""
    names = set(inspect.signature(JointCompressor.from_pretrained).parameters)
    names |= set(inspect.signature(JointCompressor.compress).parameters)
    names |= set(inspect.signature(JointCompressor.__init__).parameters)
    keyword = re.compile(rf"\b({'|'.join(names)})=(True|\.\.\.|'|\[)")
    wrong = []
    for file in Path(backends.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
            ):
                continue
            parts = getattr(node.exc.args[0], "values", [node.exc.args[0]])
            text = "".join(str(getattr(part, "value", "x")) for part in parts)
            if keyword.search(in_options(text)):
                wrong.append(f"{file.name}:{node.lineno}: {in_options(text)}")
    assert wrong == []


def test_what_was_typed_is_shown_without_tokens_and_folders(monkeypatch):
    words = ["/usr/bin/optimum-order", "study", "/home/me/model", "out", "--token", "hf_secret"]
    words += ["--token=hf_secret", "--calibration=/data/x.txt", "--orders", "~/o o.txt"]
    words += ["--quantizers", "gptq(group_size=64)", "--evaluate", "builtin"]
    monkeypatch.setattr(sys, "argv", words)
    assert arguments.typed() == (
        "optimum-order study model out --token TOKEN --token=TOKEN --calibration=x.txt --orders "
        "'o o.txt' --quantizers 'gptq(group_size=64)' --evaluate builtin"
    )
