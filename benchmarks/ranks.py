"""What several processes gain: the processor time of each, and the bytes that they exchange.

    torchrun --nproc-per-node 2 benchmarks/ranks.py [ORDER] [SAMPLES]

Prints one JSON object for each number of processes it is started in: 1, 2, ... Processor time is
that of the busiest process, which other work on the machine does not change; wall time is.
"""

import json
import sys
import time

import torch

from optimum_order import JointCompressor
from optimum_order.calibration.ranks import Ranks


def main(order: str = "gptq:4", samples: str = "64") -> None:
    with Ranks.joined() as ranks:
        compressor = JointCompressor.from_pretrained(
            "tiny-llama", calibration_samples=int(samples), device="cpu"
        )
        compressor.draw()  # read the data first: every process does so by itself
        ranks.wait()
        moved = ranks.moved
        wall = time.perf_counter()
        cpu = time.process_time()
        compressed = compressor.compress(order, pause="block", progress=False, ranks=ranks)
        seconds = ranks.gather([time.process_time() - cpu, time.perf_counter() - wall])
        blocks = len({name.split(".self_attn.")[0].split(".mlp.")[0] for name in compressed.layers})
        if ranks.rank == 0:
            row = {
                "processes": ranks.size,
                "order": order,
                "samples": int(samples),
                "threads": torch.get_num_threads(),
                "cpu_seconds": round(max(cpu for cpu, _ in seconds), 2),
                "wall_seconds": round(max(wall for _, wall in seconds), 2),
                "megabytes_per_block": round((ranks.moved - moved) / blocks / 1e6, 2),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
