"""The orders of a study: grids of pairs, orders off the grid, stages alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from optimum_order.engine.recipe import canonical, method
from optimum_order.errors import OrderError
from optimum_order.order import Order, Stage

REFERENCE = "rtn"
REFERENCE_BITS = (2, 3, 4, 5, 6, 8)
"""Widths at which every study measures plain quantization: compression-equivalent ratios are read
from that curve."""


def grid(
    pruners: Sequence[Stage],
    sparsities: Sequence[float],
    quantizers: Sequence[Stage],
    bits: Sequence[int],
    *,
    simulate: bool = False,
) -> list[Order]:
    """Return each stage alone, then both orders of every pair of a pruner and a quantizer.

    Args:
        pruners: Stages without a sparsity, such as `wanda`.
        sparsities: Sparsities, in [0, 1).
        quantizers: Stages without bits, such as `gptq(group_size=64)`.
        bits: Widths.
        simulate: Whether pruning a quantized layer leaves its grid, as papers simulate it.

    Raises:
        OrderError: If the grid has fewer than two pairs, or a stage cannot be run.
    """
    prune = _settings(pruners, "sparsity", map(float, sparsities))
    quantize = _settings(quantizers, "bits", bits)
    pairs = len(prune) * len(quantize)
    if pairs < 2:
        raise OrderError(
            f"A grid of {len(prune)} pruning and {len(quantize)} quantizing settings has {pairs} "
            "pairs, and a study compares at least 2. Give more sparsities, bits or methods; for a "
            "single pair there is 'optimum-order plan'."
        )
    orders = [Order((stage,)) for stage in [*prune, *quantize]]
    for pruner, quantizer in itertools.product(prune, quantize):
        orders += [Order((pruner, quantizer)), Order((quantizer, pruner))]
    return [off_grid(order) for order in orders] if simulate else orders


def _settings(stages: Sequence[Stage], knob: str, values: Iterable[float]) -> list[Stage]:
    """Return every stage with every value of its main knob, canonical and each once."""
    for stage in stages:
        if stage.value is not None or knob in dict(stage.options):
            raise OrderError(f"Give '{stage}' without its {knob}, which the grid sets.")
    settings = (
        Stage(stage.method, **dict(stage.options) | {knob: value})
        for stage, value in itertools.product(stages, values)
    )
    return list(dict.fromkeys(method(stage).stage for stage in settings))


def off_grid(order: Order) -> Order:
    """Return an order as papers simulate it: a stage that prunes a quantized layer leaves its grid.

    Raises:
        OrderError: If a stage cannot be run.
    """
    return canonical(Order(_off_grid(stage) for stage in order))


def _off_grid(stage: Stage) -> Stage:
    chosen = method(stage)
    if "off_grid" not in chosen.resolved:
        return stage
    defaults = {field.name: field.default for field in dataclasses.fields(chosen.Options)}
    changed = {name: value for name, value in chosen.resolved.items() if value != defaults[name]}
    return Stage(stage.method, **changed | {"off_grid": True})


def with_parts(orders: Iterable[Order]) -> list[Order]:
    """Return each stage of some orders alone, then the orders, without repetitions.

    Raises:
        OrderError: If a stage cannot stand alone.
    """
    orders = list(orders)
    alone = [Order((stage,)) for order in orders for stage in order]
    for order in alone:
        if method(order[0]).reads_original:
            raise OrderError(
                f"A study runs each stage alone too, and '{order}' makes up for stages before it: "
                "leave it out of the study."
            )
    return list(dict.fromkeys([*alone, *orders]))


def references() -> list[Order]:
    """Return plain quantization at the widths that every study measures."""
    return [canonical(Order((Stage(REFERENCE, bits),))) for bits in REFERENCE_BITS]


def draws_matter(order: Order) -> bool:
    """Return whether an order calibrates, so that its result depends on the calibration draw."""
    return any(method(stage).needs_data for stage in order)
