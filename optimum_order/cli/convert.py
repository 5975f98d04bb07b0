"""`optimum-order convert`: save a compressed model anew, in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.results import Stopwatch, saved, show_saved
from optimum_order.cli.tables import console
from optimum_order.files import size


class ConvertCommand(Command):
    """Writes the same values in another format, with the same account of how they were made."""

    name = "convert"
    summary = "save a compressed model in another format"
    description = """\
Save a model that optimum-order has saved in another format. Every weight
keeps its value, to the bit; a format that cannot hold one is refused.
"""
    epilog = """\
examples:
  optimum-order convert out smaller --format sparse
  optimum-order convert out for-llama --for llama.cpp
  optimum-order convert me/smol-q4 out --format gptq
  optimum-order convert out smaller --dry-run
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.saved_model(parser)
        arguments.output(parser, "the folder to write; refused if it is not empty")
        arguments.format(
            parser,
            "auto (default) takes the smallest that holds every layer exactly and that "
            "transformers loads by itself",
        )
        arguments.engine(parser)
        arguments.writing(parser)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="write nothing: name the format, and say how large OUTPUT would be",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import folder

        arguments.quiet_libraries()
        args = self.args
        arguments.check_names(args)
        output = Path(args.output)
        folder.check_output(output, overwrite=args.overwrite)
        watch = Stopwatch()
        source = located(args.path, args.revision)
        if args.dry_run:
            return forecast(source, args)
        return saved(convert(source, output, args), output, watch)

    def show(self, result: dict[str, Any]) -> None:
        if self.args.dry_run:
            sizes = f"{size(result['before'])} → {size(result['after'])}"
            console().print(f"{result['from']} → {result['format']}: weights of {sizes}.")
            console().print("Nothing was written.")
            return
        show_saved(result)


def located(path: str, revision: str | None) -> Path:
    """Return the folder of a saved model, downloaded if need be.

    Args:
        path: A folder or an id of the Hub.
        revision: Of the model on the Hub.

    Raises:
        HubError: If there is no such model.
    """
    from optimum_order.artifact import hub

    return hub.locate(path, revision=revision) if "/" in path else Path(path)


def forecast(source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the format that a compressed model would have, and the bytes before and after.

    Args:
        source: Its folder.
        args: The arguments of `format`, `engine` and `writing`.
    """
    from optimum_order.artifact import manifest
    from optimum_order.artifact.convert import prepare
    from optimum_order.estimate.size import stored

    contents, facts, codec = prepare(
        source, args.format, unproven=args.unproven, engine=args.engine
    )
    result = stored(
        contents.model,
        {name: (target, state) for name, target, state in contents.layers},
        codec.name,
        facts["order"],
        {"processor": contents.processor, "unloaded": contents.unloaded},
    )
    before = facts["bytes"]["after"]
    old = manifest.load(source)["format"]
    return {"from": old, "format": codec.name, "before": before, "after": result.bytes}


def convert(source: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Save a compressed model anew, and return its manifest.

    Args:
        source: Its folder.
        output: The folder to write.
        args: The arguments of `format`, `engine` and `writing`.
    """
    from optimum_order.artifact.convert import convert

    return convert(
        source,
        output,
        args.format,
        overwrite=args.overwrite,
        unproven=args.unproven,
        engine=args.engine,
        max_shard_size=args.max_shard_size,
    )
