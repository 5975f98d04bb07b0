"""What handing out 1,000 trials costs, of which each takes a known time.

    python benchmarks/crew.py                        processes of this machine
    python benchmarks/crew.py --cluster auto         a Ray cluster; a local one is started and ended with --start-ray

Trials sleep, so that neither their number nor the load of the processor changes how long they take; their rows are
stored as those of a study are. Overhead is the time beyond trials x seconds / workers, without the start of the
workers, which is measured by itself. Exits with 1 if it is above 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from optimum_order import Order
from optimum_order.study.crew import Spec, crew
from optimum_order.study.trials import Trials
from optimum_order.study.worker import Rows, Task


class Sleeper:
    """A worker whose trials take a known time."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.runner = types.SimpleNamespace(prefixes=None)

    def run(self, task: Task) -> Rows:
        """Sleep, and return a row as long as that of a trial of 64 samples."""
        time.sleep(self.seconds)
        row = {"performance": -1.0, "performances": [-1.0] * 64, "bytes": 1}
        return {("trials", str(order), task.draw): row for order in task.orders}


def tasks(count: int) -> list[Task]:
    """As many different trials as that, with beginnings that some of them share."""
    sparsities = (f"{number / 1000:g}" for number in range(1, 1000))
    both = itertools.product(sparsities, ("sparsegpt", "wanda"), range(2, 9))
    orders = (f"{pruner}:{sparsity} > gptq:{bits}" for sparsity, pruner, bits in both)
    return [Task((Order.parse(order),), 0) for order in itertools.islice(orders, count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.1, help="that a trial takes")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cluster", help="address of a Ray cluster, or auto")
    parser.add_argument("--start-ray", action="store_true", help="start a cluster here")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.start_ray:
            from ray.cluster_utils import Cluster

            head = {"num_cpus": args.workers, "object_store_memory": 100 * 2**20}
            cluster = Cluster(
                initialize_head=True, head_node_args=head | {"include_dashboard": False}
            )
            stack.callback(cluster.shutdown)
            args.cluster = cluster.address
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trials = Trials(folder, {"model": "none"})
        begin = time.perf_counter()
        make: Any = functools.partial(Sleeper, args.seconds)
        spec = Spec(make, 1, 0)
        workers = stack.enter_context(contextlib.closing(crew(spec, args.workers, args.cluster)))
        first = [Task((Order.parse(f"rtn:{2 + number}"),), 0) for number in range(args.workers)]
        assert all(rows for _, rows in workers.run(first))
        start = time.perf_counter() - begin
        begin = time.perf_counter()
        for _, rows in workers.run(tasks(args.trials)):
            assert rows is not None
            trials.add(rows)
        seconds = time.perf_counter() - begin
        assert len(trials.done()) == args.trials
    ideal = args.trials * args.seconds / args.workers
    print(
        f"{'processes' if args.cluster is None else 'Ray'}: {args.workers} workers, up in {start:.1f} s; "
        f"{args.trials:,} trials of {args.seconds:g} s: {seconds:.1f} s, of which {ideal:.1f} s are theirs; "
        f"overhead {seconds / ideal - 1:.1%}"
    )
    sys.exit(seconds > 1.05 * ideal)


if __name__ == "__main__":
    main()
