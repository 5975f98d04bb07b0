"""What the tests of calibration share: hooks that see every input, and a walk that collects."""

import contextlib
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_order.calibration.execution import Execution
from optimum_order.calibration.walk import Visit, walk
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics


@pytest.fixture(autouse=True)
def no_thread_remains():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="session")
def run_walk():
    """`run_walk(model, units, batches, pause="group")`: a walk in float32, to be compared with hooks."""

    def run(
        model,
        units,
        batches,
        *,
        needs=(Gram,),
        wanted=None,
        finished=None,
        dtype=torch.float32,
        **options,
    ):
        return walk(
            model,
            units,
            batches,
            needs=set(needs),
            execution=Execution(dtype=dtype, **options),
            wanted=wanted,
            finished=finished,
        )

    return run


@dataclass
class Collected:
    """What a walk has shown.

    Args:
        statistics: By layer.
        visits: Every pause.
        layers: The layers in the order in which they were visited.
        blocks: The blocks in the order in which they were completed.
    """

    statistics: dict[str, Statistics]
    visits: list[Visit]
    layers: list[str]
    blocks: list[str]


@pytest.fixture(scope="session")
def collect(run_walk):
    """`collect(model, units, batches, change)`: walk to the end; `change(visit)` is called at every pause."""

    def run(model, units, batches, change=lambda visit: None, **options):
        collected = Collected({}, [], [], [])
        with contextlib.closing(run_walk(model, units, batches, **options)) as visits:
            for visit in visits:
                names = [target.name for target in visit.targets]
                assert list(visit.statistics) == names
                collected.statistics.update(visit.statistics)
                collected.visits.append(visit)
                collected.layers += names
                if visit.complete:
                    collected.blocks.append(visit.unit.name)
                change(visit)
        return collected

    return run


def _patches(module, x):
    """Yield what a convolution without padding reads at each position of an image, by a loop."""
    kernel_rows, kernel_columns = module.kernel_size
    row_step, column_step = module.stride
    for top in range(0, x.shape[2] - kernel_rows + 1, row_step):
        for left in range(0, x.shape[3] - kernel_columns + 1, column_step):
            yield x[:, :, top : top + kernel_rows, left : left + kernel_columns].flatten(1)


@pytest.fixture(scope="session")
def observe():
    """`observe(model, units, batches)`: all inputs X (tokens, in) of each layer in float64.

    Hooks see them on the whole model's own forward.
    """

    def see_all(model, units, batches):
        seen = {target.name: [] for unit in units for target in unit.targets}

        def see(name, x):
            if name in seen:
                seen[name].append(x.reshape(-1, x.shape[-1]).double())

        def see_experts(name, module, arguments):
            hidden = arguments[0].reshape(-1, arguments[0].shape[-1])
            chosen = arguments[1]
            for expert in range(len(module.down_proj)):
                rows = hidden[(chosen == expert).any(-1)]
                see(f"{name}.gate_up_proj.{expert}", rows)
                weight = module.gate_up_proj[expert]
                gate_up = rows @ (weight if module.is_transposed else weight.T)
                if module.has_bias:
                    gate_up = gate_up + module.gate_up_proj_bias[expert]
                see(f"{name}.down_proj.{expert}", module._apply_gate(gate_up))

        def see_images(name, module, arguments):
            sides = [side for side in module.padding[::-1] for _ in range(2)]
            padded = nn.functional.pad(arguments[0], sides)
            for group, channels in enumerate(padded.chunk(module.groups, 1)):
                for patch in _patches(module, channels):
                    see(name if module.groups == 1 else f"{name}.weight.{group}", patch)

        def hook(name, module, arguments):
            if isinstance(module, nn.Conv2d):
                see_images(name, module, arguments)
            elif isinstance(module, (nn.Linear, Conv1D)):
                see(name, arguments[0])
            elif hasattr(module, "is_transposed"):
                see_experts(name, module, arguments)

        handles = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: hook(
                    name, module, (*args, *kwargs.values())
                ),
                with_kwargs=True,
            )
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}

    return see_all


@pytest.fixture(scope="session")
def agree():
    """`agree(statistics, X)`: whether statistics are those of X (tokens, in), but for float32 noise."""

    def compare(statistics, X):
        gram = X.T @ X
        noise = 1e-5 * gram.diagonal().max().clamp(min=1e-9)
        norms = statistics[SquaredNorms].double()
        return (
            statistics.tokens == len(X)
            and torch.allclose(statistics[Gram].double(), gram, rtol=1e-4, atol=noise)
            and torch.allclose(norms, gram.diagonal(), rtol=1e-4, atol=noise)
        )

    return compare


@pytest.fixture(scope="session")
def halve():
    """Halve the weights of the layers of a visit."""

    def change(visit):
        for target in visit.targets:
            target.write(target.read() * 0.5)

    return change
