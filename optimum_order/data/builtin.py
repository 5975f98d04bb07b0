"""Data that every machine has: Python's own documentation, and scikit-learn's digits."""

from __future__ import annotations

import ast
import functools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from optimum_order.data.samples import Purpose
from optimum_order.errors import DataError

INSTALL_VISION = "Install it with pip install 'optimum-order[vision]'."

_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}
_HELD_OUT_DIGITS = 900


def docstrings(file: Path) -> Iterator[str]:
    """Yield every docstring of a Python source file, outermost first.

    A file that does not parse has none: templates, and files that are broken on purpose.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of other people's code
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text.encode("utf-8", "replace").decode()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements of a tree in the order of `ast.walk`, which visits expressions too."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # grows as it is read
        yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, field, [])


@functools.cache
def standard_library_docstrings() -> tuple[str, ...]:
    """Return every distinct docstring of the running Python's standard library, without tests."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_LIBRARY)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return tuple(dict.fromkeys(text for file in files for text in docstrings(file)))


def reference_topics() -> tuple[str, ...]:
    """Return the reference manual that CPython carries for `help()`, one document per topic."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


def digits(purpose: Purpose) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return one part of the 1797 handwritten digits that scikit-learn carries.

    900 digits, drawn once and for all, are held out for evaluation; the rest is for calibration.

    Returns:
        Images (n, 8, 8) uint8, from 0 for paper to 255 for ink, and their digits (n,) int64.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "The built-in images are those of scikit-learn, which is not installed. "
            f"{INSTALL_VISION}"
        ) from None
    bunch = load_digits()
    # numpy promises that the stream of RandomState never changes
    order = np.random.RandomState(0).permutation(len(bunch.target))
    held_out = purpose == "evaluation"
    part = order[:_HELD_OUT_DIGITS] if held_out else order[_HELD_OUT_DIGITS:]
    images = (bunch.images[part] * (255 / 16)).round().astype(np.uint8)
    return images, bunch.target[part].astype(np.int64)
