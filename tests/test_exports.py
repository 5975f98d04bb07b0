"""The names a user may rely on. Adding one is a decision, removing one breaks somebody: hence this list."""

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
    assert optimum_order.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(optimum_order))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    value = getattr(optimum_order, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__
    assert value.__module__.startswith("optimum_order.")


def test_a_star_import_brings_them_all():
    namespace = {}
    exec("from optimum_order import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'JoinCompressor'"):
        optimum_order.JoinCompressor  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, optimum_order; print([m for m in ('torch', 'transformers', 'optimum') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
