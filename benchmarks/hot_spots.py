"""Where the time of GPTQ's sweep and of `ecsq` goes, on one layer of a given shape.

    python benchmarks/hot_spots.py --device cuda
    python benchmarks/hot_spots.py --outputs 512 --inputs 512       on a CPU

Random weights and inputs; the first run of a stage is not counted. Seconds are those of the clock, with the device
waited for; the profile of torch lists the operators with the most time of their own. Where a GPU has a kernel for
sweeps, the loop of PyTorch that the kernel replaces is timed too, in turn, and the results are compared.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from optimum_order import Order
from optimum_order.backends import Backend, kernels
from optimum_order.engine.recipe import method
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=12, help="operators in a table")
    parser.add_argument("--stages", nargs="+", default=["gptq:4", "ecsq(rate=3, sensitivity=none)"])
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.outputs, args.inputs, generator=generator).to(device) * 0.02
    # inputs of many sizes that go together, as those of a model do
    mix = torch.randn(args.inputs, args.inputs, generator=generator).to(device)
    mix = torch.eye(args.inputs, device=device) + mix / (2 * args.inputs**0.5)
    inputs = torch.randn(args.tokens, args.inputs, generator=generator).to(device) @ mix
    statistics = Statistics(args.tokens, {Gram: inputs.T @ inputs})
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, layer "
        f"{args.outputs} x {args.inputs}, {args.tokens} tokens"
    )
    for stage in args.stages:
        (only,) = Order.parse(stage)

        def run(only=only) -> tuple[float, LayerState]:
            backend = method(only)
            assert isinstance(backend, Backend)
            _wait(device)
            begin = time.perf_counter()
            state = backend.apply(LayerState(weight.clone()), statistics, where="layer")
            _wait(device)
            return time.perf_counter() - begin, state

        ways = {True: "kernel", False: "loop"} if kernels.available(device) else {False: "loop"}
        seconds: dict[str, float] = {}
        states = {}
        for again in range(4):
            for kernel, way in ways.items():
                with mock.patch.object(kernels, "available", return_value=kernel):
                    took, states[way] = run()
                if again:
                    seconds[way] = min(took, seconds.get(way, took))
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            run()
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"\n{stage}: {_said(seconds)}, the best of 3")
        if len(states) == 2:
            one, other = (state.weight.float() for state in states.values())
            print(f"weights that differ: {(one != other).float().mean():.2g} of all")
        print(profiled.key_averages().table(sort_by=by, row_limit=args.rows))


def _said(seconds: dict[str, float]) -> str:
    said = ", ".join(f"{way} {took:.3f} s" for way, took in seconds.items())
    if len(seconds) == 2:
        said += f", {seconds['loop'] / seconds['kernel']:.1f} times as fast"
    return said


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
