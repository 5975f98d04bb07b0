"""Arguments that several commands share, and the objects they describe."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_order.cli.parser import group_of, listed, one_of
from optimum_order.errors import (
    DataError,
    FormatError,
    ModelError,
    OptimumOrderError,
    OrderError,
    unknown,
)

if TYPE_CHECKING:
    from optimum_order.compressor import JointCompressor


# What help texts list, so that they need no import that takes seconds; tests compare them.
CALIBRATION_DTYPES = ("auto", "float32", "bfloat16")
DTYPES = (*CALIBRATION_DTYPES, "float16")
EMBEDDINGS = ("keep", "4", "6", "8", "coded")
ENGINES = ("transformers", "peft", "vllm", "llama.cpp")
FORMATS = (
    *("auto", "dense", "compressed-tensors", "gptq", "bitsandbytes", "gguf", "sparse", "coded"),
)
METRICS = ("auto", "perplexity", "accuracy", "fidelity", "embedding", "lm_eval")
PAUSES = ("auto", "block", "group")
PROTOCOLS = ("literature",)
SCHEDULES = ("stage", "block")
STRATEGIES = ("auto", "measure", "pih", "proxy")

_MOST_TEMPLATE = 10**6
_RECENT = 60.0
"""Seconds for which an empty file counts as made by this command."""
SOURCE = (
    "a .txt, .csv, .json, .jsonl or .parquet file, with :column where more than one holds text or "
    "conversations, or for a model that reads images a folder of them, with a subfolder for each "
    "class, or for one that reads sounds a folder of .wav files; a .safetensors file with the "
    "arguments of a forward; a dataset of the Hub as id[:config][:split][:column], or wikitext2, "
    "c4, ultrachat; or 'builtin' "
    "(no network: Python's own documentation, or scikit-learn's digits)"
)


def pause(parser: argparse.ArgumentParser) -> None:
    """Add where a walk pauses."""
    group_of(parser, "what is done").add_argument(
        "--pause",
        default="auto",
        type=one_of("pause", PAUSES),
        metavar=listed(PAUSES),
        help="block: compress the layers of a block together; group: compress the layers that "
        "share an input when the forward reaches them, which is faster and takes more memory; "
        "auto (default) takes group where the activations fit",
    )


def model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add MODEL and how it is read.

    Args:
        parser: The parser of the command.
        required: Whether MODEL must be given, here or in the file of `--config`.
    """
    _path(
        parser,
        "model",
        "a folder, a Hub id, or one of the small models that come with optimum-order: tiny-llama, "
        "tiny-resnet, tiny-vit",
        required=required,
    )
    group = group_of(parser, "model")
    group.add_argument("--revision", help="of MODEL on the Hub: branch, tag or commit")
    group.add_argument("--token", help="of the Hub; without it HF_TOKEN or 'hf auth login' counts")
    group.add_argument("--cache-dir", metavar="DIR", help="where downloads from the Hub are kept")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with MODEL"
    )
    group.add_argument(
        "--merge-adapter",
        action="store_true",
        help="MODEL is a LoRA adapter: merge it into its base model first",
    )
    group.add_argument(
        "--base",
        metavar="MODEL",
        help="with --merge-adapter: the base model, where it is not the id on the Hub that the "
        "adapter names",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        type=one_of("dtype", DTYPES),
        metavar=listed(DTYPES),
        help="auto (default) keeps the checkpoint's",
    )
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="of transformers: eager, sdpa, flash_attention_2 (default: what transformers takes)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file, for conversations; it goes with the result (default: the tokenizer's)",
    )


def output(parser: argparse.ArgumentParser, help: str, *, required: bool = True) -> None:
    """Add OUTPUT.

    Args:
        parser: The parser of the command.
        help: What is written there.
        required: Whether OUTPUT must be given.
    """
    _path(parser, "output", help, required=required)


def _path(parser: argparse.ArgumentParser, name: str, help: str, *, required: bool) -> None:
    # optional for argparse, since a file of options may name the model: `CommandParser` checks
    action = parser.add_argument(name, metavar=name.upper(), nargs="?", help=help)
    action.required = required


def config(parser: argparse.ArgumentParser) -> None:
    """Add the file of options."""
    group_of(parser, "model").add_argument(
        "--config",
        metavar="FILE",
        help="a recipe.yaml, as every saved model holds one: its options count where none is "
        "typed, and its model where OUTPUT alone is",
    )
    setattr(parser, "settings", read_settings)  # noqa: B010 (only a parser of ours has it)


