"""The names a user may rely on. Adding one is a decision, removing one breaks somebody."""

import subprocess
import sys

import pytest

import optimum_order

PUBLIC = [
    "Accumulator",
    "Allocator",
    "Backend",
    "Codec",
    "CompressedModel",
    "Container",
    "Grid",
    "JointCompressor",
    "LayerState",
    "Metric",
    "OptimumOrderConfig",
    "OptimumOrderError",
    "Order",
    "Recovery",
    "Reshaper",
    "Stage",
    "Statistics",
    "Transform",
    "option",
]


def test_the_public_names_are_these():
    assert (
        optimum_order.__all__ == PUBLIC == sorted(PUBLIC, key=lambda name: (name.islower(), name))
    )
    assert set(PUBLIC) <= set(dir(optimum_order))


def test_every_public_name_has_a_docstring_and_is_ours():
    for name in PUBLIC:
        value = getattr(optimum_order, name)
        assert value.__name__ == name
        assert value.__doc__, name
        assert value.__module__.startswith("optimum_order."), name
        assert isinstance(value, type) == (name != "option")


def test_a_star_import_brings_them_all():
    namespace = {}
    exec("from optimum_order import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'JoinCompressor'"):
        optimum_order.JoinCompressor  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys, optimum_order
print([name for name in ("torch", "transformers", "optimum") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
