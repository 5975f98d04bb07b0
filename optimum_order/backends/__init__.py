"""Compression methods. One method is one file here, or a class in the entry-point group `optimum_order.backends`."""

import functools
import sys

from optimum_order.backends.base import Allocator, Backend, Measured, Method, option
from optimum_order.errors import OrderError, unknown
from optimum_order.order import Order, Stage
from optimum_order.registry import discover

__all__ = [
    "Allocator",
    "Backend",
    "Measured",
    "Method",
    "available",
    "canonical",
    "method",
    "option",
]


@functools.cache
def available() -> dict[str, type[Method]]:
    """Every method by name."""
    return discover(sys.modules[__name__], Method, "optimum_order.backends")


def method(stage: Stage) -> Method:
    """The method that a stage names, with its options read and checked.

    Raises:
        OrderError: If there is no such method, or an option is unknown, missing or not allowed.
    """
    if stage.method not in available():
        raise OrderError(unknown("method", stage.method, available()))
    return available()[stage.method](stage)


def canonical(order: Order) -> Order:
    """The order with every stage in its one canonical form.

    Raises:
        OrderError: If a stage cannot be run.
    """
    return Order(method(stage).stage for stage in order)