def read_settings(file: str) -> dict[str, Any]:
    """Return the options in a file, by the names they have here.

    Args:
        file: A recipe.yaml.

    Raises:
        OptimumOrderError: If the file cannot be read, or has an option that does not exist.
    """
    from optimum_order.artifact import config

    return config.read(file).given()


def saved_model(parser: argparse.ArgumentParser) -> None:
    """Add PATH, a saved model, and its revision."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a folder that 'optimum-order compress' wrote, or the id of such a model on the Hub: "
        "namespace/name",
    )
    parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit")


def refuse_redirection(order: str, option: str = "--order") -> None:
    """Refuse an order whose '>' the shell took for itself, because it was not quoted.

    Args:
        order: The order that arrived.
        option: The option that it arrived with.

    Raises:
        OrderError: If the output of this process goes, or just went, to a file named like a stage.
    """
    from optimum_order.engine.recipe import method
    from optimum_order.order import Order

    names = [Path(os.path.realpath("/proc/self/fd/1")).name]
    # several stages arrived whole: a file may be left of an earlier mistake
    quoted = re.fullmatch(r"[\w.:-]+", order) is None
    with contextlib.suppress(OSError):
        recent = time.time() - _RECENT
        names += [
            entry.name
            for entry in (() if quoted else os.scandir())
            if entry.is_file() and not entry.stat().st_size and entry.stat().st_mtime > recent
        ]
    for name in names:
        try:
            stages = Order.parse(name).stages
            method(stages[0])
        except OptimumOrderError:
            continue
        raise OrderError(
            f"The shell wrote a file named '{name}': it took the '>' of the order for itself. "
            f'Quote the order, {option} "{order} > {name}", and remove the file.'
        )


def stages(parser: argparse.ArgumentParser, help: str, *, required: bool = False) -> None:
    """Add the stages to order.

    Args:
        parser: The parser of the command.
        help: The meaning of the stages for the command.
        required: Whether they must be given.
    """
    group = group_of(parser, "what is done")
    group.add_argument(
        "--stages",
        required=required,
        help=f'{help}, separated by commas, such as "wanda:0.5, gptq:4"',
    )


def budget(parser: argparse.ArgumentParser, use: str = "") -> None:
    """Add what limits a search.

    Args:
        parser: The parser of the command.
        use: The words that the help begins with.
    """
    group = group_of(parser, "what is done")
    group.add_argument(
        "--budget",
        metavar="SIZE",
        help=f"{use}the most that the result may take: bytes of all its weight files, such as "
        "60MB, or bits for each weight of the compressed layers, such as '2.5 bits', all side "
        "information included",
    )
    group.add_argument(
        "--max-loss",
        metavar="X",
        type=float,
        help=f"{use}the most that the loss (log-perplexity for language models) may rise on "
        "calibration data that is held back, such as 0.03; then the fewest bytes are sought",
    )


def engine(parser: argparse.ArgumentParser) -> None:
    """Add the engine that is to load the result."""
    group = group_of(parser, "what is written")
    group.add_argument(
        "--for",
        dest="engine",
        metavar=listed(ENGINES),
        help="the engine that is to load OUTPUT; --format auto then takes a format that was seen "
        "to load there with these widths and groups, and what it was not seen to load is refused "
        "before the work",
    )


def apply_protocol(args: argparse.Namespace) -> None:
    """Put the settings of a protocol in the place of single ones.

    Args:
        args: The arguments of `evaluation`.

    Raises:
        DataError: If a single one is given too.
    """
    if args.protocol is None:
        return
    if args.evaluate not in (None, "builtin") or args.metric not in ("auto", "perplexity"):
        raise DataError(
            f"'--protocol {args.protocol}' says what is measured and on what: leave out --evaluate "
            "and --metric."
        )
    args.evaluate = args.protocol
    args.metric = "perplexity"


def check_names(args: argparse.Namespace) -> None:
    """Refuse an engine, a format or a metric that does not exist.

    Args:
        args: The arguments of a command, which may have none of these.

    Raises:
        FormatError: If there is no such engine or format.
        ModelError: If there is no such metric.
    """
    from optimum_order import evaluation, formats
    from optimum_order.formats import engines

    if getattr(args, "engine", None) is not None:
        engines.engine(args.engine)
    names = ["auto", *formats.available()]
    if getattr(args, "format", "auto") not in names:
        raise FormatError(unknown("format", args.format, names))
    if getattr(args, "metric", "auto") != "auto":
        evaluation.named(args.metric)


def reproducing(args: argparse.Namespace, order: str, format: str) -> str:
    """Return the command that makes the model of a search again, ready for a shell.

    Args:
        args: The arguments of the search.
        order: The recipe.
        format: The format of the result.
    """
    parser = argparse.ArgumentParser()
    for add in (model, calibration, loading, engine):
        add(parser)
    defaults = vars(parser.parse_args(["MODEL"])) | {"token": args.token}  # is not to be seen
    words = ["optimum-order", "compress", args.model, getattr(args, "output", None) or "OUTPUT"]
    words += ["--order", order]
    if format != "auto":
        words += ["--format", format]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or value == defaults.get(action.dest):
            continue
        words.append(action.option_strings[-1])
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def typed() -> str:
    """Return the command line as it was typed, without a token and without folders of this machine.

    Of a path that begins at the root or at a home only the last name stays.
    """
    words = [Path(sys.argv[0]).name]
    secret = False
    for word in sys.argv[1:]:
        if secret or word.startswith("--token="):
            words.append("TOKEN" if secret else "--token=TOKEN")
            secret = False
            continue
        secret = word == "--token"
        option, equals, value = word.partition("=")
        if not word.startswith("--") or not equals:
            option, equals, value = "", "", word
        if value.startswith(("/", "~")):
            value = Path(value).name
        words.append(option + equals + value)
    return shlex.join(words)


def calibration(parser: argparse.ArgumentParser) -> None:
    """Add the calibration data."""
    group = group_of(parser, "calibration data")
    group.add_argument(
        "--calibration",
        metavar="SRC",
        help=f"data for the methods that look at a layer's inputs: {SOURCE}; default: builtin for "
        "our small models, otherwise required by every method but magnitude, rtn and bitsandbytes",
    )
    group.add_argument(
        "--calibration-samples",
        metavar="N",
        type=int,
        default=128,
        help="how many windows of that text, or images (default %(default)s)",
    )
    group.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help="tokens in a window of text, in calibration and evaluation (default 512, or all that "
        "the model can read at once)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="which windows or images are drawn (default %(default)s)",
    )
    group.add_argument(
        "--calibration-dtype",
        default="auto",
        type=one_of("calibration dtype", CALIBRATION_DTYPES),
        metavar=listed(CALIBRATION_DTYPES),
        help="precision of calibration's matrix products: auto (default) takes bfloat16 for a "
        "float32 model where the processor has units for it, which is faster",
    )


def metric(parser: argparse.ArgumentParser) -> None:
    """Add the performance M."""
    group = group_of(parser, "evaluation")
    group.add_argument(
        "--metric",
        default="auto",
        metavar=listed(METRICS),
        help="auto (default) takes perplexity for a language model, accuracy for an image "
        "classifier, fidelity for an encoder-decoder, embedding for an encoder without a head; "
        "lm_eval:arc_easy,my.yaml asks the questions of tasks of lm-eval; or a metric of a plug-in",
    )


def measuring(parser: argparse.ArgumentParser, *, draws: int, draws_help: str) -> None:
    """Add the data and the draws that orders are compared on.

    Args:
        parser: The parser of the command.
        draws: The default number of calibration draws.
        draws_help: The use of the draws.
    """
    group = group_of(parser, "evaluation")
    group.add_argument(
        "--evaluate",
        metavar="SRC",
        default="builtin",
        help="data to measure on, as for --calibration (default %(default)s)",
    )
    group.add_argument(
        "--evaluation-samples",
        metavar="N",
        type=int,
        help="how many windows from all over that text (default 64), or images (default 1000)",
    )
    metric(parser)
    group.add_argument(
        "--draws",
        metavar="N",
        type=int,
        default=draws,
        help=f"calibration draws that share no sample (default %(default)s): {draws_help}",
    )


def loading(parser: argparse.ArgumentParser) -> None:
    """Add the layers to compress, and the device and threads to compress with."""
    group = group_of(parser, "layers")
    group.add_argument(
        "--targets",
        metavar="PATTERN",
        nargs="+",
        help="compress only these layers: a shell pattern on the full name such as '*.q_proj', or "
        "'re:' and a regular expression; by default every layer inside the model's blocks",
    )
    group.add_argument(
        "--ignore",
        metavar="PATTERN",
        nargs="+",
        help="leave these layers alone; wins over --targets",
    )
    group.add_argument(
        "--embeddings",
        default="keep",
        type=one_of("treatment of embeddings", EMBEDDINGS),
        metavar=listed(EMBEDDINGS),
        help="the embedding, and a head that is tied to it, where no stage names it: keep "
        "(default) leaves it as it is; 8, 6 or 4 rounds it to so many bits; coded has the stage "
        "that meets a rate, such as ecsq:3, treat it with all other layers",
    )
    hardware(parser)


def hardware(parser: argparse.ArgumentParser) -> None:
    """Add the device and the threads."""
    group = group_of(parser, "hardware")
    group.add_argument(
        "--device",
        default="auto",
        metavar="{auto,cpu,cuda,cuda:N}",
        help="auto (default) takes a CUDA device or else the CPU",
    )
    group.add_argument(
        "--num-threads",
        metavar="N",
        type=int,
        help="of the processor (default: as many as it has cores)",
    )


def evaluated(parser: argparse.ArgumentParser) -> None:
    """Add the data that one model is measured on."""
    group = group_of(parser, "evaluation")
    group.add_argument(
        "--evaluate",
        metavar="SRC",
        default="builtin",
        help=f"data to measure on (default %(default)s): {SOURCE}",
    )
    group.add_argument(
        "--evaluation-samples",
        metavar="N",
        type=int,
        help="how many windows from all over that text, or images (default: all)",
    )
    group.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help="tokens in a window of text (default 512, or all that the model can read at once)",
    )


def evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the settings by which published figures are measured."""
    group_of(parser, "evaluation").add_argument(
        "--protocol",
        type=one_of("protocol", PROTOCOLS),
        metavar=listed(PROTOCOLS),
        help="literature: perplexity as papers state it, of the test split of WikiText-2 as one "
        "stream in windows of 2048 tokens; in place of --evaluate and --metric",
    )


