"""Compression methods. One method is one file here, or a class in the entry-point group."""

from optimum_order.backends.base import (
    Allocator,
    Backend,
    Equalizer,
    Measured,
    Method,
    Profiler,
    Recovery,
    Remover,
    Reshaper,
    Transform,
    option,
)

__all__ = [
    "Allocator",
    "Backend",
    "Equalizer",
    "Measured",
    "Method",
    "Profiler",
    "Recovery",
    "Remover",
    "Reshaper",
    "Transform",
    "option",
]
