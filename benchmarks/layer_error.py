"""What GPTQ and SparseGPT gain over plain rounding and masking, layer by layer, on the same H.

For every layer of the model the relative output error `tr(dW H dW^T) / tr(W H W^T)` of each method, from the same
calibration walk over the dense model. Exits with 1 if a corrected layer is ever worse than its plain counterpart.

    python benchmarks/layer_error.py
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Stage
from optimum_order.calibration.walk import walk
from optimum_order.data.text import load
from optimum_order.engine.recipe import method
from optimum_order.engine.run import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    source = JointCompressor.from_pretrained(args.model).source
    model = source.load()
    windows = load(args.calibration, source.processor, samples=args.samples, length=512)
    rows = []

    def errors(state, known, name):
        """Relative output error of one layer under each method, in the order of the table's columns."""
        for bits in (4, 3):
            for quantiser in ("rtn", "gptq"):
                after = method(Stage(quantiser, bits)).apply(state, known, where=name)
                yield relative_error(state.weight, after.weight, known)[0]
        pruned = method(Stage("sparsegpt", 0.5)).apply(state, known, where=name)
        for weight in (state.weight.masked_fill(pruned.pruned, 0.0), pruned.weight):
            yield relative_error(state.weight, weight, known)[0]
        masked = method(Stage("magnitude", 0.5)).apply(state, known, where=name)
        yield relative_error(state.weight, masked.weight, known)[0]

    def visit(at):
        for target in at.unit.targets:
            rows.append(
                (
                    target.name,
                    *errors(LayerState(target.read()), at.statistics[target.name], target.name),
                )
            )

    walk(model, find_units(model), list(windows.batches(8)), visit, gram=True)

    table = Table(title=f"{args.model}: relative squared output error", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for column in (
        "rtn:4",
        "gptq:4",
        "rtn:3",
        "gptq:3",
        "same mask, plain",
        "sparsegpt:0.5",
        "magnitude:0.5",
    ):
        table.add_column(column, justify="right")
    for name, *found in rows:
        table.add_row(name, *(f"{error:.5f}" for error in found))
    Console(width=140).print(table)
    worse = [
        name
        for name, rtn4, gptq4, rtn3, gptq3, plain, sparse, magnitude in rows
        if gptq4 > rtn4 or gptq3 > rtn3 or sparse > plain or sparse > magnitude
    ]
    print(
        f"{len(rows)} layers, {len(worse)} where a correction made it worse"
        + (f": {worse}" if worse else ".")
    )
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
