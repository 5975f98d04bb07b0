"""The data that every machine has: calibration and evaluation share none of it."""

import ast
import sys
import warnings

import numpy as np
import pytest

from optimum_order.data.builtin import (
    digits,
    docstrings,
    reference_topics,
    standard_library_docstrings,
)
from optimum_order.errors import DataError

SOURCE = r'''"""Module."""
class A:
    """Class \d."""
    async def f(self):
        """Method."""
if A:
    try:
        pass
    except ValueError:
        def g():
            """In a handler."""
            match A:
                case int():
                    def h():
                        """In a case."""
    else:
        def i():
            """In an else."""
def j():
    """Function."""
'''


def test_docstrings_of_a_file_are_those_of_all_its_statements(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(SOURCE)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(SOURCE)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert list(docstrings(file)) == [ast.get_docstring(node) for node in nodes]
    assert len(nodes) == 7
    file.write_text("def f(:\n")
    assert list(docstrings(file)) == []


def test_the_standard_library_is_read_in_one_order_without_its_tests(tmp_path, monkeypatch):
    files = ["b.py", "a/z.py", "a/c.py", "test/t.py", "a/tests/t.py", "site-packages/s.py"]
    for name in [*files, "pydoc_data/p.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            f'"""In {name}."""\ndef f():\n    """The same everywhere."""\n'
        )
    (tmp_path / "a" / "notes.txt").write_text('"""No source."""')
    monkeypatch.setattr("sysconfig.get_path", {"stdlib": str(tmp_path)}.get)
    texts = standard_library_docstrings.__wrapped__()
    assert texts == ("In b.py.", "The same everywhere.", "In a/c.py.", "In a/z.py.")


def test_the_standard_library_is_enough_for_disjoint_draws():
    texts = standard_library_docstrings()
    assert sum(len(text.encode()) for text in texts) > 1e6
    assert len(set(texts)) == len(texts)
    assert any("JSON (JavaScript Object Notation)" in text for text in texts)
    assert pytest.__doc__ not in texts, "installed packages are not the standard library"


def test_evaluation_text_is_not_calibrated_on():
    calibration = {
        line.strip() for text in standard_library_docstrings() for line in text.splitlines()
    }
    lines = [line.strip() for text in reference_topics() for line in text.splitlines()]
    lines = [line for line in lines if len(line) >= 40]
    assert len(lines) > 1000
    assert sum(line in calibration for line in lines) < 0.01 * len(lines)


def test_both_parts_of_the_digits_are_all_ten_and_share_no_image():
    (train, held_out), labels = zip(digits("calibration"), digits("evaluation"), strict=True)
    assert train.shape == (897, 8, 8) and held_out.shape == (900, 8, 8)
    assert train.dtype == np.uint8 and (train.min(), train.max()) == (0, 255)
    assert {image.tobytes() for image in train}.isdisjoint(image.tobytes() for image in held_out)
    assert all(np.bincount(part, minlength=10).min() > 70 for part in labels)


def test_the_split_of_the_digits_never_changes():
    """The models that ship were trained on one part, and must not be measured on it."""
    images, labels = digits("evaluation")
    assert labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert int(images.astype(np.int64).sum()) == 4_481_599


def test_without_scikit_learn_there_are_no_digits(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed\. Install it with"):
        digits("evaluation")
