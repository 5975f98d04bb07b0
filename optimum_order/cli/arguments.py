"""Arguments that several commands share, and the objects they describe."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_order.errors import OptimumOrderError, OrderError

if TYPE_CHECKING:
    from optimum_order.compressor import JointCompressor


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


def model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add MODEL and its revision.

    Args:
        parser: The parser of the command.
        required: Whether MODEL must be given.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="a folder, a Hub id, or one of the small models that come with optimum-order: "
        "tiny-llama, tiny-resnet, tiny-vit",
    )
    parser.add_argument("--revision", help="of MODEL on the Hub: branch, tag or commit")
    parser.add_argument(
        "--merge-adapter",
        action="store_true",
        help="MODEL is a LoRA adapter: merge it into its base model first",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="with --merge-adapter: the base model, where it is not the id on the Hub that the "
        "adapter names",
    )


def saved_model(parser: argparse.ArgumentParser) -> None:
    """Add PATH, a saved model, and its revision."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a folder that 'optimum-order compress' wrote, or the id of such a model on the Hub: "
        "namespace/name",
    )
    parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit")


def refuse_redirection(order: str) -> None:
    """Refuse an order whose '>' the shell took for itself, because it was not quoted.

    Args:
        order: The order that arrived.

    Raises:
        OrderError: If the output of this process goes, or just went, to a file named like a stage.
    """
    from optimum_order.engine.recipe import method
    from optimum_order.order import Order

    names = [Path(os.path.realpath("/proc/self/fd/1")).name]
    with contextlib.suppress(OSError):
        recent = time.time() - _RECENT
        names += [
            entry.name
            for entry in os.scandir()
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
            f'Quote the order, --order "{order} > {name}", and remove the file.'
        )


def stages(parser: argparse.ArgumentParser, help: str, *, required: bool = False) -> None:
    """Add the stages to order.

    Args:
        parser: The parser of the command.
        help: The meaning of the stages for the command.
        required: Whether they must be given.
    """
    parser.add_argument(
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
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help=f"{use}the most that the result may take: bytes of all its weight files, such as "
        "60MB, or bits for each weight of the compressed layers, such as '2.5 bits', all side "
        "information included",
    )
    parser.add_argument(
        "--max-loss",
        metavar="X",
        type=float,
        help=f"{use}the most that the loss (log-perplexity for language models) may rise on "
        "calibration data that is held back, such as 0.03; then the fewest bytes are sought",
    )


def engine(parser: argparse.ArgumentParser) -> None:
    """Add the engine that is to load the result."""
    parser.add_argument(
        "--for",
        dest="engine",
        metavar="ENGINE",
        help="the engine that is to load OUTPUT: transformers, peft, vllm or llama.cpp; --format "
        "auto then takes a format that was seen to load there with these widths and groups, and "
        "what it was not seen to load is refused before the work",
    )


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
    defaults = vars(parser.parse_args(["MODEL"]))
    words = ["optimum-order", "compress", args.model, getattr(args, "output", None) or "OUTPUT"]
    words += ["--order", order, "--format", format]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or value == defaults.get(action.dest):
            continue
        words.append(action.option_strings[-1])
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def calibration(parser: argparse.ArgumentParser) -> None:
    """Add the calibration data."""
    parser.add_argument(
        "--calibration",
        metavar="SRC",
        help=f"data for the methods that look at a layer's inputs: {SOURCE}; default: builtin for "
        "our small models, otherwise required by every method but magnitude, rtn and bitsandbytes",
    )
    parser.add_argument(
        "--calibration-samples",
        metavar="N",
        type=int,
        default=128,
        help="how many windows of that text, or images (default %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help="tokens in a window of text, in calibration and evaluation (default 512, or all that "
        "the model can read at once)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="which windows or images are drawn (default %(default)s)",
    )
    parser.add_argument(
        "--calibration-dtype",
        metavar="DTYPE",
        default="auto",
        help="precision of calibration's matrix products: auto (default) takes bfloat16 for a "
        "float32 model where the processor has units for it, which is faster; or float32, bfloat16",
    )


def metric(parser: argparse.ArgumentParser) -> None:
    """Add the performance M."""
    parser.add_argument(
        "--metric",
        default="auto",
        help="perplexity, accuracy or fidelity; auto (default) takes perplexity for a language "
        "model, accuracy for an image classifier",
    )


def measuring(parser: argparse.ArgumentParser, *, draws: int, draws_help: str) -> None:
    """Add the data and the draws that orders are compared on.

    Args:
        parser: The parser of the command.
        draws: The default number of calibration draws.
        draws_help: The use of the draws.
    """
    parser.add_argument(
        "--evaluate",
        metavar="SRC",
        default="builtin",
        help="data to measure on, as for --calibration (default %(default)s)",
    )
    parser.add_argument(
        "--evaluation-samples",
        metavar="N",
        type=int,
        help="how many windows from all over that text (default 64), or images (default 1000)",
    )
    metric(parser)
    parser.add_argument(
        "--draws",
        metavar="N",
        type=int,
        default=draws,
        help=f"calibration draws that share no sample (default %(default)s): {draws_help}",
    )


def loading(parser: argparse.ArgumentParser) -> None:
    """Add the device and dtype of the model, and the layers to compress."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (default) takes a CUDA device or else the CPU; or cpu, cuda, cuda:N",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto (default) keeps the checkpoint's; or float32, bfloat16, float16",
    )
    parser.add_argument(
        "--targets",
        metavar="PATTERN",
        nargs="+",
        help="compress only these layers: a shell pattern on the full name such as '*.q_proj', or "
        "'re:' and a regular expression; by default every layer inside the model's blocks",
    )
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        nargs="+",
        help="leave these layers alone; wins over --targets",
    )
    parser.add_argument(
        "--embeddings",
        default="keep",
        choices=("keep", "4", "6", "8", "coded"),
        help="the embedding, and a head that is tied to it, where no stage names it: keep "
        "(default) leaves it as it is; 8, 6 or 4 rounds it to so many bits; coded has the stage "
        "that meets a rate, such as ecsq:3, treat it with all other layers",
    )


def upload(parser: argparse.ArgumentParser) -> None:
    """Add the options of an upload to the Hub."""
    parser.add_argument(
        "--private", action="store_true", help="make the repository private, if it is new"
    )
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request in place of committing"
    )


def compressor(args: argparse.Namespace) -> JointCompressor:
    """Return the compressor that the arguments of `model`, `calibration` and `loading` describe.

    Raises:
        OptimumOrderError: If there is no such model, or it cannot be compressed.
    """
    from optimum_order.compressor import JointCompressor

    return JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.calibration_samples,
        sequence_length=args.sequence_length,
        seed=args.seed,
        calibration_dtype=args.calibration_dtype,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        merge_adapter=args.merge_adapter,
        base=args.base,
        targets=args.targets,
        ignore=args.ignore,
        embeddings=args.embeddings,
    )


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