def format(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the format of the result.

    Args:
        parser: The parser of the command.
        help: What "auto" takes.
    """
    group_of(parser, "what is written").add_argument(
        "--format",
        default="auto",
        metavar=listed(FORMATS),
        help=f"{help}; or a format of a plug-in",
    )


def writing(parser: argparse.ArgumentParser, *, unproven: bool = True) -> None:
    """Add how a folder is written.

    Args:
        parser: The parser of the command.
        unproven: Whether a format may be named that is not proven to load.
    """
    group = group_of(parser, "what is written")
    if unproven:
        group.add_argument(
            "--unproven",
            action="store_true",
            help="take the --format even if it is not proven to load for the architecture",
        )
    group.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="the most that one weight file may take (default %(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is not empty")


def upload(parser: argparse.ArgumentParser) -> None:
    """Add the options of an upload to the Hub."""
    group = group_of(parser, "the Hub")
    group.add_argument(
        "--private", action="store_true", help="make the repository private, if it is new"
    )
    group.add_argument(
        "--create-pr", action="store_true", help="open a pull request in place of committing"
    )


def compressor(args: argparse.Namespace) -> JointCompressor:
    """Return the compressor that the arguments of `model`, `calibration` and `loading` describe.

    Raises:
        OptimumOrderError: If there is no such model, or it cannot be compressed.
    """
    import torch

    from optimum_order.compressor import JointCompressor

    if args.num_threads is not None:
        if args.num_threads < 1:
            raise ModelError(f"'--num-threads' must be 1 or more, got {args.num_threads}.")
        torch.set_num_threads(args.num_threads)
    names = ["calibration", "calibration_samples", "sequence_length", "seed", "calibration_dtype"]
    names += ["targets", "ignore", "embeddings", "device"]
    return JointCompressor.from_pretrained(
        args.model,
        **{name: getattr(args, name) for name in names if hasattr(args, name)},
        dtype=args.dtype,
        revision=args.revision,
        token=args.token,
        cache_dir=args.cache_dir,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
        chat_template=None if args.chat_template is None else _template(args.chat_template),
        merge_adapter=args.merge_adapter,
        base=args.base,
    )


def _template(file: str) -> str:
    """Return the text of a chat template.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        path = Path(file).expanduser()
        if path.stat().st_size <= _MOST_TEMPLATE:
            return path.read_text(encoding="utf-8")
        reason = f"it is longer than {_MOST_TEMPLATE} bytes"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
    raise DataError(f"The chat template in '{file}' cannot be read: {reason}.")


def measurement(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `measuring` as `plan` and `study` of a compressor take them."""
    return {
        "metric": args.metric,
        "evaluation": args.evaluate,
        "evaluation_samples": args.evaluation_samples,
        "draws": args.draws,
    }


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen, unless a user wants them."""
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        library: Any = transformers.utils.logging
        library.set_verbosity_error()
        library.disable_progress_bar()
        # recommends optional kernels on every CPU
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
