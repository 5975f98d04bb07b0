"""Arguments that several commands share, and what they make of them."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum_order.compressor import JointCompressor

SOURCE = (
    "a .txt, .jsonl or .parquet file, or for a model that reads images a folder of them, with a subfolder for each "
    "class; a Hub dataset as id[:config][:split][:column]; or 'builtin' (no network: Python's own documentation, or "
    "scikit-learn's digits)"
)


def model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """MODEL, and which revision of it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="a folder, a Hub id, or one of the small models that come with us: tiny-llama, tiny-resnet, tiny-vit",
    )
    parser.add_argument("--revision", help="of MODEL on the Hub: branch, tag or commit")


def calibration(parser: argparse.ArgumentParser) -> None:
    """What the methods that look at a layer's inputs are shown."""
    parser.add_argument(
        "--calibration",
        metavar="SRC",
        help=f"data for the methods that look at a layer's inputs: {SOURCE}; default: builtin for our small "
        "models, otherwise required by every method but magnitude, rtn and bitsandbytes",
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
        default=512,
        help="tokens in a window of text, in calibration and evaluation (default %(default)s)",
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
        help="what calibration multiplies matrices in: auto (default) takes bfloat16 for a float32 model where the "
        "processor has units for it, which is faster; or float32, bfloat16",
    )


def metric(parser: argparse.ArgumentParser) -> None:
    """The performance M."""
    parser.add_argument(
        "--metric",
        default="auto",
        help="what to measure: perplexity, accuracy or fidelity; auto (default) takes perplexity for a language "
        "model, accuracy for an image classifier",
    )


def loading(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded, and which of its layers are compressed."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (default) takes a GPU where there is one; or cpu, cuda, cuda:N",
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
        help="compress only these layers: a shell pattern on the full name such as '*.q_proj', or 're:' and a "
        "regular expression; by default every layer inside the model's blocks",
    )
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        nargs="+",
        help="leave these layers alone; wins over --targets",
    )


def compressor(args: argparse.Namespace) -> JointCompressor:
    """The compressor that the arguments of `model`, `calibration` and `loading` describe.

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
        targets=args.targets,
        ignore=args.ignore,
    )


def hush_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen, unless their users asked to see them."""
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(
            logging.ERROR
        )  # recommends optional kernels on every CPU
