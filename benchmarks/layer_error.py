"""The gain of GPTQ and SparseGPT over plain rounding and masking, layer by layer, on the same H.

For every layer of the model: the relative output error `tr(dW H dW^T) / tr(W H W^T)` of each method,
from the same calibration walk over the dense model. Exits with 1 if a corrected layer is ever worse
than its plain counterpart.

    python benchmarks/layer_error.py
"""

import argparse
import contextlib
import sys

from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Stage
from optimum_order.backends import Backend
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.walk import walk
from optimum_order.data.text import load
from optimum_order.engine.recipe import method
from optimum_order.layers.error import relative_error
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms
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

    def compress(stage, state, statistics, where):
        backend = method(stage)
        assert isinstance(backend, Backend)
        return backend.apply(state, statistics, where=where)

    def errors(state, statistics, name):
        """Relative output error of one layer under each method, in the order of the columns."""
        for bits in (4, 3):
            for quantizer in ("rtn", "gptq"):
                after = compress(Stage(quantizer, bits), state, statistics, where=name)
                yield relative_error(state.weight, after.weight, statistics)[0]
        pruned = compress(Stage("sparsegpt", 0.5), state, statistics, where=name)
        for weight in (state.weight.masked_fill(pruned.pruned, 0.0), pruned.weight):
            yield relative_error(state.weight, weight, statistics)[0]
        masked = compress(Stage("magnitude", 0.5), state, statistics, where=name)
        yield relative_error(state.weight, masked.weight, statistics)[0]

    batches = list(windows.batches(8))
    needs = {SquaredNorms, Gram}
    visits = walk(model, find_units(model), batches, needs=needs, execution=Execution())
    with contextlib.closing(visits):
        for visit in visits:
            for target in visit.targets:
                state = LayerState(target.read())
                row = errors(state, visit.statistics[target.name], target.name)
                rows.append((target.name, *row))

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
    for name, *row in rows:
        table.add_row(name, *(f"{error:.5f}" for error in row))
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
