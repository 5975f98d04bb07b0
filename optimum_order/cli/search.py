"""`optimum-order search`: the best recipe in some bytes, and what else fits in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.cli.parser import group_of
from optimum_order.cli.tables import arrows, console
from optimum_order.files import size


class SearchCommand(Command):
    """Prints a recipe, the table of what else fits, and the reason; saves the model if asked to."""

    name = "search"
    summary = "find the recipe that loses least in a budget of bytes"
    description = """\
Find the stages, their intensities, their order and the format for MODEL under
a budget. Layers are compressed by themselves first; then at most three
recipes are carried out on the whole model, the best single method among them,
and are compared on calibration data that was held back.
"""
    epilog = """\
budgets:
  60MB        all weight files of the result, embeddings included
  '2.5 bits'  for each weight of the compressed layers, side information
              included

examples:
  optimum-order search tiny-llama --budget "2.5 bits"
  optimum-order search tiny-llama out --budget 3MB --json
  optimum-order search tiny-llama --max-loss 0.03
  optimum-order search ./my-model out --budget 80MB --for vllm \\
      --calibration my-text.txt
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group_of(parser, "what is done")  # above all others in the help
        arguments.model(parser)
        arguments.output(
            parser,
            "the folder to save the recommended model to; without it nothing is saved",
            required=False,
        )
        arguments.config(parser)
        arguments.budget(parser)
        group_of(parser, "what is done").add_argument(
            "--dry-run",
            action="store_true",
            help="run nothing and read no weight: say whether the budget can be met, and how long "
            "the search takes at most, and in how much memory",
        )
        arguments.loading(parser)
        arguments.calibration(parser)
        arguments.format(
            parser,
            "auto (default) takes the format of the fewest bytes, also one that needs "
            "optimum-order to load unless --for names an engine",
        )
        arguments.engine(parser)
        arguments.writing(parser, unproven=False)

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import folder
        from optimum_order.search.budget import limits

        arguments.quiet_libraries()
        args = self.args
        # errors that need no computation come first
        limits(args.budget, args.max_loss)
        arguments.check_names(args)
        if args.output is not None:
            folder.check_output(Path(args.output), overwrite=args.overwrite)
        compressor = arguments.compressor(args)
        if args.dry_run:
            forecast = compressor.forecast_search(
                args.budget, max_loss=args.max_loss, format=args.format, engine=args.engine
            )
            return {"forecast": forecast.as_dict()}
        selection = compressor.search(
            args.budget, max_loss=args.max_loss, format=args.format, engine=args.engine
        )
        result = selection.as_dict()
        if args.output is not None:
            selection.model.save_pretrained(
                args.output,
                selection.format,
                overwrite=args.overwrite,
                engine=args.engine,
                max_shard_size=args.max_shard_size,
            )
            result["output"] = args.output
        command = arguments.reproducing(args, str(selection.order), selection.format)
        return result | {"command": command}

    def show(self, result: dict[str, Any]) -> None:
        screen = console()
        if "forecast" in result:
            screen.print(
                f"Nothing was run. The search at most: {result['forecast']['summary']}.",
                soft_wrap=True,
            )
            return
        show_selection(result)
        screen.print(f"Again: {result['command']}", soft_wrap=True)
        if "output" in result:
            screen.print(f"Saved to {result['output']}.", soft_wrap=True)


def show_selection(result: dict[str, Any]) -> None:
    """Print the table of a search, the reason and the cost.

    Args:
        result: `Selection.as_dict()`.
    """
    from rich.table import Table

    table = Table(title="what else fits in these bytes" if result["budget"] else None)
    table.add_column("recipe, the recommended first", overflow="fold")
    table.add_column("format")
    for column in ("bytes", "bits", "loss above the original", "more than the first"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        about = "" if row["made"] else "about "
        loss = "not measured"
        if row["loss"] is not None:
            low, high = row["interval"]
            loss = f"{row['loss']:+.4f} ({low:+.4f} to {high:+.4f})"
        more = ""
        if gap := row["difference"]:
            more = f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"
        if not row["fits"]:
            more = "too large"
        table.add_row(
            arrows(row["order"]),
            row["format"],
            about + size(row["bytes"]),
            f"{row['bits']:.3f}",
            loss,
            more,
        )
    screen = console()
    screen.print(table)
    cost = result["cost"]
    screen.print(f"Reason: {result['reason']}", soft_wrap=True)
    screen.print(
        f"It took {cost['compressions']} compressions of the model and {cost['single_layers']} of "
        f"single layers, {cost['seconds']:.1f} seconds.",
        soft_wrap=True,
    )
